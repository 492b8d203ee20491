"""A child's main program: `python -m bench.sides SIDE DIRECTORY DTYPE QUANTIZATION`.

It says that it is there, and then does what it is told, one JSON line on stdin for one on stdout,
and waits in between, so that rounds of both sides can alternate.
"""

import argparse
import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import voxcpm  # noqa: F401 - imported on both sides, before any clock starts

from bench.engine_side import EngineSide
from bench.library_side import LibrarySide
from bench.work import Reply


def main() -> None:
    """Serve until stdin ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("side", choices=["library", "engine"])
    parser.add_argument("directory", type=Path)
    parser.add_argument("dtype")
    parser.add_argument("variant", choices=["plain", "int8-lm", "batch-dependent"])
    arguments = parser.parse_args()
    # Replies go where stdout was; whatever else is printed goes with the errors.
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    asyncio.run(_serve(arguments, replies))


async def _serve(arguments: argparse.Namespace, replies: Any) -> None:
    side: LibrarySide | EngineSide
    if arguments.side == "library":
        side = LibrarySide(arguments.directory)
    else:
        side = EngineSide(arguments.directory, arguments.dtype, arguments.variant)
    facts = {
        "threads": torch.get_num_threads(),
        "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT"),
    }
    print(json.dumps(facts), file=replies, flush=True)
    # In a thread, so that the event loop can tidy up behind what was cancelled.
    while line := await asyncio.to_thread(sys.stdin.readline):
        print(json.dumps(await _answer(side, json.loads(line))), file=replies, flush=True)
    if isinstance(side, EngineSide):
        await side.close()


async def _answer(side: LibrarySide | EngineSide, order: dict[str, Any]) -> Reply:
    what = order.pop("do")
    if what == "memory":
        return {"bytes": _peak_memory_bytes()}
    answer: Reply = await getattr(side, what)(**order)
    return answer


def _peak_memory_bytes() -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


if __name__ == "__main__":
    main()
