"""The official library, called directly: what the server's answers are compared with."""

import io
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr
import torch
from voxcpm import VoxCPM


@cache
def library(directory: Path) -> VoxCPM:
    """The library's own pipeline over a checkpoint, on the CPU."""
    return VoxCPM(str(directory), enable_denoiser=False, optimize=False, device="cpu")


def library_speech(directory: Path, text: str, *, seed: int, **arguments: Any) -> np.ndarray:
    """What `VoxCPM.generate` returns for this seed: float32, shape (n,)."""
    pipeline = library(directory)  # before the seed: building it draws numbers
    torch.manual_seed(seed)
    return np.asarray(pipeline.generate(text, **arguments))


def library_clone(
    directory: Path, text: str, *, seed: int, prompt: dict[str, Any], **arguments: Any
) -> np.ndarray:
    """What the library's model generates from a prompt cache, float32, shape (n,)."""
    pipeline = library(directory)
    torch.manual_seed(seed)
    samples, _, _ = pipeline.tts_model.generate_with_prompt_cache(
        target_text=text, prompt_cache=prompt, retry_badcase=True, **arguments
    )
    return samples.squeeze(0).numpy()


def latents(directory: Path, wav: bytes, *, pad_left: bool) -> torch.Tensor:
    """A WAV file as the library's build_prompt_cache encodes it, from samples not from a path."""
    model = library(directory).tts_model
    samples, rate = soundfile.read(io.BytesIO(wav), dtype="float32", always_2d=True)
    mono = soxr.resample(samples.mean(axis=1), rate, model.audio_vae.sample_rate, quality="VHQ")
    whole = model.patch_size * model.chunk_size
    lacking = -len(mono) % whole
    padded = np.pad(mono, (lacking, 0) if pad_left else (0, lacking))
    with torch.inference_mode():
        encoded = model.audio_vae.encode(
            torch.from_numpy(padded.astype(np.float32))[None], model.audio_vae.sample_rate
        )
    return encoded.view(model.audio_vae.latent_dim, -1, model.patch_size).permute(1, 2, 0)


def assert_same_speech(wav: bytes, expected: np.ndarray) -> None:
    """The WAV file holds `expected` (float32 samples), to the last of its 16 bits."""
    samples, _ = decoded(wav)
    assert len(samples) == len(expected)
    loudest_difference = np.abs(samples / 32_768 - expected.clip(-1, 1)).max()
    assert loudest_difference <= 1.5 / 32_768, loudest_difference


def decoded(wav: bytes) -> tuple[np.ndarray, int]:
    """A WAV answer as 16-bit integers and its sample rate, by an independent decoder."""
    samples, rate = soundfile.read(io.BytesIO(wav), dtype="int16")
    return samples, rate
