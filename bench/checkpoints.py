"""The checkpoints that are measured: random weights, built once in the user's cache directory."""

import json
import os
import shutil
from pathlib import Path

from tests.checkpoints import Architecture, Size, build_checkpoint

CACHE = Path.home() / ".cache" / "bawabah-bench"
BUILT_DTYPE = "bfloat16"
# By the names of --only.
MODELS: dict[str, Architecture] = {"0.5b": "voxcpm-0.5b", "1.5": "voxcpm-1.5", "2": "voxcpm2"}


def checkpoint(architecture: Architecture, size: Size, dtype: str) -> Path:
    """A checkpoint whose config.json says `dtype`, which the library goes by; in the page cache."""
    built = CACHE / f"{architecture}-{size}-{BUILT_DTYPE}"
    if not (built / "config.json").exists():
        print(f"building {built}", flush=True)
        draft = _empty(built.with_name(built.name + ".part"))
        build_checkpoint(draft, architecture, size=size, dtype=BUILT_DTYPE)
        draft.replace(built)
    _read_into_page_cache(built)
    return built if dtype == BUILT_DTYPE else _of_other_dtype(built, architecture, size, dtype)


def size_bytes(directory: Path) -> int:
    """What the files of a checkpoint weigh together."""
    return sum(path.stat().st_size for path in directory.iterdir())


def _of_other_dtype(built: Path, architecture: Architecture, size: Size, dtype: str) -> Path:
    """The same files under links, with another config.json."""
    linked = _empty(CACHE / f"{architecture}-{size}-{BUILT_DTYPE}-as-{dtype}")
    for path in built.iterdir():
        if path.name != "config.json":
            os.link(path, linked / path.name)
    config = json.loads((built / "config.json").read_text(encoding="utf-8")) | {"dtype": dtype}
    (linked / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return linked


def _empty(directory: Path) -> Path:
    """A new directory, without what an interrupted run may have left in its place."""
    if directory.exists():
        shutil.rmtree(directory)
    directory.mkdir(parents=True)
    return directory


def _read_into_page_cache(directory: Path) -> None:
    """So that whoever loads first is not the slower for it."""
    for path in directory.iterdir():
        with path.open("rb") as file:
            while file.read(1 << 24):
                pass
