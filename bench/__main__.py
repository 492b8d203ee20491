"""`make bench`: our engine and the official library side by side, on checkpoints of random weights.

The checkpoints have the shapes of the published models (1.6, 1.9 and 5 GB); they are built once in
the user's cache directory. Run it on an otherwise idle machine: anything else at work spoils the
figures. `--openmp` measures settings of OpenMP instead.
"""

import argparse
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from time import perf_counter, strftime
from typing import Any

import torch

from bench import openmp
from bench.checkpoints import MODELS, checkpoint
from bench.children import ChildError
from bench.comparison import FAIRNESS, Comparison, Plan
from bench.quantization import quantization_error
from bench.rows import TABLE_HEAD, Report, Row, table
from tests.checkpoints import Architecture, Size

OUTPUT = Path("bench") / "output"
_LIBRARIES = ("torch", "voxcpm", "transformers", "tokenizers", "numpy")


def main() -> None:
    """Measure, print the tables, write the JSON."""
    arguments = _arguments()
    machine = {
        "threads": torch.get_num_threads(),
        "cpu": _cpu_name(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "memory_gb": round(_memory_bytes() / 1e9, 1),
        "system": platform.platform(),
    }
    versions = {name: version(name) for name in _LIBRARIES} | {"python": platform.python_version()}
    facts = {"machine": machine, "versions": versions, "quick": arguments.quick}
    print(f"{machine}\n{versions}\n", flush=True)
    if arguments.openmp:
        _measure_openmp(facts, quick=arguments.quick)
        return
    print("\n".join(f"- {line}" for line in FAIRNESS), flush=True)
    facts |= {"dtype": arguments.dtype, "fairness": FAIRNESS, "started": strftime("%F %T %z")}
    name = "engine-quick.json" if arguments.quick else "engine.json"
    report = Report(OUTPUT / name, facts | {"models": {}})
    began = perf_counter()
    tables = []
    for architecture in [MODELS[arguments.only]] if arguments.only else MODELS.values():
        try:
            tables.append(_compare(architecture, arguments, report))
        except ChildError as error:
            sys.exit(f"\n{error}")
    report.values["total_seconds"] = round(perf_counter() - began, 1)
    report.save()
    print("\n".join(["", *tables]))
    print(f"{report.values['total_seconds']:.0f} seconds in all; all rounds: {report.path}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny checkpoints and one round")
    parser.add_argument("--only", choices=MODELS, help="one of the models")
    parser.add_argument("--rounds", type=int, help="how often each measurement is made")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--openmp", action="store_true", help="measure GOMP_SPINCOUNT instead")
    arguments = parser.parse_args()
    if arguments.rounds is not None and arguments.rounds < 1:
        parser.error("--rounds must be 1 or more")
    return arguments


def _plan(architecture: Architecture, arguments: argparse.Namespace) -> Plan:
    whole = architecture == "voxcpm-0.5b"
    rounds = arguments.rounds or (1 if arguments.quick else 3)
    if not whole:
        rounds = max(1, rounds - 1)
    return Plan(8 if arguments.quick else 40 if whole else 20, rounds, whole)


def _compare(architecture: Architecture, arguments: argparse.Namespace, report: Report) -> str:
    """Measure one model; the table."""
    size: Size = "tiny" if arguments.quick else "full"
    directory = checkpoint(architecture, size, arguments.dtype)
    plan = _plan(architecture, arguments)
    title = (
        f"{architecture}, {size}, {arguments.dtype}, {plan.patches} patches, {plan.rounds} rounds"
    )
    print(f"\n{title}\n\n{TABLE_HEAD}", flush=True)
    found: dict[str, Any] = {"size": size} | vars(plan)
    report.values["models"][architecture] = found

    def note(row: Row) -> None:
        print(row.as_markdown(), flush=True)
        found.update(comparison.facts)
        found["rows"] = {key: row.as_json() for key, row in comparison.rows.items()}
        report.save()

    comparison = Comparison(directory, arguments.dtype, plan, note)
    comparison.run()
    error = ""
    if plan.whole:
        comparison.run_dependent()
        comparison.run_quantized()
        found["int8_error"] = quantization_error(directory)
        report.save()
        error = f"int8-lm against bfloat16: {found['int8_error'] or '-'}\n"
        print(f"\n{error}", flush=True)
    return f"{title}\n\n{table(list(comparison.rows.values()))}\n\n{error}"


def _measure_openmp(facts: dict[str, Any], *, quick: bool) -> None:
    plan = openmp.Plan(steps=10, rounds=2) if quick else openmp.Plan(steps=4, rounds=3)
    directory = checkpoint("voxcpm-0.5b", "tiny" if quick else "full", "bfloat16")
    rows = openmp.measure(directory, plan)
    print(openmp.table(rows))
    Report(OUTPUT / "openmp.json", facts | {"plan": vars(plan), "rows": rows}).save()


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _memory_bytes() -> int:
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemTotal"))


if __name__ == "__main__":
    main()
