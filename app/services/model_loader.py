"""The cache of loaded models, by name: filled on first use, one load per name, leased while used.

    absent > downloading > loading > ready > unloading > absent
    (failed: the last download or load did not succeed; the next request after a while retries)

A model in use is never taken away: unloading waits for its leases. Every change is made between
two awaits, so what was checked still holds when it is changed.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from time import monotonic

from app.backends.base import BackendLoadError, TTSBackend
from app.domain.models import Capabilities, ModelSpec, ModelState, ModelStatus
from app.errors import ModelLoadingError, ModelUnavailableError, ShuttingDownError
from app.services.catalog import Catalog
from app.services.downloads import Downloads

logger = logging.getLogger(__name__)

_ASK_AGAIN_SECONDS = 5
_UNLOAD_PATIENCE_SECONDS = 1.0
_CLOSE_PATIENCE_SECONDS = 15.0

Describe = Callable[[ModelSpec, Path | None], Capabilities | None]
Load = Callable[[ModelSpec, Path | None], Awaitable[TTSBackend]]


@dataclass(frozen=True, slots=True)
class LoaderLimits:
    """Bounds of the cache. None means without a bound."""

    load_timeout_seconds: float = 120.0
    retry_seconds: float = 10.0
    memory_budget_bytes: int | None = None
    idle_timeout_seconds: float | None = None


@dataclass(eq=False)
class _Entry:
    """One model's place in the cache."""

    spec: ModelSpec
    backend: TTSBackend | None = None
    loading: asyncio.Task[None] | None = None
    unloading: asyncio.Task[None] | None = None
    leases: int = 0
    free: asyncio.Event = field(default_factory=asyncio.Event)
    last_used: float = 0.0
    reserved_bytes: int = 0
    reason: str | None = None
    retry_at: float = 0.0


