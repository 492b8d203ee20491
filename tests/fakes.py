"""Fakes that implement our own Protocols, for what a real model is too slow or too well-behaved."""

import asyncio
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Self

import numpy as np

from app.backends.base import BackendLoadError, TTSOptions
from app.domain.models import Capabilities, ModelSpec
from app.domain.speech import Speech, SpeechRequest


class SilentBackend:
    """A text-to-speech backend that says a tenth of a second of silence."""

    required_files: ClassVar[tuple[tuple[str, ...], ...]] = (("weights.bin",),)

    def __init__(self, memory_bytes: int = 100) -> None:
        self.memory_bytes = memory_bytes
        self.closed = False

    @classmethod
    def describe(cls, spec: ModelSpec, directory: Path | None) -> Capabilities:
        return Capabilities(
            parameters=frozenset({"seed"}), languages=("en",), voices=(), sample_rate_hz=16_000
        )

    @classmethod
    async def load(cls, spec: ModelSpec, directory: Path | None, options: TTSOptions) -> Self:
        return cls()

    async def synthesize(self, request: SpeechRequest) -> Speech:
        return Speech(np.zeros(1_600, np.float32), 16_000)

    async def close(self) -> None:
        assert not self.closed, "closed twice"
        self.closed = True


@dataclass
class Loads:
    """Loads SilentBackends, counting them; fails or waits when told to."""

    count: int = 0
    failures: int = 0
    seconds: float = 0.0
    memory_bytes: int = 100
    loaded: list[SilentBackend] = field(default_factory=list)

    async def __call__(self, spec: ModelSpec, directory: Path | None) -> SilentBackend:
        self.count += 1
        await asyncio.sleep(self.seconds)
        if self.failures:
            self.failures -= 1
            raise BackendLoadError("its weights are damaged")
        self.loaded.append(SilentBackend(self.memory_bytes))
        return self.loaded[-1]


class BrokenBackend(SilentBackend):
    """A backend whose library fails in a way that nobody foresaw."""

    async def synthesize(self, request: SpeechRequest) -> Speech:
        raise RuntimeError(f"/secret/path: {request.text}")


class DeafBackend(SilentBackend):
    """A backend that makes numbers which are no sound."""

    async def synthesize(self, request: SpeechRequest) -> Speech:
        return Speech(np.full(1_600, np.nan, np.float32), 16_000)
