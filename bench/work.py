"""The work that both sides are given, and what they have in common in doing it."""

import asyncio
from collections.abc import Sized
from time import perf_counter, process_time
from typing import Any, Protocol

from app.domain.audio import Clip
from tests.recordings import voice

TEXT = "The quick brown fox jumps over the lazy dog."
TRANSCRIPT = "What the recording says, in about as many words as ten seconds of speech would hold."
STEPS = 10
GUIDANCE = 2.0
SEED = 0
PROMPT_SECONDS = 10
PROMPT_SAMPLE_RATE_HZ = 16_000

# Answers: "seconds" of the measured part, and "samples" made in it, for the sides to be compared.
Reply = dict[str, Any]

_QUIET_SECONDS = 0.05


class Worker(Protocol):
    """One side. Lengths are in patches; every method is asked for by its name."""

    async def load(self) -> Reply:
        """Load the model, after letting go of one that is loaded."""
        ...

    async def single(self, patches: int) -> Reply:
        """One request."""
        ...

    async def together(self, patches: int, requests: int) -> Reply:
        """Several requests that arrive at once."""
        ...

    async def first_audio(self, patches: int) -> Reply:
        """The time to the first chunk of a stream."""
        ...

    async def clone_first_audio(self, patches: int, variant: int) -> Reply:
        """The same in the voice of a recording."""
        ...

    async def vae_share(self, patches: int) -> Reply:
        """The share of the audio decoder in one request."""
        ...


def recording(variant: int) -> Clip:
    """Ten seconds of a voice-like sound; each variant is another recording to a cache."""
    samples = voice(PROMPT_SECONDS, PROMPT_SAMPLE_RATE_HZ)
    return Clip(samples * (0.9 - 0.01 * variant), PROMPT_SAMPLE_RATE_HZ)


def reply(began: float, *samples: Sized) -> Reply:
    """The time since `began`, and how many samples there are in all."""
    seconds = perf_counter() - began
    return {"seconds": seconds, "samples": sum(len(one) for one in samples)}


async def until_quiet() -> None:
    """Wait until this process computes no more, so that it does not disturb the other side."""
    spent = -1.0
    while process_time() - spent > 0.1 * _QUIET_SECONDS:
        spent = process_time()
        await asyncio.sleep(_QUIET_SECONDS)
