"""What the tests of the weight store share: a model on a stand-in hub, and progress."""

import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from app.domain.models import HubSource, ModelSpec
from tests.stand_in_hub import StandInHub

REQUIRED = [
    ("config.json",),
    ("tokenizer.json",),
    ("model.safetensors", "pytorch_model.bin"),
    ("audiovae.safetensors", "audiovae.pth"),
]
WEIGHTS = "model.safetensors"
FILE_SIZES = {
    "config.json": 900,
    "tokenizer.json": 60_000,
    "special_tokens_map.json": 0,
    "tokenization_voxcpm2.py": 500,
    "LICENSE": 1_000,
    WEIGHTS: 1_000_000,
    "audiovae.pth": 100_000,
}
UNNEEDED_SIZES = {
    ".gitattributes": 100,
    "README.md": 3_000,
    "assets/demo.wav": 20_000,
    "assets/logo.png": 5_000,
    "pytorch_model.bin": 1_000_000,
}
NEEDED_BYTES = sum(FILE_SIZES.values())
SPEC = ModelSpec("org/name", "voxcpm", HubSource("org/name"))


@contextmanager
def model_hub(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandInHub]:
    """A hub with one model, as the only hub that this process and its children know of."""
    for name in list(os.environ):
        if name.startswith("HF_") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    chance = random.Random(7)
    for name, size in (FILE_SIZES | UNNEEDED_SIZES).items():
        path = directory / "repository" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(chance.randbytes(size))
    with StandInHub(directory / "repository") as hub:
        monkeypatch.setenv("HF_HOME", str(directory / "home"))  # nobody's token
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        yield hub


@dataclass
class Progress:
    """Records what a fetch reports, and checks what must hold for every report."""

    reports: list[int] = field(default_factory=list)
    when: Callable[[int], None] = lambda _: None

    def __call__(self, done: int, total: int) -> None:
        assert total == NEEDED_BYTES
        assert (self.reports[-1] if self.reports else -1) < done <= total
        self.reports.append(done)
        self.when(done)


def assert_whole(hub: StandInHub, directory: Path) -> None:
    for name in FILE_SIZES:
        assert (directory / name).read_bytes() == hub.files[name].content


def leftovers(cache: Path) -> list[str]:
    return [path.name for path in cache.rglob("*") if path.suffix in {".incomplete", ".tmp"}]


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.02)
