"""The cache of models: one load, leases, unloading, retries, memory, idleness."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from app.domain.models import ModelState
from app.errors import (
    ModelLoadingError,
    ModelNotFoundError,
    ModelUnavailableError,
    ShuttingDownError,
)
from app.services.catalog import Catalog
from app.services.downloads import Downloads
from app.services.model_loader import LoaderLimits, ModelLoader
from app.stores.weights import WeightStore
from tests.fakes import Loads, SilentBackend
from tests.servers import make_settings

pytestmark = pytest.mark.anyio

MakeLoader = Callable[..., ModelLoader]


@pytest.fixture
def loads() -> Loads:
    return Loads()


@pytest.fixture
def make_loader(tmp_path: Path, loads: Loads) -> MakeLoader:
    """Loaders over three local models `a`, `b` and `c`, of 60 bytes of weights each."""

    def make(**limits: float | None) -> ModelLoader:
        directories = {name: tmp_path / name for name in "abc"}
        for directory in directories.values():
            directory.mkdir(exist_ok=True)
            (directory / "weights.bin").write_bytes(bytes(60))
        settings = make_settings(
            tmp_path, tts={"model_name": "a"}, models={"directories": directories}
        )
        store = WeightStore(tmp_path / "cache")
        return ModelLoader(
            Catalog(settings),
            Downloads(store, lambda _: SilentBackend.required_files, retry_seconds=0.05),
            describe=SilentBackend.describe,
            load=loads,
            limits=LoaderLimits(**limits),
        )

    return make


async def hold(loader: ModelLoader, name: str, until: asyncio.Event) -> None:
    async with loader.lease(name):
        await until.wait()


async def test_twenty_first_callers_cause_one_load(make_loader: MakeLoader, loads: Loads) -> None:
    loads.seconds = 0.05
    loader = make_loader()

    async def use() -> SilentBackend:
        async with loader.lease("a") as backend:
            return backend

    backends = await asyncio.gather(*(use() for _ in range(20)))

    assert loads.count == 1
    assert len(set(map(id, backends))) == 1
    assert loader.status("a").state is ModelState.READY


async def test_an_unknown_name_is_not_found(make_loader: MakeLoader, loads: Loads) -> None:
    loader = make_loader()
    with pytest.raises(ModelNotFoundError):
        async with loader.lease("nobody/nothing"):
            pass
    assert loads.count == 0


async def test_a_failed_load_is_retried_only_after_a_while(
    make_loader: MakeLoader, loads: Loads
) -> None:
    loads.failures = 1
    loader = make_loader(retry_seconds=0.1)

    with pytest.raises(ModelUnavailableError, match="damaged") as first:
        async with loader.lease("a"):
            pass
    with pytest.raises(ModelUnavailableError):
        async with loader.lease("a"):
            pass
    assert loads.count == 1
    assert first.value.retry_after_seconds == 1
    assert loader.status("a").state is ModelState.FAILED
    assert loader.status("a").reason == "its weights are damaged"

    await asyncio.sleep(0.11)
    async with loader.lease("a"):
        assert loader.status("a").state is ModelState.READY
    assert loads.count == 2


async def test_many_waiting_on_a_failing_load_cause_no_second_one(
    make_loader: MakeLoader, loads: Loads
) -> None:
    loads.seconds, loads.failures = 0.05, 1
    loader = make_loader(retry_seconds=0.0)

    async def use() -> str:
        try:
            async with loader.lease("a"):
                return "lent"
        except ModelUnavailableError:
            return "refused"

    assert await asyncio.gather(*(use() for _ in range(5))) == ["refused"] * 5
    assert loads.count == 1


async def test_unloading_waits_for_the_last_lease(make_loader: MakeLoader, loads: Loads) -> None:
    loader = make_loader()
    done = asyncio.Event()
    user = asyncio.create_task(hold(loader, "a", done))
    while loader.status("a").state is not ModelState.READY:
        await asyncio.sleep(0.001)

    status = await loader.unload("a")

    assert status.state is ModelState.UNLOADING
    assert not loads.loaded[0].closed
    done.set()
    await user
    await asyncio.sleep(0.01)
    assert loads.loaded[0].closed
    assert loader.status("a").state is ModelState.ABSENT


async def test_a_request_during_unloading_gets_the_model_again(
    make_loader: MakeLoader, loads: Loads
) -> None:
    loader = make_loader()
    done = asyncio.Event()
    user = asyncio.create_task(hold(loader, "a", done))
    await asyncio.sleep(0.01)
    unloading = asyncio.create_task(loader.unload("a"))
    await asyncio.sleep(0.01)
    late = asyncio.create_task(hold(loader, "a", done))
    await asyncio.sleep(0.01)
    assert loads.count == 1

    done.set()
    await asyncio.gather(user, unloading, late)

    assert loads.count == 2
    assert [one.closed for one in loads.loaded] == [True, False]


async def test_a_slow_load_is_waited_for_up_to_the_bound(
    make_loader: MakeLoader, loads: Loads
) -> None:
    loads.seconds = 0.2
    loader = make_loader(load_timeout_seconds=0.05)
    with pytest.raises(ModelLoadingError) as refused:
        async with loader.lease("a"):
            pass
    assert refused.value.retry_after_seconds
    await asyncio.sleep(0.2)
    async with loader.lease("a"):
        pass
    assert loads.count == 1


async def test_a_caller_who_leaves_does_not_stop_the_load(
    make_loader: MakeLoader, loads: Loads
) -> None:
    loads.seconds = 0.05
    loader = make_loader()
    impatient = asyncio.create_task(hold(loader, "a", asyncio.Event()))
    await asyncio.sleep(0.01)
    impatient.cancel()
    await asyncio.gather(impatient, return_exceptions=True)
    async with loader.lease("a"):
        pass
    assert loads.count == 1


async def test_memory_is_made_by_unloading_the_least_recently_used(
    make_loader: MakeLoader, loads: Loads
) -> None:
    loader = make_loader(memory_budget_bytes=250)
    for name in ("a", "b", "a", "c"):
        async with loader.lease(name):
            await asyncio.sleep(0.002)

    states = {name: loader.status(name).state for name in "abc"}

    assert states == {"a": ModelState.READY, "b": ModelState.ABSENT, "c": ModelState.READY}


async def test_a_model_in_use_is_not_taken_for_its_memory(
    make_loader: MakeLoader, loads: Loads
) -> None:
    loader = make_loader(memory_budget_bytes=150)
    async with loader.lease("a"):
        with pytest.raises(ModelUnavailableError, match="in use"):
            async with loader.lease("b"):
                pass
        assert not loads.loaded[0].closed


async def test_a_model_larger_than_the_budget_is_refused(make_loader: MakeLoader) -> None:
    loader = make_loader(memory_budget_bytes=50)
    with pytest.raises(ModelUnavailableError, match="MODEL_MEMORY_BUDGET_BYTES"):
        async with loader.lease("a"):
            pass


async def test_an_idle_model_is_unloaded_and_a_used_one_is_not(
    make_loader: MakeLoader, loads: Loads
) -> None:
    loader = make_loader(idle_timeout_seconds=0.08)
    loader.start()
    done = asyncio.Event()
    user = asyncio.create_task(hold(loader, "a", done))
    async with loader.lease("b"):
        pass
    await asyncio.sleep(0.2)
    assert loader.status("a").state is ModelState.READY
    assert loader.status("b").state is ModelState.ABSENT
    done.set()
    await user
    await loader.close()


async def test_closing_frees_every_model_and_lends_no_more(
    make_loader: MakeLoader, loads: Loads
) -> None:
    loader = make_loader()
    loader.start(preload=("a", "b"))
    while loader.is_preparing("a") or loader.is_preparing("b"):
        await asyncio.sleep(0.001)

    await loader.close()

    assert [one.closed for one in loads.loaded] == [True, True]
    with pytest.raises(ShuttingDownError):
        async with loader.lease("c"):
            pass
