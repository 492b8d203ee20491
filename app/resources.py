"""What the process owns while it serves: opened together, closed together, in one exit stack."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from app.backends.base import TTSBackend, TTSOptions
from app.backends.registry import tts_backend
from app.config import Settings
from app.domain.models import Capabilities, ModelSpec
from app.services.admission import Admission
from app.services.catalog import Catalog
from app.services.downloads import Downloads
from app.services.model_loader import LoaderLimits, ModelLoader
from app.stores.weights import WeightStore

_DECODERS = 2


@dataclass(frozen=True, slots=True)
class Resources:
    """Handed to every request."""

    settings: Settings
    models: ModelLoader
    admission: Admission
    decoding: asyncio.Semaphore  # uploads being decoded at once


@asynccontextmanager
async def open_resources(settings: Settings) -> AsyncIterator[Resources]:
    """Open everything and start what runs in the background; the reverse when the block ends."""
    async with AsyncExitStack() as stack:
        models = _model_loader(settings)
        stack.push_async_callback(models.close)
        models.start(preload=settings.models.preload)
        yield Resources(
            settings, models, Admission(settings.tts.max_queue), asyncio.Semaphore(_DECODERS)
        )


def _model_loader(settings: Settings) -> ModelLoader:
    options = TTSOptions(device=settings.tts.device, dtype=settings.tts.dtype)
    store = WeightStore(
        settings.models.cache_dir, hub_timeout_seconds=settings.models.hub_timeout_seconds
    )

    def required_files(spec: ModelSpec) -> tuple[tuple[str, ...], ...]:
        return tts_backend(spec.backend).required_files

    def describe(spec: ModelSpec, directory: Path | None) -> Capabilities | None:
        return tts_backend(spec.backend).describe(spec, directory)

    async def load(spec: ModelSpec, directory: Path | None) -> TTSBackend:
        return await tts_backend(spec.backend).load(spec, directory, options)

    return ModelLoader(
        Catalog(settings),
        Downloads(store, required_files, retry_seconds=settings.models.download_retry_seconds),
        describe=describe,
        load=load,
        limits=LoaderLimits(
            load_timeout_seconds=settings.models.load_timeout_seconds,
            retry_seconds=settings.models.retry_seconds,
            memory_budget_bytes=settings.models.memory_budget_bytes,
            idle_timeout_seconds=settings.models.idle_timeout_seconds,
        ),
    )
