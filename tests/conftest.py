"""Fixtures shared by all tests: no hub, tiny checkpoints, and servers with and without them."""

import os

# Before anything imports the hub's client: no test may leave this machine.
os.environ["HF_ENDPOINT"] = "http://127.0.0.1:9"
os.environ["TQDM_DISABLE"] = "1"
# The tiny models gain nothing from a second thread, and lose much when another process is busy.
os.environ["OMP_NUM_THREADS"] = "1"

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.checkpoints import Architecture, build_checkpoint
from tests.recordings import make_recording
from tests.servers import Running, make_settings, serving

ARCHITECTURES: dict[Architecture, int] = {
    "voxcpm-0.5b": 16_000,
    "voxcpm-1.5": 44_100,
    "voxcpm2": 48_000,
}

# These servers outlive a test, and must not find the hub that another test stands in.
NO_RETRY: dict[str, object] = {"download_retry_seconds": 1e6}


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """The event loop that the server runs on."""
    return "asyncio"


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny checkpoint of each architecture, by its name; generation runs to `max_seconds`."""
    root = tmp_path_factory.mktemp("checkpoints")
    return {name: build_checkpoint(root / name, name) for name in ARCHITECTURES}


@pytest.fixture(scope="session")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server as a newcomer has it: nothing on disk, no hub in reach."""
    settings = make_settings(tmp_path_factory.mktemp("bare"), models=NO_RETRY)
    with serving(settings) as server:
        server.wait_until("/health/ready", lambda answer: answer.status_code == 200)
        yield server


@pytest.fixture(scope="session")
def voxcpm(
    tmp_path_factory: pytest.TempPathFactory, checkpoints: dict[str, Path]
) -> Iterator[Running]:
    """A server with the three tiny checkpoints as `tiny/<architecture>`; the 0.5B is default."""
    settings = make_settings(
        tmp_path_factory.mktemp("voxcpm"),
        tts={"model_name": "tiny/voxcpm-0.5b"},
        models=NO_RETRY
        | {"directories": {f"tiny/{name}": path for name, path in checkpoints.items()}},
    )
    with serving(settings) as server:
        yield server


@pytest.fixture(scope="session")
def recording() -> bytes:
    """Two seconds of a voice-like tone as a WAV file."""
    return make_recording(2.0, 16_000, "wav", 1)
