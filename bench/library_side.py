"""The official library, called as its own pipeline calls it; the only module that does."""

import gc
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import soxr
import torch

from app.backends.tts.voxcpm.checkpoint import LibraryModel, library_classes
from app.domain.audio import Clip
from bench.work import GUIDANCE, SEED, STEPS, TEXT, TRANSCRIPT, Reply, recording, reply


class LibrarySide:
    """One request at a time. The number format is that of the checkpoint's config.json."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._class = library_classes(directory).model
        self._model: LibraryModel = None

    async def load(self) -> Reply:
        """As `VoxCPM` does, but for the compiler, which is for CUDA."""
        self._model = None
        gc.collect()
        began = perf_counter()
        self._model = self._class.from_local(str(self._directory), optimize=False, device="cpu")
        return reply(began)

    async def single(self, patches: int) -> Reply:
        """One request."""
        began = perf_counter()
        return reply(began, self._speak(patches))

    async def together(self, patches: int, requests: int) -> Reply:
        """Several requests, one after the other: it cannot do otherwise."""
        began = perf_counter()
        return reply(began, *[self._speak(patches) for _ in range(requests)])

    async def first_audio(self, patches: int) -> Reply:
        """The time to the first chunk of a stream."""
        return self._first(perf_counter(), patches)

    async def clone_first_audio(self, patches: int, variant: int) -> Reply:
        """The same in the voice of a recording, which it encodes on every call."""
        clip = recording(variant)
        began = perf_counter()
        prompt = {
            "audio_feat": self._encoded(clip),
            "prompt_text": TRANSCRIPT + " ",
            "mode": "continuation",
        }
        return self._first(began, patches, prompt_cache=prompt)

    async def vae_share(self, patches: int) -> Reply:
        """The share of all `decode` calls in one request, which are timed for this only."""
        vae = self._model.audio_vae
        spent, decode = 0.0, vae.decode

        def timed(*arguments: Any, **further: Any) -> Any:
            nonlocal spent
            start = perf_counter()
            try:
                return decode(*arguments, **further)
            finally:
                spent += perf_counter() - start

        vae.decode = timed
        try:
            answer = await self.single(patches)
        finally:
            del vae.decode
        return answer | {"share": spent / answer["seconds"]}

    def _speak(self, patches: int) -> np.ndarray:
        arguments = self._arguments(patches)
        samples, _, _ = self._model.generate_with_prompt_cache(**arguments, retry_badcase=False)
        return samples.squeeze(0).numpy()

    def _first(self, began: float, patches: int, **further: Any) -> Reply:
        arguments = self._arguments(patches) | further
        stream = self._model.generate_with_prompt_cache_streaming(**arguments)
        samples, _, _ = next(stream)
        answer = reply(began, samples.squeeze(0))
        stream.close()
        return answer

    def _arguments(self, patches: int) -> dict[str, Any]:
        torch.manual_seed(SEED)
        return {
            "target_text": TEXT,
            "prompt_cache": None,
            "min_len": patches,
            "max_len": patches,
            "inference_timesteps": STEPS,
            "cfg_value": GUIDANCE,
            "retry_badcase_ratio_threshold": 1_000.0,  # it bounds the length by this, too
        }

    def _encoded(self, clip: Clip) -> torch.Tensor:
        """What its build_prompt_cache makes of a file, without the file."""
        model, vae = self._model, self._model.audio_vae
        samples = soxr.resample(clip.samples, clip.sample_rate_hz, vae.sample_rate, quality="VHQ")
        lacking = -len(samples) % (model.patch_size * model.chunk_size)
        audio = torch.from_numpy(np.pad(samples, (lacking, 0)).astype(np.float32))[None]
        with torch.inference_mode():
            latents = vae.encode(audio, vae.sample_rate)
        return latents.view(vae.latent_dim, -1, model.patch_size).permute(1, 2, 0)
