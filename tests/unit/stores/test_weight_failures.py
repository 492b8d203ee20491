"""The weight store against a stand-in hub: broken, killed, damaged and refused transfers.

Every fetch here runs the real child process with the hub's own client; only the hub is ours.
"""

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest

from app.stores.weights import (
    HubUnreachableError,
    WeightsError,
    WeightsIntegrityError,
    WeightsNotFoundError,
    WeightStore,
)
from tests.stand_in_hub import Faults, StandInHub, closed_port
from tests.unit.stores.weight_cases import (
    FILE_SIZES,
    NEEDED_BYTES,
    REQUIRED,
    SPEC,
    WEIGHTS,
    Progress,
    assert_whole,
    leftovers,
    model_hub,
    wait_until,
)

# What a socket takes from the sender may never reach a reader who is gone.
IN_FLIGHT_BYTES = 200_000
PROJECT = Path(__file__).parents[3]
PARENT = """
import asyncio, pathlib, sys
from app.domain.models import HubSource, ModelSpec
from app.stores.weights import WeightStore
store = WeightStore(pathlib.Path(sys.argv[1]))
spec = ModelSpec("org/name", "voxcpm", HubSource("org/name"))
asyncio.run(store.fetch(spec, lambda done, total: print(done, flush=True)))
"""

on_linux = pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks at processes in /proc")


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandInHub]:
    with model_hub(tmp_path, monkeypatch) as hub:
        yield hub


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def store(cache: Path) -> WeightStore:
    return WeightStore(cache)


async def fetch_until(store: WeightStore, done_bytes: int) -> None:
    """Fetch, and cancel when so many bytes are on disk."""
    with anyio.CancelScope() as scope:

        def cancel_when_reached(done: int) -> None:
            if done >= done_bytes:
                scope.cancel()

        await store.fetch(SPEC, Progress(when=cancel_when_reached))
    assert scope.cancelled_caught


def children_of(pid: int) -> set[int]:
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return {int(child) for task in tasks for child in task.read_text().split()}


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# --- Interrupted ---


@pytest.mark.anyio
@pytest.mark.parametrize("hard", [False, True], ids=["ended", "reset"])
async def test_a_broken_transfer_resumes(hub: StandInHub, store: WeightStore, hard: bool) -> None:
    hub.faults.cut_after, hub.faults.cuts_left, hub.faults.cut_hard = 400_000, 2, hard
    directory = await store.fetch(SPEC, Progress())
    assert_whole(hub, directory)
    assert hub.gets[WEIGHTS] == 3
    # A reset discards what the receiver had not read yet; an orderly end loses nothing.
    assert hub.bytes_sent[WEIGHTS] <= FILE_SIZES[WEIGHTS] + (800_000 if hard else 0)


@pytest.mark.anyio
async def test_a_hub_without_ranges_sends_the_whole_file_again(
    hub: StandInHub, store: WeightStore
) -> None:
    hub.faults.cut_after, hub.faults.cuts_left = 400_000, 1
    hub.faults.ignore_range = True
    assert_whole(hub, await store.fetch(SPEC, Progress()))


@pytest.mark.anyio
async def test_a_cancelled_fetch_leaves_no_process_and_is_continued(
    hub: StandInHub, store: WeightStore
) -> None:
    hub.faults.bytes_per_second = 1_000_000
    await fetch_until(store, 500_000)
    wait_until(lambda: hub.active == 0, 1)
    assert store.locate(SPEC, REQUIRED) is None
    hub.faults.bytes_per_second = None
    progress = Progress()
    directory = await store.fetch(SPEC, progress)
    assert_whole(hub, directory)
    assert progress.reports[0] >= 500_000
    assert hub.total_sent <= NEEDED_BYTES + IN_FLIGHT_BYTES
    assert hub.gets["config.json"] == 1


@on_linux
@pytest.mark.anyio
async def test_the_child_is_gone_when_the_cancellation_arrives(
    hub: StandInHub, store: WeightStore
) -> None:
    hub.faults.bytes_per_second = 500_000
    fetching = asyncio.create_task(store.fetch(SPEC, Progress()))
    await anyio.to_thread.run_sync(wait_until, lambda: hub.active > 0, 5)
    children = children_of(os.getpid())
    assert children
    fetching.cancel()
    await anyio.lowlevel.checkpoint()
    fetching.cancel()  # an impatient caller
    with pytest.raises(asyncio.CancelledError):
        await fetching
    assert not any(is_running(child) for child in children)


