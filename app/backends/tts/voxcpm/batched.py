"""VoxCPM through our own engine: many requests at once, on one thread per model."""

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from app.backends.base import BackendLoadError, TTSOptions
from app.backends.tts.voxcpm import inputs
from app.backends.tts.voxcpm.layout import (
    REQUIRED_FILES,
    Layout,
    capabilities_of,
    read_layout,
)
from app.backends.worker import WorkerThread
from app.domain.audio import Samples
from app.domain.models import Capabilities, ModelSpec
from app.domain.speech import Speech, SpeechRequest

if TYPE_CHECKING:  # these import torch
    from app.backends.tts.voxcpm.engine.prompt import PromptReader
    from app.backends.tts.voxcpm.engine.scheduler import Scheduler

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Engine:
    """What the engine's thread has built. It is bound to that thread but for the scheduler."""

    reader: "PromptReader"
    scheduler: "Scheduler"
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class _End:
    """How an utterance ended."""

    bad_case: bool = False
    cut_off: bool = False
    error: Exception | None = None


@dataclass(slots=True, eq=False)
class _Ear:
    """Hands what the engine's thread says of one utterance to a task of the event loop."""

    loop: asyncio.AbstractEventLoop
    # Its bound is the longest speech that the model has room for.
    queue: asyncio.Queue[Samples | _End] = field(default_factory=asyncio.Queue)

    def heard(self, samples: Samples) -> None:
        self._say(samples)

    def finished(self, *, bad_case: bool, cut_off: bool) -> None:
        self._say(_End(bad_case, cut_off))

    def failed(self, error: Exception) -> None:
        self._say(_End(error=error))

    def _say(self, item: Samples | _End) -> None:
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.queue.put_nowait, item)


class BatchedBackend:
    """Our engine behind our promises."""

    required_files: ClassVar[tuple[tuple[str, ...], ...]] = REQUIRED_FILES

    def __init__(self, engine: _Engine, layout: Layout, thread: WorkerThread) -> None:
        self._engine = engine
        self._layout = layout
        self._thread = thread
        self._running = asyncio.create_task(thread.run(lambda _: engine.scheduler.run()))
        self._normalizer: Any = None
        self._normalizing = asyncio.Lock()
        self.memory_bytes = engine.memory_bytes

    @classmethod
    def describe(cls, spec: ModelSpec, directory: Path | None) -> Capabilities | None:
        """From config.json, or from what is known of the published models."""
        return capabilities_of(spec, directory)

    @classmethod
    async def load(cls, spec: ModelSpec, directory: Path | None, options: TTSOptions) -> Self:
        """Load the checkpoint on the thread that will use it."""
        if directory is None:
            raise BackendLoadError("it has no checkpoint directory")
        layout = read_layout(directory)
        thread = WorkerThread(spec.name)
        try:
            engine = await thread.run(lambda _: _build(directory, layout, options))
        except BaseException:
            await thread.close()
            raise
        return cls(engine, layout, thread)

    async def synthesize(self, request: SpeechRequest) -> Speech:
        """Speak together with whoever else is speaking."""
        sounds: list[Samples] = []
        bad_case = False
        async for item in self._hear(request, streamed=False):
            if isinstance(item, _End):
                bad_case = item.bad_case
            else:
                sounds.append(item)
        return Speech(np.concatenate(sounds), self._layout.sample_rate_hz, bad_case)

    async def stream(self, request: SpeechRequest) -> AsyncGenerator[Samples]:
        """Speak, and give the sound as it is made.

        The chunks are float32 of shape (n,), the first one patch long. Together they are the first
        attempt of what `synthesize` gives. Closing the iterator stops the work within one step.
        """
        async with aclosing(self._hear(request, streamed=True)) as items:
            async for item in items:
                if not isinstance(item, _End):
                    yield item

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of the engine's thread so far, by kind of work: `read`, `speak`, `decode`."""
        return dict(self._engine.scheduler.seconds)

    async def close(self) -> None:
        """Free the weights and end the thread."""
        self._engine.scheduler.close()
        await self._running
        del self._engine
        await self._thread.close()

    async def _hear(
        self, request: SpeechRequest, *, streamed: bool
    ) -> AsyncGenerator[Samples | _End]:
        from app.backends.tts.voxcpm.engine.scheduler import Utterance

        text = inputs.spoken_text(request)
        if request.normalize:
            text = await self._normalized(text)
        ear = _Ear(asyncio.get_running_loop())
        preparation = self._engine.reader.prepare(request, text, streamed=streamed)
        utterance = Utterance(preparation, ear, streamed)
        self._engine.scheduler.submit(utterance)
        try:
            while not isinstance(item := await ear.queue.get(), _End):
                yield item
            if item.error is not None:
                raise item.error
            if item.cut_off:
                raise inputs.too_long(self._layout)
            yield item
        finally:
            utterance.cancelled = True

    async def _normalized(self, text: str) -> str:
        async with self._normalizing:
            if self._normalizer is None:
                self._normalizer = await asyncio.to_thread(inputs.text_normalizer)
            return await asyncio.to_thread(inputs.normalized, text, self._normalizer)


def _build(directory: Path, layout: Layout, options: TTSOptions) -> _Engine:
    from app.backends.tts.voxcpm.engine.loading import load_model
    from app.backends.tts.voxcpm.engine.prompt import PromptReader
    from app.backends.tts.voxcpm.engine.scheduler import Scheduler
    from app.backends.tts.voxcpm.engine.voices import VoiceCache

    quantize = options.quantization == "int8-lm"
    model = load_model(
        directory,
        device=options.device,
        dtype=options.dtype,
        quantize=quantize,
        batch_invariant=options.batch_invariant,
    )
    voices = VoiceCache(
        options.voice_cache_bytes, options.voice_cache_dir, options.voice_cache_disk_bytes
    )
    reader = PromptReader(model, layout, voices)
    scheduler = Scheduler(model.network, model.decoder, batch_size=options.batch_size)
    return _Engine(reader, scheduler, model.memory_bytes + options.voice_cache_bytes)
