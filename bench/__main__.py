"""`make bench`: builds a full-size checkpoint of random weights once, and measures.

The checkpoint (VoxCPM-0.5B's shapes, about 1.6 GB) is kept in the user's cache directory and used
again. Run it on an otherwise idle machine: anything else at work spoils the figures.
"""

import argparse
import json
import platform
from pathlib import Path

import torch

from bench import openmp
from tests.checkpoints import build_checkpoint

CACHE = Path.home() / ".cache" / "bawabah-bench"
OUTPUT = Path("bench") / "output"


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(prog="make bench")
    parser.add_argument("--quick", action="store_true", help="a tiny checkpoint and few rounds")
    quick = parser.parse_args().quick
    plan = openmp.Plan(steps=10, rounds=2) if quick else openmp.Plan(steps=4, rounds=3)
    checkpoint = _checkpoint("tiny" if quick else "full")
    rows = openmp.measure(checkpoint, plan)
    machine = {
        "cores": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    print(f"VoxCPM-0.5B shapes, {'tiny' if quick else 'full size'}, {machine}\n")
    print(openmp.table(rows))
    OUTPUT.mkdir(parents=True, exist_ok=True)
    report = OUTPUT / "openmp.json"
    report.write_text(json.dumps({"machine": machine, "plan": vars(plan), "rows": rows}, indent=1))


def _checkpoint(size: str) -> Path:
    directory = CACHE / f"voxcpm-0.5b-{size}"
    if not (directory / "config.json").exists():
        print(f"building {directory}")
        build_checkpoint(directory, "voxcpm-0.5b", size=size)  # type: ignore[arg-type]
    return directory


if __name__ == "__main__":
    main()
