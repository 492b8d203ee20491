"""The thread that a model lives on."""

import asyncio
import gc
import threading
import weakref

import pytest

from app.backends.worker import Cancellation, WorkerThread

pytestmark = pytest.mark.anyio


async def test_jobs_run_in_order_on_one_thread() -> None:
    worker = WorkerThread("test")
    ran: list[tuple[int, str]] = []

    def job(number: int) -> int:
        ran.append((number, threading.current_thread().name))
        return number

    results = await asyncio.gather(*(worker.run(lambda _, n=n: job(n)) for n in range(10)))

    assert results == list(range(10))
    assert ran == [(n, "test") for n in range(10)]
    await worker.close()


async def test_an_error_reaches_the_caller_and_the_thread_goes_on() -> None:
    worker = WorkerThread("test")

    def fail(_: Cancellation) -> None:
        raise ValueError("wrong")

    with pytest.raises(ValueError, match="wrong"):
        await worker.run(fail)
    assert await worker.run(lambda _: 7) == 7
    await worker.close()


async def test_a_caller_who_leaves_stops_the_job_at_its_next_step() -> None:
    worker = WorkerThread("test")
    steps = 0
    stepped = threading.Event()
    go_on = threading.Event()

    def job(caller: Cancellation) -> None:
        nonlocal steps
        for _ in range(1_000):
            caller.check()
            steps += 1
            stepped.set()
            go_on.wait(5)

    call = asyncio.create_task(worker.run(job))
    await asyncio.to_thread(stepped.wait, 5)
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    go_on.set()
    await worker.run(lambda _: None)

    assert steps == 1
    await worker.close()


async def test_a_job_whose_caller_left_before_its_turn_never_runs() -> None:
    worker = WorkerThread("test")
    busy = threading.Event()
    ran = []
    first = asyncio.create_task(worker.run(lambda _: busy.wait(5)))
    await asyncio.sleep(0.01)
    second = asyncio.create_task(worker.run(lambda _: ran.append("second")))
    await asyncio.sleep(0.01)
    second.cancel()
    await asyncio.gather(second, return_exceptions=True)
    busy.set()
    await first
    await worker.run(lambda _: None)

    assert ran == []
    await worker.close()


async def test_what_a_caller_left_behind_is_not_kept() -> None:
    class Recording:
        pass

    worker = WorkerThread("test")
    busy = threading.Event()
    first = asyncio.create_task(worker.run(lambda _: busy.wait(5)))
    await asyncio.sleep(0.01)
    recording = Recording()
    kept = weakref.ref(recording)
    left = asyncio.create_task(worker.run(lambda _, held=recording: id(held)))
    await asyncio.sleep(0.01)
    left.cancel()
    await asyncio.gather(left, return_exceptions=True)
    del recording, left
    gc.collect()

    assert kept() is None
    busy.set()
    await first
    await worker.close()


@pytest.mark.parametrize("error", [StopIteration, SystemExit])
async def test_no_error_hangs_the_caller_or_ends_the_thread(error: type[BaseException]) -> None:
    worker = WorkerThread("test")

    def fail(_: Cancellation) -> None:
        raise error

    with pytest.raises(RuntimeError, match=error.__name__):
        await worker.run(fail)
    assert await worker.run(lambda _: 7) == 7
    await worker.close()
