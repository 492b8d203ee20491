"""Downloads of model weights in the background: one per model, retried while it is out of reach.

No request ever waits for one. What is on disk, how far a download is, and why the last try failed
can be asked at any time.
"""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from time import monotonic

from app.domain.models import EmbeddedSource, HubSource, ModelSpec
from app.stores.weights import (
    HubUnreachableError,
    WeightsError,
    WeightsNotFoundError,
    WeightStore,
)

logger = logging.getLogger(__name__)

_LONGEST_PAUSE_SECONDS = 3_600.0

RequiredFiles = Callable[[ModelSpec], tuple[tuple[str, ...], ...]]


@dataclass(eq=False)
class Download:
    """One model's download. `reason` is why the last try failed, until bytes flow again."""

    running: bool = False
    done_bytes: int = 0
    total_bytes: int = 0
    reason: str | None = None
    has_failed: bool = False  # stays true until the weights are complete
    failures: int = 0
    retry_at: float = 0.0
    task: asyncio.Task[None] | None = None
    retry_now: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def share(self) -> float:
        """Part of the bytes that are here, 0 to 1."""
        return min(1.0, self.done_bytes / self.total_bytes) if self.total_bytes else 0.0

    async def wait(self) -> None:
        """Until the weights are here or the hub has said that there are none."""
        if self.task:
            await asyncio.wait({self.task})

    @property
    def seconds_until_retry(self) -> int:
        """How long until the next try begins, at least 1."""
        return max(1, ceil(self.retry_at - monotonic()))


class Downloads:
    """Weights on their way to disk, and those that are there."""

    def __init__(
        self, store: WeightStore, required_files: RequiredFiles, *, retry_seconds: float
    ) -> None:
        self._store = store
        self._required_files = required_files
        self._retry_seconds = retry_seconds
        self._downloads: dict[str, Download] = {}

    def locate(self, spec: ModelSpec) -> Path | None:
        """The directory with the model's complete weights.

        None if they are not on disk, or if the model is embedded and has none.
        """
        if isinstance(spec.source, EmbeddedSource):
            return None
        return self._store.locate(spec, self._required_files(spec))

    def on_disk(self, spec: ModelSpec) -> bool:
        """Whether the model can be loaded without the network."""
        return isinstance(spec.source, EmbeddedSource) or self.locate(spec) is not None

    def size_bytes(self, spec: ModelSpec) -> int:
        """Bytes of the model's weights on disk, which is about what they take in memory."""
        directory = self.locate(spec)
        if directory is None:
            return 0
        groups = self._required_files(spec)
        found = [
            [directory / name for name in group if (directory / name).exists()] for group in groups
        ]
        return sum(files[0].stat().st_size for files in found if files)

    def of(self, spec: ModelSpec) -> Download:
        """How the model's download stands."""
        return self._downloads.setdefault(spec.name, Download())

    def start(self, spec: ModelSpec) -> Download:
        """See to it that the download is under way; one that waits for its next try goes now."""
        download = self.of(spec)
        if not isinstance(spec.source, HubSource):
            download.reason, download.has_failed = (
                "its directory holds no complete checkpoint",
                True,
            )
            return download
        download.retry_now.set()
        if download.task is None or download.task.done():
            download.running = True
            download.task = asyncio.create_task(self._run(spec, download))
        return download

    def ensure(self, spec: ModelSpec) -> Download:
        """See to it that there is a download, without hurrying one that waits for its next try."""
        download = self.of(spec)
        if not download.running and (download.reason is None or monotonic() >= download.retry_at):
            self.start(spec)
        return download

    async def close(self) -> None:
        """Stop every download; what is on disk is resumed at the next start."""
        tasks = [one.task for one in self._downloads.values() if one.task]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self, spec: ModelSpec, download: Download) -> None:
        """Try until the weights are here, or the hub says that there are none."""
        while True:
            download.running = True
            download.retry_now.clear()
            try:
                await self._store.fetch(spec, lambda *sizes: _note(download, *sizes))
            except WeightsError as error:
                self._note_failure(spec, download, error)
                if isinstance(error, WeightsNotFoundError):
                    return
            else:
                logger.info("model downloaded", extra={"model": spec.name})
                download.reason, download.has_failed = None, False
                return
            finally:
                download.running = False
            await _either(download.retry_now, download.retry_at - monotonic())
            if self.on_disk(spec):  # somebody brought them meanwhile
                download.reason, download.has_failed = None, False
                return

    def _note_failure(self, spec: ModelSpec, download: Download, error: WeightsError) -> None:
        download.reason, download.has_failed = error.reason, True
        download.failures += 1
        pause_seconds = self._retry_seconds
        if not isinstance(error, HubUnreachableError):
            # Bytes were transferred for nothing: do that ever more rarely.
            pause_seconds = min(_LONGEST_PAUSE_SECONDS, pause_seconds * 2**download.failures)
        download.retry_at = monotonic() + pause_seconds
        logger.warning("model download failed", extra={"model": spec.name, "reason": error.reason})


def _note(download: Download, done_bytes: int, total_bytes: int) -> None:
    download.done_bytes, download.total_bytes = done_bytes, total_bytes
    if done_bytes:
        download.reason = None


async def _either(event: asyncio.Event, seconds: float) -> None:
    """Wait for the event, but no longer than `seconds`."""
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return
