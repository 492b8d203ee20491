"""The weight store against a stand-in hub: whole fetches, and finding what is on disk.

Every fetch here runs the real child process with the hub's own client; only the hub is ours.
"""

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest
from huggingface_hub import snapshot_download

from app.domain.models import DirectorySource, EmbeddedSource, HubSource, ModelSpec
from app.stores.weights import WeightsError, WeightsNotFoundError, WeightStore
from tests.stand_in_hub import StandInHub
from tests.unit.stores.weight_cases import (
    FILE_SIZES,
    NEEDED_BYTES,
    REQUIRED,
    SPEC,
    UNNEEDED_SIZES,
    Progress,
    assert_whole,
    leftovers,
    model_hub,
)


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


# --- Fetching ---


@pytest.mark.anyio
async def test_fetch_brings_what_a_model_needs_and_reports_progress(
    hub: StandInHub, store: WeightStore, cache: Path
) -> None:
    hub.faults.bytes_per_second = 1_500_000
    progress = Progress()
    assert store.locate(SPEC, REQUIRED) is None
    directory = await store.fetch(SPEC, progress)
    assert store.locate(SPEC, REQUIRED) == directory
    assert_whole(hub, directory)
    assert not {name for name in UNNEEDED_SIZES if (directory / name).exists()}
    assert set(hub.bytes_sent) <= set(FILE_SIZES)
    assert progress.reports[0] < NEEDED_BYTES / 2
    assert len(progress.reports) > 3
    assert progress.reports[-1] == NEEDED_BYTES
    assert leftovers(cache) == []


@pytest.mark.anyio
async def test_a_second_fetch_downloads_nothing(hub: StandInHub, store: WeightStore) -> None:
    directory = await store.fetch(SPEC, Progress())
    hub.forget()
    progress = Progress()
    assert await store.fetch(SPEC, progress) == directory
    assert hub.gets.total() == 0
    assert progress.reports == [NEEDED_BYTES]


@pytest.mark.anyio
async def test_two_fetches_at_once_download_once(
    hub: StandInHub, store: WeightStore, cache: Path
) -> None:
    hub.faults.bytes_per_second = 1_500_000
    async with anyio.create_task_group() as group:
        group.start_soon(store.fetch, SPEC, Progress())
        group.start_soon(WeightStore(cache).fetch, SPEC, Progress())
    assert hub.total_sent == NEEDED_BYTES
    assert store.locate(SPEC, REQUIRED) is not None


@pytest.mark.anyio
async def test_a_commit_serves_as_revision(hub: StandInHub, store: WeightStore) -> None:
    spec = ModelSpec("org/name", "voxcpm", HubSource("org/name", hub.commit))
    directory = await store.fetch(spec, Progress())
    assert store.locate(spec, REQUIRED) == directory
    assert store.locate(SPEC, REQUIRED) is None  # nothing is known of "main"


@pytest.mark.anyio
async def test_a_moved_revision_is_fetched_anew_and_shares_what_did_not_change(
    hub: StandInHub, store: WeightStore
) -> None:
    before = await store.fetch(SPEC, Progress())
    (hub.directory / "config.json").write_bytes(b"x" * FILE_SIZES["config.json"])
    hub.reload()
    hub.forget()
    assert store.locate(SPEC, REQUIRED) == before
    after = await store.fetch(SPEC, Progress())
    assert store.locate(SPEC, REQUIRED) == after != before
    assert_whole(hub, after)
    assert set(hub.gets) == {"config.json"}


@pytest.mark.anyio
async def test_the_token_goes_to_the_hub_alone(
    hub: StandInHub, store: WeightStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    await store.fetch(SPEC, Progress())
    assert hub.tokens == {"hub": {"Bearer hf_secret"}, "cdn": {None}}


# --- Finding ---


def test_a_cache_filled_by_the_official_client_is_located(
    hub: StandInHub, store: WeightStore, cache: Path
) -> None:
    directory = snapshot_download("org/name", cache_dir=cache, endpoint=hub.url)
    assert store.locate(SPEC, REQUIRED) == Path(directory)


@pytest.mark.anyio
async def test_the_official_client_finds_what_was_fetched(
    hub: StandInHub, store: WeightStore, cache: Path
) -> None:
    directory = await store.fetch(SPEC, Progress())
    found = snapshot_download("org/name", cache_dir=cache, endpoint=hub.url, local_files_only=True)
    assert Path(found) == directory


def test_an_incomplete_snapshot_is_not_located(
    hub: StandInHub, store: WeightStore, cache: Path
) -> None:
    directory = snapshot_download(
        "org/name", cache_dir=cache, endpoint=hub.url, allow_patterns=["*.json", "model.*"]
    )
    assert store.locate(SPEC, REQUIRED) is None
    assert store.locate(SPEC, REQUIRED[:3]) == Path(directory)
    shutil.rmtree(Path(directory).parents[1] / "blobs")  # links that lead nowhere
    assert store.locate(SPEC, REQUIRED[:3]) is None


def test_a_directory_is_located_when_it_is_complete(store: WeightStore, tmp_path: Path) -> None:
    spec = ModelSpec("local/mine", "voxcpm", DirectorySource(tmp_path))
    for name in ("config.json", "tokenizer.json", "pytorch_model.bin"):
        (tmp_path / name).touch()
    assert store.locate(spec, REQUIRED) is None
    (tmp_path / "audiovae.pth").touch()
    assert store.locate(spec, REQUIRED) == tmp_path


@pytest.mark.anyio
async def test_sources_without_a_download(store: WeightStore, tmp_path: Path) -> None:
    embedded = ModelSpec("hibari/heart", "hibari", EmbeddedSource())
    local = ModelSpec("local/mine", "voxcpm", DirectorySource(tmp_path))
    with pytest.raises(TypeError):
        store.locate(embedded, REQUIRED)
    with pytest.raises(TypeError):
        await store.fetch(local, Progress())


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("repository", "revision"),
    [("org/name", "../../secret"), ("../secret", "main"), ("org/name", ""), ("a/b/c", "main")],
)
async def test_names_cannot_leave_the_cache(
    store: WeightStore, repository: str, revision: str
) -> None:
    spec = ModelSpec("x", "voxcpm", HubSource(repository, revision))
    assert store.locate(spec, REQUIRED) is None
    with pytest.raises(WeightsNotFoundError):
        await store.fetch(spec, Progress())


@pytest.mark.anyio
@pytest.mark.parametrize("output", ["nonsense", '{"event": "surprise"}', "[" * 200_000, ""])
async def test_a_child_that_does_not_keep_to_the_protocol_is_a_failure(
    store: WeightStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str
) -> None:
    monkeypatch.setattr(sys, "executable", str(write_program(tmp_path, output)))
    with pytest.raises(WeightsError, match="download of the model failed"):
        await store.fetch(SPEC, Progress())


def write_program(directory: Path, output: str) -> Path:
    (directory / "output").write_text(output)
    program = directory / "program"
    program.write_text(f'#!/bin/sh\ncat "{directory}/output"\n')
    program.chmod(0o700)
    return program
