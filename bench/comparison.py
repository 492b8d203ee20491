"""The measurements: the same work for the library and for our engine, round by round in turn."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.backends.tts.voxcpm.layout import read_layout
from bench.checkpoints import size_bytes
from bench.children import Child
from bench.disturbance import Disturbance
from bench.rows import SIDES, Row, Side
from bench.speaking import busy_neighbour
from bench.work import PROMPT_SECONDS

FAIRNESS = (
    "Same checkpoint, number format, threads, seed, steps (10) and guidance (2.0).",
    "Both make exactly the same number of patches (the numbers of samples are checked to be equal),"
    " from text to samples, without bad-case retries.",
    "Each side runs in a process of its own with the server's GOMP_SPINCOUNT and is warmed up; the"
    " rounds alternate, and the other side's process sleeps meanwhile.",
    "The library serves requests one after the other: two in turn are measured, and its audio per"
    " second is the same for any number of them.",
    "First audio is the first chunk of a stream, one patch on both sides.",
    "Memory is each process's peak (VmHWM). The engine's at the end includes 16 requests at once,"
    " the library's one at a time; after single requests both have done the same.",
    "Loading is timed with libraries imported and the files in the page cache.",
    "Figures are medians of the rounds. Where other processes took more than a twentieth of the"
    " cores, the row says so: they slow the library much more than the engine.",
)
BATCHES = (2, 4, 8, 16)
_OTHERS = 4
_FIRST_AUDIO_PATCHES = 8
# A side's peak over the bytes of a bfloat16 checkpoint (the library first builds it in float32).
_MEMORY_FACTOR = 1.6
_MEMORY_RESERVE_BYTES = 2 << 30
_CLONE_PREFILL_NOTE = "first audio with a voice used before, less first audio without one"


@dataclass(frozen=True)
class Plan:
    """How much to measure. Lengths are in patches; `whole` measures everything."""

    patches: int
    rounds: int
    whole: bool


class Comparison:
    """All measurements of one checkpoint; `found` is called after each."""

    def __init__(
        self, checkpoint: Path, dtype: str, plan: Plan, found: Callable[[Row], None]
    ) -> None:
        self.rows: dict[str, Row] = {}
        self.facts: dict[str, Any] = {}
        self._checkpoint = checkpoint
        self._dtype = dtype
        self._plan = plan
        self._found = found
        self._patch_seconds = read_layout(checkpoint).patch_seconds
        self._samples: dict[str, int] = {}
        self._children: list[Child] = []

    def run(self) -> None:
        """Measure what the plan asks for; one side after the other if memory is short."""
        together = self.fits_twice()
        self.facts["rounds_alternate"] = together
        if not together:
            print("Memory is short: all of the library, then all of the engine.\n", flush=True)
        for group in [SIDES] if together else [(side,) for side in SIDES]:
            with ExitStack() as stack:
                sides = {side: stack.enter_context(self._child(side)) for side in group}
                self._measure(sides)

    def run_quantized(self) -> None:
        """The engine with int8 weights in the language models, in the engine's column."""
        patches = self._plan.patches
        single = self._row("int8_single", "int8-lm: one request", "s")
        batch = self._row("int8_batch_8", "int8-lm: 8 at once", "audio s per s", more=True)
        peak = self._row("int8_peak_rss_mb", "int8-lm: peak memory", "MB")
        peak.note = "of 8 at once"
        with self._child("engine", "int8-lm") as engine:
            engine.ask("load")
            self._warm_up(engine)
            for _ in range(self._plan.rounds):
                single.add("engine", self._speak(engine, patches)["seconds"])
            self._tell(single)
            for _ in range(self._plan.rounds):
                batch.add("engine", self._throughput(engine, 8))
            self._tell(batch)
            self._note_memory(peak, {"engine": engine})

    def run_dependent(self) -> None:
        """Many at once by the engine without the promise that a batch changes nobody's bits."""
        with self._child("engine", "batch-dependent") as engine:
            engine.ask("load")
            self._warm_up(engine)
            for requests in (8, 16):
                key, title = f"dependent_{requests}", f"not batch-invariant: {requests} at once"
                row = self._row(key, title, "audio s per s", more=True)
                row.note = "TTS_BATCH_INVARIANT=false"
                for library in self.rows[f"batch_{requests}"].rounds.get("library", []):
                    row.add("library", library)
                for _ in range(self._plan.rounds):
                    row.add("engine", self._throughput(engine, requests))
                self._tell(row)

    def fits_twice(self) -> bool:
        """Whether memory holds both sides at once."""
        factor = _MEMORY_FACTOR * (2 if self._dtype == "float32" else 1)
        needed = 2 * factor * size_bytes(self._checkpoint) + _MEMORY_RESERVE_BYTES
        return needed < _available_memory_bytes()

    def _measure(self, sides: dict[Side, Child]) -> None:
        self._load(sides)
        for child in sides.values():
            self._warm_up(child)
        self._single(sides)
        self._vae_share(sides)
        title = "peak memory after single requests"
        self._note_memory(self._row("peak_rss_single_mb", title, "MB"), sides)
        self._batches(sides)
        self._first_audio(sides)
        if self._plan.whole:
            self._first_audio_busy(sides)
            self._cloning(sides)
            self._single_beside(sides)
        self._note_memory(self._row("peak_rss_mb", "peak memory", "MB"), sides)
        if self._plan.whole:
            self._load_again(sides)

    def _load(self, sides: dict[Side, Child]) -> None:
        row = self._row("load_seconds", "load", "s")
        row.note = "in a new process"
        for side, child in sides.items():
            row.add(side, child.ask("load")["seconds"])
        self._tell(row)

    def _load_again(self, sides: dict[Side, Child]) -> None:
        """The further rounds of loading, after memory has been looked at."""
        row = self.rows["load_seconds"]
        for _ in range(self._plan.rounds - 1):
            for side, child in sides.items():
                row.add(side, child.ask("load")["seconds"])
        if self._plan.rounds > 1:
            row.note = "once in a new process, then in one that has let go of the model"
            self._tell(row)

    def _warm_up(self, child: Child) -> None:
        child.ask("single", patches=4)
        child.ask("together", patches=4, requests=2)
        child.ask("first_audio", patches=4)
        child.disturbance = Disturbance()

    def _single(self, sides: dict[Side, Child]) -> None:
        seconds = self._row("single", "one request", "s")
        factor = self._row("single_rtf", "one request, real-time factor", "s per audio s")
        patches = self._plan.patches
        for _ in range(self._plan.rounds):
            for side, child in sides.items():
                spent = self._speak(child, patches)["seconds"]
                seconds.add(side, spent)
                factor.add(side, spent / self._audio_seconds(patches))
        self._tell(seconds, factor)

    def _vae_share(self, sides: dict[Side, Child]) -> None:
        row = self._row("vae_share", "share of the audio decoder in one request", "%")
        for side, child in sides.items():
            share = child.ask("vae_share", patches=self._plan.patches // 2)["share"]
            if share is not None:
                row.add(side, 100 * share)
        self._tell(row)

    def _batches(self, sides: dict[Side, Child]) -> None:
        sizes = BATCHES if self._plan.whole else (8,)
        rows = {
            size: self._row(f"batch_{size}", f"{size} at once", "audio s per s", more=True)
            for size in sizes
        }
        for _ in range(self._plan.rounds):
            if "library" in sides:
                in_turn = self._throughput(sides["library"], 2)
                for row in rows.values():
                    row.add("library", in_turn)
            if "engine" in sides:
                for size, row in rows.items():
                    row.add("engine", self._throughput(sides["engine"], size))
        for size, row in rows.items():
            row.note = "" if size == 2 else "the library's is derived from 2 in turn"
        self._tell(*rows.values())

    def _first_audio(self, sides: dict[Side, Child]) -> None:
        row = self._row("first_audio_idle", "first audio of a stream", "ms")
        for _ in range(self._plan.rounds):
            for side, child in sides.items():
                row.add(side, self._first(child, "first_audio"))
        self._tell(row)

    def _first_audio_busy(self, sides: dict[Side, Child]) -> None:
        title = f"first audio with {_OTHERS} other streams running"
        row = self._row("first_audio_busy", title, "ms")
        row.note = "the library's is not measured: it waits for what is left of those in front"
        if "engine" in sides:
            for _ in range(self._plan.rounds):
                milliseconds = self._first(sides["engine"], "first_audio_busy", others=_OTHERS)
                row.add("engine", milliseconds)
        self._tell(row)

    def _cloning(self, sides: dict[Side, Child]) -> None:
        title = f"first audio in a voice of {PROMPT_SECONDS} s"
        rows = [
            self._row("clone_first", f"{title}, first use", "ms"),
            self._row("clone_repeated", f"{title}, used before", "ms"),
        ]
        for child in sides.values():
            child.ask("clone_first_audio", patches=2, variant=self._plan.rounds)
        for variant in range(self._plan.rounds):
            for side, child in sides.items():
                for row in rows:
                    row.add(side, self._first(child, "clone_first_audio", variant=variant))
        self._tell(*rows)
        prefill = self._row("clone_prefill", "of which reading the prompt", "ms")
        prefill.note = _CLONE_PREFILL_NOTE
        again, idle = (self.rows[key] for key in ("clone_repeated", "first_audio_idle"))
        if "engine" in sides:
            prefill.add("engine", (again.median("engine") or 0) - (idle.median("engine") or 0))
        self._tell(prefill)

    def _single_beside(self, sides: dict[Side, Child]) -> None:
        row = self._row("single_beside", "one request beside a busy process", "s per audio s")
        row.note = "to be compared with the real-time factor of one request"
        patches = self._plan.patches // 2
        for _ in range(self._plan.rounds):
            for side, child in sides.items():
                with busy_neighbour():
                    spent = self._speak(child, patches)["seconds"]
                row.add(side, spent / self._audio_seconds(patches))
        self._tell(row, disturbed_on_purpose=True)

    def _note_memory(self, row: Row, sides: dict[Side, Child]) -> None:
        for side, child in sides.items():
            row.add(side, child.ask("memory")["bytes"] / 1e6)
        self._tell(row)

    def _speak(self, child: Child, patches: int) -> dict[str, Any]:
        reply = child.ask("single", patches=patches)
        self._check(f"{patches} patches", reply["samples"])
        return reply

    def _throughput(self, child: Child, requests: int) -> float:
        """Seconds of audio that are made per second."""
        patches = self._plan.patches
        reply = child.ask("together", patches=patches, requests=requests)
        self._check(f"{patches} patches", reply["samples"] / requests)
        return requests * self._audio_seconds(patches) / reply["seconds"]

    def _first(self, child: Child, what: str, **further: Any) -> float:
        """Milliseconds until the first chunk of a stream."""
        reply = child.ask(what, patches=_FIRST_AUDIO_PATCHES, **further)
        self._check("first chunk", reply["samples"])
        return 1_000 * float(reply["seconds"])

    def _check(self, what: str, samples: float) -> None:
        """Both sides, and every round, must have made the same number of samples."""
        expected = self._samples.setdefault(what, int(samples))
        if samples != expected:
            raise RuntimeError(f"not the same work: {what} were {expected} and {samples} samples")

    def _tell(self, *rows: Row, disturbed_on_purpose: bool = False) -> None:
        """Rows that are complete, and all that has been measured since the last ones."""
        measured = Disturbance()
        for child in self._children:
            measured.others_seconds += child.disturbance.others_seconds
            measured.measured_seconds += child.disturbance.measured_seconds
            child.disturbance = Disturbance()
        for row in rows:
            if not disturbed_on_purpose:
                row.others_share = max(row.others_share, measured.share())
                row.disturbed |= measured.is_notable()
            self._found(row)

    def _row(self, key: str, title: str, unit: str, *, more: bool = False) -> Row:
        return self.rows.setdefault(key, Row(key, title, unit, more_is_better=more))

    def _child(self, side: Side, variant: str = "plain") -> Child:
        child = Child(side, self._checkpoint, self._dtype, variant)
        self._children.append(child)
        expected = self.facts.setdefault("processes", child.facts)
        if child.facts != expected:
            raise RuntimeError(f"not the same conditions: {expected} and {child.facts}")
        return child

    def _audio_seconds(self, patches: int) -> float:
        return patches * self._patch_seconds


def _available_memory_bytes() -> int:
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
