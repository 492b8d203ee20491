"""One thread of its own for a model, called from the event loop.

Model libraries want to load, run and close on the same thread, one job at a time (compiled graphs
are tied to it, caches are shared between calls). Jobs run in the order in which they were given.
"""

import asyncio
import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


class WorkCancelledError(Exception):
    """Raised inside a job, by its own `Cancellation`, when nobody waits for the result any more."""


class Cancellation:
    """Tells a running job that its caller has gone."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def cancel(self) -> None:
        """Ask the job to stop."""
        self._event.set()

    def check(self) -> None:
        """Call between two steps. Raises WorkCancelledError once the caller has gone."""
        if self._event.is_set():
            raise WorkCancelledError


class WorkerThread:
    """A thread that runs one job after the other until it is closed."""

    def __init__(self, name: str) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        # A daemon: a job that never ends must not keep the process from exiting.
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    async def run(self, job: Callable[[Cancellation], T]) -> T:
        """Run `job` on the thread and wait for it. Cancelling the call cancels the job."""
        loop = asyncio.get_running_loop()
        result: asyncio.Future[T] = loop.create_future()
        cancellation = Cancellation()

        def deliver(setter: Callable[[Any], None], value: Any) -> None:
            if not result.done():
                setter(value)

        # In a list that can be cleared: the queue must not keep a job, and its recordings, for a
        # caller who has left.
        jobs = [job]
        del job

        def work() -> None:
            try:
                cancellation.check()
                value = jobs[0](cancellation)
            except WorkCancelledError:
                return
            except BaseException as error:  # noqa: BLE001 - carried over to the caller
                # A future takes no StopIteration, and nothing may end the thread.
                usual = isinstance(error, Exception) and not isinstance(error, StopIteration)
                carried = error if usual else RuntimeError(type(error).__name__)
                _call_soon(loop, deliver, result.set_exception, carried)
            else:
                _call_soon(loop, deliver, result.set_result, value)

        self._jobs.put(work)
        try:
            return await result
        finally:
            cancellation.cancel()
            jobs.clear()

    async def close(self, *, timeout_seconds: float = 10.0) -> None:
        """Finish what is queued and end the thread; give up waiting after `timeout_seconds`."""
        self._jobs.put(None)
        await asyncio.to_thread(self._thread.join, timeout_seconds)

    def _run(self) -> None:
        while (work := self._jobs.get()) is not None:
            work()
            del work  # with it the last result, which may be large


def _call_soon(loop: asyncio.AbstractEventLoop, *call: Any) -> None:
    """Hand a result to the loop; a loop that has closed meanwhile has nobody waiting in it."""
    if not loop.is_closed():
        loop.call_soon_threadsafe(*call)