class ModelLoader:
    """Loads, lends and unloads models. Lives on one event loop."""

    def __init__(
        self,
        catalog: Catalog,
        downloads: Downloads,
        *,
        describe: Describe,
        load: Load,
        limits: LoaderLimits,
    ) -> None:
        self.catalog = catalog
        self.downloads = downloads
        self._describe = describe
        self._load = load
        self._limits = limits
        self._entries: dict[str, _Entry] = {}
        self._capabilities: dict[str, Capabilities] = {}
        self._wanted: dict[str, asyncio.Task[None]] = {}
        self._idle_watch: asyncio.Task[None] | None = None
        self._closed = False

    # -- asking -----------------------------------------------------------------------------

    def status(self, name: str) -> ModelStatus:
        """The model at this moment. Raises ModelNotFoundError."""
        spec = self.catalog.spec(name)
        on_disk = self.downloads.on_disk(spec)
        state, reason, progress = self._state(spec, on_disk=on_disk)
        return ModelStatus(spec, state, on_disk, progress, reason, self.capabilities(name))

    def statuses(self) -> list[ModelStatus]:
        """Every known model, the default first."""
        return [self.status(spec.name) for spec in self.catalog.specs()]

    def capabilities(self, name: str) -> Capabilities | None:
        """What the model can do; None while nobody can know. Raises ModelNotFoundError."""
        known = self._capabilities.get(name)
        if known is not None:
            return known
        spec = self.catalog.spec(name)
        directory = self.downloads.locate(spec)
        try:
            found = self._describe(spec, directory)
        except BackendLoadError:
            return None  # loading it says why
        if found is not None and self.downloads.on_disk(spec):
            self._capabilities[name] = found
        return found

    def _state(
        self, spec: ModelSpec, *, on_disk: bool
    ) -> tuple[ModelState, str | None, float | None]:
        entry = self._entries.get(spec.name)
        download = self.downloads.of(spec)
        if entry and entry.unloading:
            return ModelState.UNLOADING, None, None
        if entry and entry.backend:
            return ModelState.READY, None, None
        if entry and (entry.loading or (on_disk and self.is_preparing(spec.name))):
            return ModelState.LOADING, None, None
        if entry and entry.reason:
            return ModelState.FAILED, entry.reason, None
        if download.running and not on_disk:
            return ModelState.DOWNLOADING, download.reason, download.share
        if download.reason and not on_disk:
            return ModelState.FAILED, download.reason, None
        return ModelState.ABSENT, None, None

    # -- using ------------------------------------------------------------------------------

    @asynccontextmanager
    async def lease(self, name: str) -> AsyncIterator[TTSBackend]:
        """Lend the loaded model; it stays loaded until the block ends.

        Loads it first if its weights are on disk, else starts their download and gives up.
        Raises ModelNotFoundError, ModelLoadingError, ModelUnavailableError, ShuttingDownError.
        """
        entry = self._entries.setdefault(name, _Entry(self.catalog.spec(name)))
        try:
            async with asyncio.timeout(self._limits.load_timeout_seconds):
                while entry.unloading:
                    await asyncio.wait({entry.unloading})
                # Taken before the load, so that nobody unloads what we are waiting for.
                entry.leases += 1
                entry.free.clear()
                try:
                    backend = entry.backend or await self._loaded(entry)
                except BaseException:
                    self._release(entry)
                    raise
        except TimeoutError:
            raise ModelLoadingError(
                "The model is not ready yet.", retry_after_seconds=_ASK_AGAIN_SECONDS
            ) from None
        try:
            yield backend
        finally:
            entry.last_used = monotonic()
            self._release(entry)

    def _release(self, entry: _Entry) -> None:
        entry.leases -= 1
        if not entry.leases:
            entry.free.set()

    async def _loaded(self, entry: _Entry) -> TTSBackend:
        """Wait for the one load of this model, which this begins if nobody has."""
        if self._closed:
            raise ShuttingDownError("The server is shutting down.", retry_after_seconds=5)
        if entry.loading is None:
            self._require_no_recent_failure(entry)
            self._begin_load(entry)
        if entry.loading:
            await asyncio.wait({entry.loading})  # which leaves the load alone if we are cancelled
        if entry.backend is None:
            raise self._unusable(entry)
        return entry.backend

    def _require_no_recent_failure(self, entry: _Entry) -> None:
        if entry.reason and monotonic() < entry.retry_at:
            raise self._unusable(entry)

    def _unusable(self, entry: _Entry) -> ModelUnavailableError:
        return ModelUnavailableError(
            f"The model cannot be used: {entry.reason or 'its load was stopped'}.",
            retry_after_seconds=max(1, ceil(entry.retry_at - monotonic())),
        )

    # -- loading ----------------------------------------------------------------------------

    def start(self, *, preload: tuple[str, ...] = ()) -> None:
        """Begin what runs in the background: the default's download, preloads, the idle watch."""
        default = self.catalog.spec(self.catalog.default_name)
        if not self.downloads.on_disk(default):
            self.downloads.start(default)
            if self.catalog.fallback_name is not None:
                self.begin_loading(self.catalog.fallback_name)  # small, and about to be needed
        for name in preload:
            self.begin_loading(name)
        if self._limits.idle_timeout_seconds is not None:
            self._idle_watch = asyncio.create_task(
                self._watch_idle(self._limits.idle_timeout_seconds)
            )

    def begin_loading(self, name: str) -> ModelStatus:
        """Fetch and load the model in the background, at once even after a failure."""
        spec = self.catalog.spec(name)
        entry = self._entries.setdefault(name, _Entry(spec))
        entry.reason, entry.retry_at = None, 0.0
        if not self.downloads.on_disk(spec):
            self.downloads.start(spec)
        if not self.is_preparing(name):
            self._wanted[name] = asyncio.create_task(self._fetch_and_load(entry))
        return self.status(name)

    def is_preparing(self, name: str) -> bool:
        """Whether a `begin_loading` of this model is still under way."""
        wanted = self._wanted.get(name)
        return wanted is not None and not wanted.done()

    async def _fetch_and_load(self, entry: _Entry) -> None:
        await self.downloads.of(entry.spec).wait()
        try:
            async with self.lease(entry.spec.name):
                pass
        except (ModelLoadingError, ModelUnavailableError, ShuttingDownError) as error:
            logger.warning(
                "model not loaded", extra={"model": entry.spec.name, "reason": error.detail}
            )

    def _begin_load(self, entry: _Entry) -> None:
        """Start the one load of this model. Raises if its weights are not on disk."""
        spec = entry.spec
        if not self.downloads.on_disk(spec):
            raise self._not_on_disk(spec)
        entry.reason = None
        entry.loading = asyncio.create_task(self._load_into(entry))

    def _not_on_disk(self, spec: ModelSpec) -> ModelLoadingError | ModelUnavailableError:
        download = self.downloads.ensure(spec)
        if download.reason:
            return ModelUnavailableError(
                f"The model's weights cannot be had: {download.reason}. "
                "Put them on this server's disk, or name another model.",
                retry_after_seconds=download.seconds_until_retry,
            )
        return ModelLoadingError(
            "The model's weights are being downloaded.",
            retry_after_seconds=_ASK_AGAIN_SECONDS,
            progress=download.share,
        )

    async def _load_into(self, entry: _Entry) -> None:
        spec = entry.spec
        began = monotonic()
        try:
            await self._make_room(entry)
            entry.backend = await self._load(spec, self.downloads.locate(spec))
            await self._evict_down_to_budget()  # its true size is known only now
        except BackendLoadError as error:
            self._note_failure(entry, error.reason, cause=error.__cause__)
        except Exception as error:  # noqa: BLE001
            # Model libraries raise anything on a damaged checkpoint or a full memory.
            reason = "it could not be loaded; the server's log says why"
            self._note_failure(entry, reason, cause=error)
        else:
            entry.last_used = monotonic()
            seconds = round(monotonic() - began, 3)
            logger.info("model loaded", extra={"model": spec.name, "seconds": seconds})
        finally:
            entry.reserved_bytes = 0
            entry.loading = None

    def _note_failure(self, entry: _Entry, reason: str, *, cause: BaseException | None) -> None:
        entry.reason = reason
        entry.retry_at = monotonic() + self._limits.retry_seconds
        logger.warning(
            "model not loaded", extra={"model": entry.spec.name, "reason": reason}, exc_info=cause
        )

    async def _make_room(self, entry: _Entry) -> None:
        """Unload others until this model, as large as its files, fits into the memory budget."""
        budget = self._limits.memory_budget_bytes
        if budget is None:
            return
        entry.reserved_bytes = await asyncio.to_thread(self.downloads.size_bytes, entry.spec)
        if entry.reserved_bytes > budget:
            raise BackendLoadError("it needs more memory than MODEL_MEMORY_BUDGET_BYTES allows")
        await self._evict_down_to_budget()
        if self._used_bytes() > budget:
            raise BackendLoadError("the memory budget is taken by models that are in use")

    async def _evict_down_to_budget(self) -> None:
        """Unload the least recently used models that nobody leases, as many as it takes."""
        budget = self._limits.memory_budget_bytes
        while budget is not None and self._used_bytes() > budget:
            idle = [
                one
                for one in self._entries.values()
                if one.backend and not one.leases and not one.loading
            ]
            if not idle:
                return
            await self._unload(min(idle, key=lambda one: one.last_used))

    def _used_bytes(self) -> int:
        return sum(
            one.backend.memory_bytes if one.backend else one.reserved_bytes
            for one in self._entries.values()
        )

    # -- unloading --------------------------------------------------------------------------

    async def unload(self, name: str) -> ModelStatus:
        """Take the model out of memory once its leases end; waits for that for a moment only."""
        entry = self._entries.get(self.catalog.spec(name).name)
        if (wanted := self._wanted.pop(name, None)) is not None:
            wanted.cancel()  # a load that was asked for and still waits for its download
        if entry and (entry.backend or entry.loading):
            await asyncio.wait({self._begin_unload(entry)}, timeout=_UNLOAD_PATIENCE_SECONDS)
        elif entry:
            entry.reason = None
        return self.status(name)

    async def _unload(self, entry: _Entry) -> None:
        await asyncio.wait({self._begin_unload(entry)})

    def _begin_unload(self, entry: _Entry) -> asyncio.Task[None]:
        if entry.unloading is None:
            entry.unloading = asyncio.create_task(self._unload_when_free(entry))
        return entry.unloading

    async def _unload_when_free(self, entry: _Entry) -> None:
        try:
            if entry.loading:
                await asyncio.wait({entry.loading})
            if entry.leases:
                await entry.free.wait()
            if entry.backend:
                await entry.backend.close()
                logger.info("model unloaded", extra={"model": entry.spec.name})
        finally:
            # Both at once, and only now: until it is closed it takes its memory.
            entry.backend = entry.unloading = None

    async def _watch_idle(self, idle_timeout_seconds: float) -> None:
        while True:
            await asyncio.sleep(min(idle_timeout_seconds / 4, 5.0))
            now = monotonic()
            for entry in list(self._entries.values()):
                unused = now - entry.last_used > idle_timeout_seconds
                if entry.backend and not entry.leases and unused:
                    self._begin_unload(entry)

    async def close(self) -> None:
        """Stop downloads and loads, then free every model. Leases should have ended."""
        self._closed = True
        tasks = [*self._wanted.values(), *([self._idle_watch] if self._idle_watch else [])]
        tasks += [entry.loading for entry in self._entries.values() if entry.loading]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, self.downloads.close(), return_exceptions=True)
        for entry in self._entries.values():
            if entry.backend:
                await asyncio.wait({self._begin_unload(entry)}, timeout=_CLOSE_PATIENCE_SECONDS)
