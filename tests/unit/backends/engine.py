"""What the tests of the batched engine share: loading it, and the library from the inside."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from app.backends.base import TTSBackend, TTSOptions
from app.backends.registry import tts_backend
from app.backends.tts.voxcpm.batched import BatchedBackend
from app.backends.tts.voxcpm.engine.loading import LoadedModel, load_model
from app.domain.audio import Clip, Samples
from app.domain.models import DirectorySource, ModelSpec
from app.domain.speech import SpeechRequest
from tests.library import library
from tests.recordings import voice

SAMPLES_PER_PATCH = {"voxcpm-0.5b": 1_280, "voxcpm-1.5": 7_056, "voxcpm2": 7_680}
PATCH_SECONDS = {"voxcpm-0.5b": 0.08, "voxcpm-1.5": 0.16, "voxcpm2": 0.16}


@contextlib.contextmanager
def single_thread() -> Iterator[None]:
    """Layers this small are slower on several threads, and far slower beside another process."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@contextlib.asynccontextmanager
async def loaded(
    directory: Path, backend: str = "voxcpm", **options: Any
) -> AsyncIterator[TTSBackend]:
    """A backend over a checkpoint on the CPU, float32 unless `options` say otherwise."""
    spec = ModelSpec(directory.name, backend, DirectorySource(directory))
    wanted = TTSOptions(**{"device": "cpu", "dtype": "float32"} | options)
    model = await tts_backend(backend).load(spec, directory, wanted)
    try:
        yield model
    finally:
        await model.close()


@contextlib.asynccontextmanager
async def engine(directory: Path, **options: Any) -> AsyncIterator[BatchedBackend]:
    """The batched backend, with all that it can do beyond what every backend promises."""
    async with loaded(directory, **options) as backend:
        assert isinstance(backend, BatchedBackend)
        yield backend


def parts(directory: Path, *, dtype: str = "float32", quantize: bool = False) -> LoadedModel:
    """The engine's networks by themselves."""
    return load_model(directory, device="cpu", dtype=dtype, quantize=quantize)


def clip(seconds: float, sample_rate_hz: int = 16_000, pitch: float = 1.0) -> Clip:
    """A voice-like recording; another `pitch` is another voice."""
    samples = voice(seconds, round(sample_rate_hz * pitch))[: round(seconds * sample_rate_hz)]
    return Clip(samples, sample_rate_hz)


async def heard(backend: BatchedBackend, request: SpeechRequest) -> list[Samples]:
    """All chunks of a stream."""
    return [chunk async for chunk in backend.stream(request)]


async def until(condition: Callable[[], bool], *, seconds: float = 10.0) -> None:
    """Wait for something that another thread is about to do."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.001)


def cosine(left: Tensor, right: Tensor) -> float:
    """1.0 for the same direction, over all numbers of two tensors."""
    flat = left.double().flatten(), right.double().flatten()
    return float(torch.nn.functional.cosine_similarity(*flat, dim=0))


def farthest(left: Tensor | Samples, right: Tensor | Samples) -> float:
    """The largest difference between two tensors or arrays of one shape."""
    first, second = torch.as_tensor(left), torch.as_tensor(right)
    assert first.shape == second.shape
    return float((first.double() - second.double()).abs().max())


@dataclass
class LibraryStep:
    """What one step of the library's loop was given and has made."""

    base_hidden: Tensor  # (hidden,)
    residual_hidden: Tensor  # (hidden,)
    condition: Tensor  # (patch size, features), the patch before
    noise: Tensor  # (patch size, features)
    patch: Tensor  # (patch size, features)
    embedded: Tensor  # (hidden,), the patch as the language models see it


@dataclass
class LibraryRun:
    """A speech of the library from the inside."""

    tokens: list[int]
    samples: Samples
    steps: list[LibraryStep] = field(default_factory=list)


def run_library(
    directory: Path,
    text: str,
    *,
    prompt: dict[str, Any] | None,
    patches: int,
    steps: int = 10,
    guidance: float = 2.0,
    seed: int = 0,
) -> LibraryRun:
    """Let the library speak, and write down what goes into each step and comes out of it."""
    model = library(directory).tts_model
    seen: dict[str, list[Tensor]] = {}

    def note(name: str, tensor: Tensor) -> None:
        seen.setdefault(name, []).append(tensor.detach().clone())

    def first_input(name: str) -> Callable[..., None]:
        return lambda module, given: note(name, given[0])

    def output(name: str) -> Callable[..., None]:
        return lambda module, given, made: note(name, made)

    def flow(module: Any, given: Any, named: dict[str, Any], made: Tensor) -> None:
        note("condition", named["cond"])
        note("patch", made)
        seen["noise"] = seen.get("noise", []) + seen.pop("estimated")[:1]

    hooks = [
        model.lm_to_dit_proj.register_forward_pre_hook(first_input("base_hidden")),
        model.res_to_dit_proj.register_forward_pre_hook(first_input("residual_hidden")),
        # The first estimate is made of the noise itself: the steps before it leave it unmoved.
        model.feat_decoder.estimator.register_forward_pre_hook(first_input("estimated")),
        model.feat_decoder.register_forward_hook(flow, with_kwargs=True),
        model.enc_to_lm_proj.register_forward_hook(output("embedded")),
    ]
    try:
        torch.manual_seed(seed)
        samples, _, _ = model.generate_with_prompt_cache(
            target_text=text,
            prompt_cache=prompt,
            max_len=patches,
            inference_timesteps=steps,
            cfg_value=guidance,
        )
    finally:
        for hook in hooks:
            hook.remove()
    whole = (prompt or {}).get("prompt_text", "") + text
    run = LibraryRun(model.text_tokenizer(whole), samples.squeeze(0).numpy())
    for number in range(patches):
        run.steps.append(
            LibraryStep(
                base_hidden=seen["base_hidden"][number][0],
                residual_hidden=seen["residual_hidden"][number][0],
                condition=seen["condition"][number][0].T,
                noise=seen["noise"][number][0].T,
                patch=seen["patch"][number][0].T,
                embedded=seen["embedded"][number + 1][0, 0],  # the first is that of the prompt
            )
        )
    return run


def quantization_levels(directory: Path, hidden: Tensor) -> Tensor:
    """The whole numbers that a quantized hidden state, (..., hidden), was made of."""
    layer = library(directory).tts_model.fsq_layer
    weight, bias = layer.out_proj.weight.double(), layer.out_proj.bias.double()
    with torch.inference_mode():
        levels = (hidden.double() - bias) @ torch.linalg.pinv(weight).T
    return (levels * layer.scale).round()


def equal(left: Samples, right: Samples) -> bool:
    """To the last bit."""
    return left.dtype == right.dtype and np.array_equal(left, right)
