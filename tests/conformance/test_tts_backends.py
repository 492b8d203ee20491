"""What every text-to-speech backend promises, whatever it is made of."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from app.backends.base import TTSBackend, TTSOptions
from app.backends.registry import TTS_BACKENDS, tts_backend
from app.domain.models import Capabilities, DirectorySource, EmbeddedSource, ModelSpec
from app.domain.speech import SpeechRequest

pytestmark = pytest.mark.anyio

REFERENCE = "voxcpm2 by the library"
CASES = ["hibari", "voxcpm-0.5b", "voxcpm-1.5", "voxcpm2", REFERENCE]
TEXT = "Good morning."


@dataclass(frozen=True)
class Case:
    """A loaded backend with what it said of itself before it was loaded."""

    backend: TTSBackend
    capabilities: Capabilities
    max_seconds: float | None

    def request(self, seed: int, text: str = TEXT) -> SpeechRequest:
        return SpeechRequest(text, seed=seed, max_seconds=self.max_seconds)


@pytest.fixture(params=CASES)
async def case(request: pytest.FixtureRequest, checkpoints: dict[str, Path]) -> AsyncIterator[Case]:
    name = request.param
    if name != "hibari":
        directory: Path | None = checkpoints["voxcpm2" if name == REFERENCE else name]
        kind_name = "voxcpm-reference" if name == REFERENCE else "voxcpm"
        spec = ModelSpec(name, kind_name, DirectorySource(directory))
    else:
        directory, spec = None, ModelSpec("hibari/heart", name, EmbeddedSource())
    kind = tts_backend(spec.backend)
    capabilities = kind.describe(spec, directory)
    assert capabilities is not None
    backend = await kind.load(spec, directory, TTSOptions(device="cpu"))
    yield Case(backend, capabilities, 0.8 if directory else None)
    await backend.close()


def test_every_backend_is_among_the_cases() -> None:
    assert set(TTS_BACKENDS) == {"hibari", "voxcpm", "voxcpm-reference"}


async def test_samples_are_mono_float32_within_range_at_the_rate_it_stated(case: Case) -> None:
    speech = await case.backend.synthesize(case.request(1))
    assert speech.samples.dtype == np.float32
    assert speech.samples.ndim == 1
    assert 0.001 < np.abs(speech.samples).max() <= 1.001
    assert speech.sample_rate_hz == case.capabilities.sample_rate_hz
    assert len(speech.samples) > 0.3 * speech.sample_rate_hz


async def test_the_same_seed_repeats_whatever_else_is_served(case: Case) -> None:
    alone = await case.backend.synthesize(case.request(1))
    together = await asyncio.gather(
        *(case.backend.synthesize(case.request(seed, f"{TEXT} {seed}")) for seed in (5, 6)),
        case.backend.synthesize(case.request(1)),
        case.backend.synthesize(case.request(2)),
    )
    np.testing.assert_array_equal(together[2].samples, alone.samples)
    assert not np.array_equal(together[3].samples, alone.samples)


async def test_a_caller_who_leaves_does_not_disturb_the_next(case: Case) -> None:
    alone = await case.backend.synthesize(case.request(1))
    leaving = asyncio.create_task(case.backend.synthesize(case.request(9)))
    await asyncio.sleep(0.005)
    leaving.cancel()
    assert isinstance((await asyncio.gather(leaving, return_exceptions=True))[0], BaseException)
    again = await case.backend.synthesize(case.request(1))
    np.testing.assert_array_equal(again.samples, alone.samples)


async def test_it_says_how_much_memory_it_takes(case: Case) -> None:
    assert case.backend.memory_bytes > 100_000


async def test_loading_a_model_does_not_change_what_another_says(
    checkpoints: dict[str, Path],
) -> None:
    kind = tts_backend("voxcpm")

    async def load(name: str) -> TTSBackend:
        directory = checkpoints[name]
        spec = ModelSpec(name, "voxcpm", DirectorySource(directory))
        return await kind.load(spec, directory, TTSOptions(device="cpu"))

    speaking = await load("voxcpm-0.5b")
    request = SpeechRequest(f"{TEXT} {TEXT}", seed=1, max_seconds=4)
    alone = await speaking.synthesize(request)
    speech = asyncio.create_task(speaking.synthesize(request))
    await asyncio.sleep(0.05)
    loaded = await load("voxcpm2")
    np.testing.assert_array_equal((await speech).samples, alone.samples)
    await speaking.close()
    await loaded.close()
