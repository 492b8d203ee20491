"""`make bench`: our engine and the official library side by side, on checkpoints of random weights.

The checkpoints have the shapes of the published models (1.6, 1.9 and 5 GB); they are built once in
the user's cache directory. Run it on an otherwise idle machine: anything else at work spoils the
figures. `--openmp` measures settings of OpenMP instead.
"""

import argparse
import json
import platform
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from app.backends.tts.voxcpm.layout import read_layout
from bench import openmp
from bench.comparison import FAIRNESS, TABLE_HEAD, Comparison, Plan
from bench.quantization import quantization_error
from tests.checkpoints import ARCHITECTURES, Architecture, Size, build_checkpoint

CACHE = Path.home() / ".cache" / "bawabah-bench"
OUTPUT = Path("bench") / "output"


@dataclass
class Report:
    """What the run has found so far, and the file that holds it."""

    path: Path
    values: dict[str, Any] = field(default_factory=dict)

    def save(self) -> None:
        """Write it, so that a run that is stopped leaves what it has."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.values, indent=1), encoding="utf-8")


def main() -> None:
    """Measure, print the tables, write the JSON."""
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny checkpoints and one round")
    parser.add_argument("--only", choices=ARCHITECTURES, help="one of the models")
    parser.add_argument("--rounds", type=int, help="how often each measurement is made")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--openmp", action="store_true", help="measure GOMP_SPINCOUNT instead")
    arguments = parser.parse_args()
    machine = {
        "cores": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    print(machine)
    if arguments.openmp:
        _measure_openmp(machine, quick=arguments.quick)
        return
    print(FAIRNESS + "\n")
    report = Report(
        OUTPUT / "engine.json", {"machine": machine, "dtype": arguments.dtype, "fair": FAIRNESS}
    )
    began = perf_counter()
    for architecture in [arguments.only] if arguments.only else ARCHITECTURES:
        _compare(architecture, arguments, report)
    print(f"\n{perf_counter() - began:.0f} seconds in all")


def _compare(architecture: Architecture, arguments: argparse.Namespace, report: Report) -> None:
    size: Size = "tiny" if arguments.quick else "full"
    checkpoint = _checkpoint(architecture, size, arguments.dtype)
    whole = architecture == "voxcpm-0.5b"
    rounds = arguments.rounds or (1 if arguments.quick else 3 if whole else 2)
    patches = 8 if arguments.quick else 40 if whole else 20
    layout = read_layout(checkpoint)
    print(f"\n{architecture}, {size}, {arguments.dtype}, {patches} patches\n\n{TABLE_HEAD}")
    rows: dict[str, Any] = {}
    report.values[architecture] = rows

    def save() -> None:
        rows["rows"] = [row.as_json() for row in comparison.rows]
        report.save()

    plan = Plan(patches, rounds, whole)
    comparison = Comparison(checkpoint, layout, arguments.dtype, plan, save)
    comparison.run()
    if whole:
        comparison.run_quantized()
        rows["int8-lm error"] = quantization_error(checkpoint)
        print("\nint8-lm against bfloat16:", rows["int8-lm error"])
        report.save()


def _measure_openmp(machine: dict[str, Any], *, quick: bool) -> None:
    plan = openmp.Plan(steps=10, rounds=2) if quick else openmp.Plan(steps=4, rounds=3)
    checkpoint = _checkpoint("voxcpm-0.5b", "tiny" if quick else "full", "bfloat16")
    rows = openmp.measure(checkpoint, plan)
    print(openmp.table(rows))
    Report(OUTPUT / "openmp.json", {"machine": machine, "plan": vars(plan), "rows": rows}).save()


def _checkpoint(architecture: Architecture, size: Size, dtype: str) -> Path:
    """A checkpoint whose config.json and weights are of `dtype`: the library goes by it."""
    directory = CACHE / f"{architecture}-{size}-{dtype}"
    if not (directory / "config.json").exists():
        print(f"building {directory}")
        build_checkpoint(directory, architecture, size=size, dtype=dtype)
    # Into the page cache, so that whoever loads first is not the slower for it.
    for path in directory.iterdir():
        with path.open("rb") as file:
            while file.read(1 << 24):
                pass
    return directory


if __name__ == "__main__":
    main()
