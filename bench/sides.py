"""The two sides of the comparison, each in a process of its own: `python -m bench.sides`.

A side loads one checkpoint and then does what it is told, one JSON line on stdin for one on
stdout, and waits in between, so that rounds of both can alternate. Both are asked for the same
number of patches with the same steps, guidance and seed, from text to samples.
"""

import argparse
import asyncio
import json
import os
import sys
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
import voxcpm  # noqa: F401 - imported before the clock starts, on both sides

from app.backends.base import TTSOptions
from app.backends.tts.voxcpm.batched import BatchedBackend
from app.backends.tts.voxcpm.checkpoint import library_classes
from app.backends.tts.voxcpm.layout import Layout, read_layout
from app.domain.audio import Clip
from app.domain.models import DirectorySource, ModelSpec
from app.domain.speech import SpeechRequest

TEXT = "The quick brown fox jumps over the lazy dog."
TRANSCRIPT = "What the recording says, in about as many words as ten seconds of speech would hold."
STEPS = 10
GUIDANCE = 2.0
PROMPT_SECONDS = 10
Reply = dict[str, Any]


def recording(variant: int) -> Clip:
    """Ten seconds of a voice-like sound, each variant with bytes of its own."""
    time = np.arange(PROMPT_SECONDS * 16_000, dtype=np.float32) / 16_000
    harmonics = sum(np.sin(2 * np.pi * 140 * n * time) / n for n in range(1, 9))
    swell = 0.5 + 0.5 * np.sin(2 * np.pi * 1.5 * time)
    return Clip((0.1 * (1 + variant / 100) * harmonics * swell).astype(np.float32), 16_000)


class LibrarySide:
    """The official library, called as its own `generate` calls it."""

    def __init__(self, directory: Path) -> None:
        began = perf_counter()
        model = library_classes(directory).model
        self._model = model.from_local(str(directory), optimize=False)
        self.load_seconds = perf_counter() - began

    async def single(self, patches: int) -> Reply:
        """One request."""
        began = perf_counter()
        samples, _, latents = self._model.generate_with_prompt_cache(
            **self._arguments(patches), retry_badcase=False
        )
        seconds = perf_counter() - began
        began = perf_counter()
        self._model.audio_vae.decode(latents.flatten(0, 1).T[None].float())
        decoding = perf_counter() - began
        return {
            "seconds": seconds,
            "samples": samples.shape[-1],
            "decode_share": decoding / seconds,
        }

    async def together(self, patches: int, requests: int) -> Reply:
        """Several requests, one after the other: it cannot do otherwise."""
        began = perf_counter()
        for _ in range(requests):
            self._model.generate_with_prompt_cache(**self._arguments(patches))
        return {"seconds": perf_counter() - began}

    async def first_audio(self, patches: int) -> Reply:
        """The time to the first chunk of a stream."""
        return {"seconds": self._first(self._arguments(patches))}

    async def clone_first_audio(self, patches: int, variant: int) -> Reply:
        """The same in the voice of a recording, which the library encodes on every call."""
        clip = recording(variant)
        began = perf_counter()
        prompt = {
            "audio_feat": self._encoded(clip),
            "prompt_text": TRANSCRIPT,
            "mode": "continuation",
        }
        encoding = perf_counter() - began
        first = self._first(self._arguments(patches) | {"prompt_cache": prompt})
        return {"seconds": encoding + first}

    async def close(self) -> None:
        """Nothing to do."""

    def _first(self, arguments: dict[str, Any]) -> float:
        began = perf_counter()
        stream = self._model.generate_with_prompt_cache_streaming(**arguments)
        next(stream)
        seconds = perf_counter() - began
        stream.close()
        return seconds

    def _encoded(self, clip: Clip) -> torch.Tensor:
        vae, patch_size = self._model.audio_vae, self._model.patch_size
        samples = torch.from_numpy(clip.samples)[None]
        if vae.sample_rate != clip.sample_rate_hz:
            count = samples.shape[1] * vae.sample_rate // clip.sample_rate_hz
            samples = torch.nn.functional.interpolate(samples[None], count)[0]
        lacking = -samples.shape[1] % (patch_size * vae.chunk_size)
        samples = torch.nn.functional.pad(samples, (lacking, 0))
        with torch.inference_mode():
            latents = vae.encode(samples, vae.sample_rate)
        return latents.view(vae.latent_dim, -1, patch_size).permute(1, 2, 0)

    def _arguments(self, patches: int) -> dict[str, Any]:
        torch.manual_seed(0)
        return {
            "target_text": TEXT,
            "prompt_cache": None,
            "min_len": patches,
            "max_len": patches,
            "inference_timesteps": STEPS,
            "cfg_value": GUIDANCE,
            "retry_badcase_ratio_threshold": 1_000.0,
        }


