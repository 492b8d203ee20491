"""How many threads to compute with while other processes want the same cores.

torch's threads wait for one another after every operation, so a core that another process takes
away holds up all of them: one busy neighbour on two cores makes speech several times slower, and
one thread alone is then the quickest. A thread that is held up shows it: it gets less of the CPU
than the time that passes.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter, thread_time

import torch

# Judged over at least this much work. Short, because a crowded step may take a second.
_WINDOW_SECONDS = 0.1
# A thread that has its core to itself is on the CPU for 98 % of the time and more, one that shares
# with a busy neighbour for half of it.
_LEAST_CPU_SHARE = 0.8
# How long to stay with fewer threads before trying more; doubled each time that it was too soon.
_FIRST_PATIENCE_SECONDS = 0.5
_LONGEST_PATIENCE_SECONDS = 30.0
_PROC_STAT = Path("/proc/stat")
_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


class ThreadGovernor:
    """Chooses the number of torch's threads from how the work before has gone.

    Belongs to one thread, whose work it watches. Where the system does not say how idle its cores
    are, it changes nothing.
    """

    def __init__(self) -> None:
        self._most = torch.get_num_threads()
        self._threads = self._most
        self._works = self._most > 1 and _PROC_STAT.exists()
        self._patience_seconds = _FIRST_PATIENCE_SECONDS
        self._lowered_at = self._raised_at = 0.0
        self._passed = self._on_cpu = self._idle = 0.0

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Around a piece of work."""
        if not self._works:
            yield
            return
        passed, on_cpu = perf_counter(), thread_time()
        idle = _idle_seconds() if self._threads < self._most else 0.0
        yield
        self._passed += perf_counter() - passed
        self._on_cpu += thread_time() - on_cpu
        if self._threads < self._most:
            self._idle += _idle_seconds() - idle
        if self._passed >= _WINDOW_SECONDS:
            self._judge(perf_counter())
            self._passed = self._on_cpu = self._idle = 0.0

    def _judge(self, now: float) -> None:
        if self._threads > 1 and self._on_cpu < _LEAST_CPU_SHARE * self._passed:
            too_soon = now - self._raised_at < 2 * self._patience_seconds
            longer = min(2 * self._patience_seconds, _LONGEST_PATIENCE_SECONDS)
            self._patience_seconds = longer if too_soon else _FIRST_PATIENCE_SECONDS
            self._lowered_at = now
            self._compute_with(self._threads - max(1, self._threads // 4))
            return
        free = round(self._idle / self._passed)
        if free and now - self._lowered_at > self._patience_seconds:
            self._raised_at = now
            self._compute_with(min(self._most, self._threads + free))

    def _compute_with(self, threads: int) -> None:
        self._threads = threads
        torch.set_num_threads(threads)


def _idle_seconds() -> float:
    """For how long the cores that this process may use have been idle, all together."""
    ours = {f"cpu{number}" for number in os.sched_getaffinity(0)}
    lines = (line.split() for line in _PROC_STAT.read_text(encoding="ascii").splitlines())
    return sum(int(line[4]) for line in lines if line[0] in ours) / _TICKS_PER_SECOND
