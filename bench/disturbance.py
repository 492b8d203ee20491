"""How much of the machine others took while something was measured.

It matters for fairness: beside a busy process the library becomes several times slower and the
engine hardly does, so that a machine at other work would flatter the engine.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, process_time

# Above this, and for longer than the clocks' ticks could explain, a measurement is marked.
_TOLERATED_SHARE = 0.05
_TOLERATED_SECONDS = 0.1
_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
_CORES = os.cpu_count() or 1


@dataclass
class Disturbance:
    """Core-seconds of others, the hypervisor's other guests included, in a time of measuring."""

    others_seconds: float = 0.0
    measured_seconds: float = 0.0

    def share(self) -> float:
        """The share of all cores that others had."""
        if not self.measured_seconds:
            return 0.0
        return max(0.0, self.others_seconds / (_CORES * self.measured_seconds))

    def is_notable(self) -> bool:
        """Whether the figures are not to be trusted."""
        return self.share() > _TOLERATED_SHARE and self.others_seconds > _TOLERATED_SECONDS

    @contextmanager
    def watch(self, process_id: int) -> Iterator[None]:
        """Around the work of a child; its own work, and this process's, is not a disturbance."""
        began, before = perf_counter(), _others_seconds(process_id)
        yield
        self.others_seconds += _others_seconds(process_id) - before
        self.measured_seconds += perf_counter() - began


def _others_seconds(process_id: int) -> float:
    total = Path("/proc/stat").read_text(encoding="ascii").partition("\n")[0].split()[1:9]
    user, nice, system, _idle, _waiting, interrupts, soft_interrupts, stolen = map(int, total)
    # The name, which comes first, may hold spaces; it ends with the last bracket.
    child = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()
    ours = int(child[11]) + int(child[12])
    ticks = user + nice + system + interrupts + soft_interrupts + stolen - ours
    return ticks / _TICKS_PER_SECOND - process_time()