class EngineSide:
    """Our engine behind its backend, as the server calls it."""

    def __init__(self, backend: BatchedBackend, layout: Layout, load_seconds: float) -> None:
        self._backend = backend
        self._layout = layout
        self.load_seconds = load_seconds

    @classmethod
    async def load(cls, directory: Path, dtype: str, quantization: str) -> "EngineSide":
        """Load the checkpoint, and note how long that took."""
        spec = ModelSpec("bench", "voxcpm", DirectorySource(directory))
        options = TTSOptions(device="cpu", dtype=dtype, quantization=quantization)
        began = perf_counter()
        backend = await BatchedBackend.load(spec, directory, options)
        return cls(backend, read_layout(directory), perf_counter() - began)

    async def single(self, patches: int) -> Reply:
        """One request."""
        before, began = self._backend.seconds, perf_counter()
        speech = await self._backend.synthesize(self._request(patches))
        seconds = perf_counter() - began
        await asyncio.sleep(0.05)  # the engine writes down its last step
        decoding = self._backend.seconds["decode"] - before["decode"]
        return {
            "seconds": seconds,
            "samples": len(speech.samples),
            "decode_share": decoding / seconds,
        }

    async def together(self, patches: int, requests: int) -> Reply:
        """Several requests at once."""
        began = perf_counter()
        answers = [self._backend.synthesize(self._request(patches)) for _ in range(requests)]
        await asyncio.gather(*answers)
        return {"seconds": perf_counter() - began}

    async def first_audio(self, patches: int) -> Reply:
        """The time to the first chunk of a stream."""
        return await self._first(self._request(patches))

    async def first_audio_busy(self, patches: int, others: int) -> Reply:
        """The same while others are being spoken."""
        request = self._request(50 * patches)
        tasks = [asyncio.create_task(self._backend.synthesize(request)) for _ in range(others)]
        await asyncio.sleep(2.0)  # until all of them speak
        reply = await self._first(self._request(patches))
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return reply

    async def clone_first_audio(self, patches: int, variant: int) -> Reply:
        """The same in the voice of a recording."""
        request = self._request(patches, prompt=recording(variant), prompt_text=TRANSCRIPT)
        return await self._first(request)

    async def close(self) -> None:
        """End the engine's thread."""
        await self._backend.close()

    async def _first(self, request: SpeechRequest) -> Reply:
        before, began = self._backend.seconds["read"], perf_counter()
        stream = self._backend.stream(request)
        await anext(stream)
        seconds = perf_counter() - began
        await stream.aclose()
        return {"seconds": seconds, "read_seconds": self._backend.seconds["read"] - before}

    def _request(self, patches: int, **further: Any) -> SpeechRequest:
        seconds = patches * self._layout.patch_seconds
        return SpeechRequest(
            TEXT,
            seed=0,
            inference_timesteps=STEPS,
            cfg_value=GUIDANCE,
            min_seconds=seconds,
            max_seconds=seconds,
            retry_badcase=False,
            **further,
        )


def _peak_memory_bytes() -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


async def main() -> None:
    """Load, say so, and do what is asked until stdin ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("side", choices=["library", "engine"])
    parser.add_argument("directory", type=Path)
    parser.add_argument("dtype")
    parser.add_argument("quantization")
    arguments = parser.parse_args()
    # Replies go where stdout was; whatever else is printed goes with the errors.
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    side: Any
    if arguments.side == "library":
        side = LibrarySide(arguments.directory)
    else:
        side = await EngineSide.load(arguments.directory, arguments.dtype, arguments.quantization)
    print(json.dumps({"seconds": side.load_seconds}), file=replies, flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        what = order.pop("do")
        reply = {"bytes": _peak_memory_bytes()} if what == "memory" else None
        reply = reply or await getattr(side, what)(**order)
        print(json.dumps(reply), file=replies, flush=True)
    await side.close()


if __name__ == "__main__":
    asyncio.run(main())
