"""What the process owns while it serves: opened together, closed together, in one exit stack."""

from collections.abc import AsyncIterator
from concurrent.futures import Executor, ThreadPoolExecutor
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

_DECODER_THREADS = 2


@dataclass(frozen=True, slots=True)
class Resources:
    """Handed to every request."""

    settings: Settings
    models: ModelLoader
    admission: Admission
    decoders: Executor  # threads that decode uploads; few, for hostile files cost memory


@asynccontextmanager
async def open_resources(settings: Settings) -> AsyncIterator[Resources]:
    """Open everything and start what runs in the background; the reverse when the block ends."""
    async with AsyncExitStack() as stack:
        models = _model_loader(settings)
        stack.push_async_callback(models.close)
        models.start(preload=settings.models.preload)
        decoders = ThreadPoolExecutor(_DECODER_THREADS, thread_name_prefix="decoder")
        stack.callback(decoders.shutdown, wait=False, cancel_futures=True)
        yield Resources(settings, models, Admission(settings.tts.max_queue), decoders)


def _model_loader(settings: Settings) -> ModelLoader:
    tts = settings.tts
    options = TTSOptions(
        device=tts.device,
        dtype=tts.dtype,
        quantization=tts.quantization,
        batch_size=tts.batch_size,
        batch_invariant=tts.batch_invariant,
        voice_cache_bytes=tts.voice_cache_bytes,
        voice_cache_dir=tts.voice_cache_dir and tts.voice_cache_dir.expanduser(),
        voice_cache_disk_bytes=tts.voice_cache_disk_bytes,
    )
    store = WeightStore(
        settings.models.cache_dir.expanduser(),
        hub_timeout_seconds=settings.models.hub_timeout_seconds,
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
