"""How OpenMP's spinning fares alone, and beside one process that keeps a core busy.

Each setting of GOMP_SPINCOUNT gets a process of its own (it is read when torch loads), which
loads the checkpoint, warms up, and then speaks in turn alone and beside a busy neighbour. All
speak the same: same checkpoint, seed, length, steps, threads. What differs is the setting.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from app.server import PROCESS_DEFAULTS

DEFAULT = PROCESS_DEFAULTS["GOMP_SPINCOUNT"]
# None: as libgomp has it. The others from "hardly spins" to "spins for long".
SPIN_COUNTS: tuple[str | None, ...] = (None, "1000", DEFAULT, "20000")


@dataclass(frozen=True)
class Plan:
    """How much to measure: steps of the model an answer, and rounds (alone, then beside)."""

    steps: int
    rounds: int


def measure(checkpoint: Path, plan: Plan) -> list[dict[str, Any]]:
    """One row per setting: median milliseconds per step, alone and beside."""
    rows = []
    for spin_count in SPIN_COUNTS:
        measured = _child(checkpoint, plan, spin_count)
        alone, beside = (median(measured[key]) for key in ("alone", "beside"))
        print(f"GOMP_SPINCOUNT {spin_count or 'unset'}: {alone:.0f} / {beside:.0f} ms", flush=True)
        rows.append(
            {
                "GOMP_SPINCOUNT": spin_count or "unset",
                "default": spin_count == DEFAULT,
                "alone_ms_per_step": round(alone, 1),
                "beside_ms_per_step": round(beside, 1),
                "slower_beside": round(beside / alone, 2),
                "all_ms_per_step": measured,
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| GOMP_SPINCOUNT | alone, ms a step | beside a busy process | times slower beside |",
        "|---|---|---|---|",
    ]
    for row in rows:
        name = row["GOMP_SPINCOUNT"] + (" (the server's default)" if row["default"] else "")
        figures = f"{row['alone_ms_per_step']} | {row['beside_ms_per_step']}"
        lines.append(f"| {name} | {figures} | {row['slower_beside']} |")
    return "\n".join(lines)


def _child(checkpoint: Path, plan: Plan, spin_count: str | None) -> dict[str, list[float]]:
    environment = {key: value for key, value in os.environ.items() if key != "GOMP_SPINCOUNT"}
    environment["TQDM_DISABLE"] = "1"
    if spin_count is not None:
        environment["GOMP_SPINCOUNT"] = spin_count
    command = [sys.executable, "-m", "bench.speaking", str(checkpoint)]
    command += [str(plan.steps), str(plan.rounds)]
    done = subprocess.run(
        command, env=environment, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    measured: dict[str, list[float]] = json.loads(done.stdout.splitlines()[-1])
    return measured
