"""Our engine behind its backend, called as the server calls it; the only module that does."""

import asyncio
import gc
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

from app.backends.base import TTSOptions
from app.backends.tts.voxcpm.batched import BatchedBackend
from app.backends.tts.voxcpm.layout import read_layout
from app.domain.models import DirectorySource, ModelSpec
from app.domain.speech import SpeechRequest
from bench.work import (
    GUIDANCE,
    SEED,
    STEPS,
    TEXT,
    TRANSCRIPT,
    Reply,
    recording,
    reply,
    until_quiet,
)

# What others are to say while a new request comes: more than there will be time for.
_LONG = 50


class EngineSide:
    """Requests at once are batched."""

    def __init__(self, directory: Path, dtype: str, variant: str) -> None:
        self._directory = directory
        self._options = TTSOptions(
            device="cpu",
            dtype=dtype,
            quantization="int8-lm" if variant == "int8-lm" else "none",
            batch_invariant=variant != "batch-dependent",
        )
        self._patch_seconds = read_layout(directory).patch_seconds
        self._backend: Any = None

    async def load(self) -> Reply:
        """As the server does."""
        await self.close()
        gc.collect()
        spec = ModelSpec("bench", "voxcpm", DirectorySource(self._directory))
        began = perf_counter()
        self._backend = await BatchedBackend.load(spec, self._directory, self._options)
        return reply(began)

    async def close(self) -> None:
        """Let go of the model, if there is one."""
        backend, self._backend = self._backend, None
        if backend is not None:
            await backend.close()

    async def single(self, patches: int) -> Reply:
        """One request."""
        began = perf_counter()
        speech = await self._backend.synthesize(self._request(patches))
        return reply(began, speech.samples)

    async def together(self, patches: int, requests: int) -> Reply:
        """Several requests at once."""
        began = perf_counter()
        answers = [self._backend.synthesize(self._request(patches)) for _ in range(requests)]
        speeches = await asyncio.gather(*answers)
        return reply(began, *[speech.samples for speech in speeches])

    async def first_audio(self, patches: int) -> Reply:
        """The time to the first chunk of a stream."""
        answer = await self._first(self._request(patches))
        await until_quiet()
        return answer

    async def first_audio_busy(self, patches: int, others: int) -> Reply:
        """The same while others listen to streams of their own."""
        async with self._speaking(others, patches * _LONG) as tasks:
            answer = await self._first(self._request(patches))
            if any(task.done() for task in tasks):
                raise RuntimeError("the others had come to an end")
        await until_quiet()
        return answer

    async def clone_first_audio(self, patches: int, variant: int) -> Reply:
        """The same in the voice of a recording."""
        request = self._request(patches, prompt=recording(variant), prompt_text=TRANSCRIPT)
        answer = await self._first(request)
        await until_quiet()
        return answer

    async def vae_share(self, patches: int) -> Reply:
        """The share of the audio decoder in one request, as the engine counts it."""
        before = self._decode_seconds()
        answer = await self.single(patches)
        await until_quiet()  # it counts a step after the caller has heard of it
        after = self._decode_seconds()
        known = before is not None and after is not None
        return answer | {"share": (after - before) / answer["seconds"] if known else None}

    def _decode_seconds(self) -> float | None:
        """Seconds spent on making sound since the start; None if the engine does not say."""
        seconds: dict[str, float] = getattr(self._backend, "seconds", {})
        return seconds.get("decode")

    async def _first(self, request: SpeechRequest) -> Reply:
        began = perf_counter()
        async with aclosing(self._backend.stream(request)) as stream:
            return reply(began, await anext(stream))

    @asynccontextmanager
    async def _speaking(
        self, requests: int, patches: int
    ) -> AsyncIterator[list[asyncio.Task[None]]]:
        """Others that are being spoken, all of them past their first audio."""
        heard = [asyncio.Event() for _ in range(requests)]

        async def listen(event: asyncio.Event) -> None:
            async with aclosing(self._backend.stream(self._request(patches))) as stream:
                async for _ in stream:
                    event.set()

        tasks = [asyncio.create_task(listen(event)) for event in heard]
        try:
            await asyncio.gather(*[event.wait() for event in heard])
            yield tasks
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _request(self, patches: int, **further: Any) -> SpeechRequest:
        seconds = patches * self._patch_seconds
        return SpeechRequest(
            TEXT,
            seed=SEED,
            inference_timesteps=STEPS,
            cfg_value=GUIDANCE,
            min_seconds=seconds,
            max_seconds=seconds,
            retry_badcase=False,
            **further,
        )