@on_linux
def test_a_killed_parent_takes_the_child_along_and_the_next_one_continues(
    hub: StandInHub, store: WeightStore, cache: Path
) -> None:
    hub.faults.bytes_per_second = 1_000_000
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, str(cache)], cwd=PROJECT, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        for line in parent.stdout:
            if int(line) >= 500_000:
                break
        children = children_of(parent.pid)
        hub.faults.bytes_per_second = 50_000  # the rest would take ten seconds
        parent.kill()
    assert children
    wait_until(lambda: not any(is_running(child) for child in children), 2)
    wait_until(lambda: hub.active == 0, 1)
    hub.faults.bytes_per_second = None
    progress = Progress()
    assert_whole(hub, asyncio.run(store.fetch(SPEC, progress)))
    assert progress.reports[0] >= 500_000
    assert hub.total_sent <= NEEDED_BYTES + IN_FLIGHT_BYTES
    assert leftovers(cache) == []


# --- Damaged ---


@pytest.mark.anyio
@pytest.mark.parametrize("fault", [{"truncate_to": 300_000}, {"corrupt": True}], ids=str)
async def test_damaged_files_are_refused_and_fetched_anew(
    hub: StandInHub, store: WeightStore, cache: Path, fault: dict[str, int]
) -> None:
    for name, value in fault.items():
        setattr(hub.faults, name, value)
    with pytest.raises(WeightsIntegrityError) as caught:
        await store.fetch(SPEC, Progress())
    assert str(cache) not in caught.value.reason
    assert store.locate(SPEC, REQUIRED) is None
    assert leftovers(cache) == []
    hub.faults = Faults()
    directory = await store.fetch(SPEC, Progress())
    assert_whole(hub, directory)
    assert store.locate(SPEC, REQUIRED) == directory


@pytest.mark.anyio
async def test_a_file_that_ends_early_when_continued_is_refused(
    hub: StandInHub, store: WeightStore
) -> None:
    hub.faults.cut_after, hub.faults.cuts_left = 300_000, 1
    hub.faults.truncate_to = 400_000
    with pytest.raises(WeightsIntegrityError):
        await store.fetch(SPEC, Progress())
    assert store.locate(SPEC, REQUIRED) is None


@pytest.mark.anyio
async def test_a_fetch_heals_a_damaged_cache(hub: StandInHub, store: WeightStore) -> None:
    directory = await store.fetch(SPEC, Progress())
    (directory / "audiovae.pth").resolve().write_bytes(b"cut short")
    (directory / "tokenizer.json").unlink()
    hub.forget()
    assert_whole(hub, await store.fetch(SPEC, Progress()))
    assert set(hub.gets) == {"audiovae.pth"}


# --- Refused ---


async def fails(store: WeightStore, error: type[WeightsError], within_seconds: float) -> None:
    started = time.monotonic()
    with pytest.raises(error) as caught:
        await store.fetch(SPEC, Progress())
    assert time.monotonic() - started < within_seconds
    assert caught.value.reason
    assert "/" not in caught.value.reason


@pytest.mark.anyio
async def test_a_refused_connection_is_known_at_once(
    store: WeightStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closed_port() as url:
        monkeypatch.setenv("HF_ENDPOINT", url)
        await fails(store, HubUnreachableError, 4)


@pytest.mark.anyio
async def test_an_unknown_host_is_known_at_once(
    store: WeightStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.invalid")
    await fails(store, HubUnreachableError, 7)


@pytest.mark.anyio
async def test_a_silent_hub_is_given_up_after_the_timeout(hub: StandInHub, cache: Path) -> None:
    hub.faults.silent = True
    await fails(WeightStore(cache, hub_timeout_seconds=0.5), HubUnreachableError, 4)


@pytest.mark.anyio
async def test_a_refusing_proxy_means_unreachable(
    hub: StandInHub, store: WeightStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.invalid")
    monkeypatch.setenv("HTTPS_PROXY", hub.url)  # answers CONNECT with an error
    await fails(store, HubUnreachableError, 4)


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("kind", "status", "code", "error"),
    [
        ("api_error", 401, "RepoNotFound", WeightsNotFoundError),
        ("api_error", 404, "RevisionNotFound", WeightsNotFoundError),
        ("api_error", 503, "", HubUnreachableError),
        ("file_error", 403, "GatedRepo", WeightsNotFoundError),
    ],
)
async def test_refusals_have_their_own_errors(
    hub: StandInHub,
    store: WeightStore,
    kind: str,
    status: int,
    code: str,
    error: type[WeightsError],
) -> None:
    setattr(hub.faults, kind, (status, code))
    await fails(store, error, 4)
    assert store.locate(SPEC, REQUIRED) is None


@pytest.fixture
def blocked_cache(cache: Path) -> Path:
    cache.write_text("a file, not a directory")
    return cache


@pytest.mark.anyio
async def test_a_cache_that_cannot_be_written_is_reported(blocked_cache: Path) -> None:
    with pytest.raises(WeightsError, match="cannot be written"):
        await WeightStore(blocked_cache).fetch(SPEC, Progress())
