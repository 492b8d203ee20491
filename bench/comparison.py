"""Our engine against the official library: the same work, round by round in turn."""

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Self

from app.backends.tts.voxcpm.layout import Layout
from app.server import PROCESS_DEFAULTS
from bench.speaking import busy_neighbour

FAIRNESS = (
    "Same checkpoint, number format, threads, seed, steps (10) and guidance (2.0); both make "
    "exactly the same number of patches, from text to samples, without bad-case retries; each "
    "side in a process of its own, warmed up, rounds in turn, the other side asleep. The library "
    "serves several requests one after the other: its time for n of them is n times that for one. "
    "Memory is each process's peak from start to end. Libraries are imported and files are in the "
    "page cache before loading is timed."
)
BATCHES = (2, 4, 8, 16)
_REPLY_SECONDS = 900.0


@dataclass(frozen=True)
class Plan:
    """How much to measure. Lengths are in patches; `whole` measures everything."""

    patches: int
    rounds: int
    whole: bool


class Child:
    """One side in its process."""

    def __init__(self, side: str, directory: Path, dtype: str, quantization: str = "none") -> None:
        command = [sys.executable, "-W", "ignore", "-m", "bench.sides", side, str(directory)]
        self._process = subprocess.Popen(
            [*command, dtype, quantization],
            env=PROCESS_DEFAULTS | os.environ,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._last_words: list[str] = []
        for pipe, use in (
            (self._process.stdout, self._lines.put),
            (self._process.stderr, self._remember),
        ):
            threading.Thread(target=_pump, args=(pipe, use), daemon=True).start()
        self.load_seconds: float = self._reply()["seconds"]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def ask(self, what: str, **arguments: Any) -> dict[str, Any]:
        """Have it do something; fails if it has died or does not answer."""
        assert self._process.stdin is not None
        print(json.dumps({"do": what} | arguments), file=self._process.stdin, flush=True)
        return self._reply()

    def _reply(self) -> dict[str, Any]:
        try:
            line = self._lines.get(timeout=_REPLY_SECONDS)
        except queue.Empty:
            line = ""
        if not line:
            raise RuntimeError("a side has failed:\n" + "".join(self._last_words[-30:]))
        reply: dict[str, Any] = json.loads(line)
        return reply

    def _remember(self, line: str) -> None:
        self._last_words.append(line)
        del self._last_words[:-100]


def _pump(pipe: Any, use: Callable[[str], object]) -> None:
    for line in pipe:
        use(line)
    use("")


@dataclass
class Row:
    """One measurement: all rounds of each side."""

    name: str
    unit: str
    library: list[float] = field(default_factory=list)
    engine: list[float] = field(default_factory=list)
    more_is_better: bool = False

    def as_json(self) -> dict[str, Any]:
        """With medians, and how many times better the engine is."""
        return vars(self) | {
            "library_median": median(self.library) if self.library else None,
            "engine_median": median(self.engine) if self.engine else None,
            "engine_times_better": self.ratio(),
        }

    def ratio(self) -> float | None:
        """How many times better the engine is than the library."""
        if not self.library or not self.engine:
            return None
        quotient = median(self.library) / median(self.engine)
        return 1 / quotient if self.more_is_better else quotient

    def as_markdown(self) -> str:
        """A row of the table."""
        figures = [
            f"{median(values):,.2f}" if values else "-" for values in (self.library, self.engine)
        ]
        ratio = self.ratio()
        times = f"{ratio:.2f}" if ratio else "-"
        return f"| {self.name} ({self.unit}) | {figures[0]} | {figures[1]} | {times} |"


TABLE_HEAD = "| | official library | engine | times better |\n|---|---|---|---|"


class Comparison:
    """All measurements of one checkpoint."""

    def __init__(
        self, checkpoint: Path, layout: Layout, dtype: str, plan: Plan, save: Callable[[], None]
    ) -> None:
        self.rows: list[Row] = []
        self._checkpoint = checkpoint
        self._layout = layout
        self._dtype = dtype
        self._plan = plan
        self._save = save

    def run(self) -> None:
        """Measure everything that the plan asks for."""
        with (
            Child("library", self._checkpoint, self._dtype) as library,
            Child("engine", self._checkpoint, self._dtype) as engine,
        ):
            loading = Row("load", "s", [library.load_seconds], [engine.load_seconds])
            for child in (library, engine):
                child.ask("single", patches=4)
            self._singles(library, engine)
            self._batches(engine)
            self._first_audio(library, engine)
            if self._plan.whole:
                self._cloning(library, engine)
                self._beside(library, engine)
            peaks = [child.ask("memory")["bytes"] / 1e6 for child in (library, engine)]
        self._add(loading)
        self._add(Row("peak resident memory", "MB", peaks[:1], peaks[1:]))

    def run_quantized(self) -> None:
        """The engine with int8 weights, in the column of the engine."""
        patches = self._plan.patches
        with Child("engine", self._checkpoint, self._dtype, "int8-lm") as engine:
            engine.ask("single", patches=4)
            single = Row("int8-lm: one request", "s")
            batch = Row("int8-lm: 8 at once", "audio s per s", more_is_better=True)
            for _ in range(self._plan.rounds):
                single.engine.append(engine.ask("single", patches=patches)["seconds"])
                seconds = engine.ask("together", patches=patches, requests=8)["seconds"]
                batch.engine.append(8 * patches * self._layout.patch_seconds / seconds)
            peak = engine.ask("memory")["bytes"] / 1e6
        for row in (single, batch, Row("int8-lm: peak resident memory", "MB", [], [peak])):
            self._add(row)

    def _add(self, row: Row) -> None:
        self.rows.append(row)
        print(row.as_markdown(), flush=True)
        self._save()

    def _singles(self, library: Child, engine: Child) -> None:
        patches = self._plan.patches
        seconds = Row("one request", "s")
        factor = Row("one request, real-time factor", "s per audio s")
        share = Row("share of the audio decoder", "%")
        for _ in range(self._plan.rounds):
            replies = [child.ask("single", patches=patches) for child in (library, engine)]
            assert replies[0]["samples"] == replies[1]["samples"], replies
            for reply, side in zip(replies, ("library", "engine"), strict=True):
                getattr(seconds, side).append(reply["seconds"])
                audio_seconds = patches * self._layout.patch_seconds
                getattr(factor, side).append(reply["seconds"] / audio_seconds)
                getattr(share, side).append(100 * reply["decode_share"])
        for row in (seconds, factor, share):
            self._add(row)

    def _batches(self, engine: Child) -> None:
        patches = self._plan.patches
        audio_seconds = patches * self._layout.patch_seconds
        alone = next(row for row in self.rows if row.name == "one request")
        for requests in BATCHES if self._plan.whole else (8,):
            row = Row(f"{requests} at once", "audio s per s", more_is_better=True)
            row.library = [audio_seconds / seconds for seconds in alone.library]
            for _ in range(self._plan.rounds):
                seconds = engine.ask("together", patches=patches, requests=requests)["seconds"]
                row.engine.append(requests * audio_seconds / seconds)
            self._add(row)

    def _first_audio(self, library: Child, engine: Child) -> None:
        row = Row("first audio of a stream", "ms")
        for _ in range(self._plan.rounds + 2):
            for child, side in ((library, row.library), (engine, row.engine)):
                side.append(1000 * child.ask("first_audio", patches=8)["seconds"])
        self._add(row)
        if self._plan.whole:
            busy = Row("first audio with 4 others running", "ms")
            for _ in range(self._plan.rounds + 2):
                reply = engine.ask("first_audio_busy", patches=8, others=4)
                busy.engine.append(1000 * reply["seconds"])
            self._add(busy)

    def _cloning(self, library: Child, engine: Child) -> None:
        first = Row("first audio, 10 s prompt, first use", "ms")
        again = Row("first audio, 10 s prompt, used before", "ms")
        reading = Row("of which reading the prompt", "ms")
        for variant in range(self._plan.rounds):
            for child, ours in ((library, False), (engine, True)):
                for row in (first, again):
                    reply = child.ask("clone_first_audio", patches=8, variant=variant)
                    (row.engine if ours else row.library).append(1000 * reply["seconds"])
                    if ours and row is again:
                        reading.engine.append(1000 * reply["read_seconds"])
        for row in (first, again, reading):
            self._add(row)

    def _beside(self, library: Child, engine: Child) -> None:
        """Alone and beside a busy process: the column says how many times slower beside."""
        row = Row("slower beside a busy process", "times")
        patches = self._plan.patches // 2
        for _ in range(self._plan.rounds):
            for child, side in ((library, row.library), (engine, row.engine)):
                alone = child.ask("single", patches=patches)["seconds"]
                with busy_neighbour():
                    beside = child.ask("single", patches=patches)["seconds"]
                side.append(beside / alone)
        self._add(row)
