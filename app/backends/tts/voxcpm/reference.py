"""VoxCPM through the official library: one request at a time, on one thread per model.

The library is not thread-safe and offers no way to stop it, so a hook in front of its diffusion
decoder, which runs once a step, raises when the caller has gone.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Self

from app.backends.base import BackendLoadError, TTSOptions
from app.backends.tts.voxcpm import inputs
from app.backends.tts.voxcpm.checkpoint import LibraryModel, load_model
from app.backends.tts.voxcpm.layout import (
    REQUIRED_FILES,
    Layout,
    capabilities_of,
    read_layout,
)
from app.backends.worker import Cancellation, WorkerThread
from app.domain.models import Capabilities, ModelSpec
from app.domain.speech import Speech, SpeechRequest

# The library draws its noise from torch's global generator. Two models in one process take turns,
# or each would change what the other says.
_NOISE = threading.Lock()


@contextmanager
def _turn(caller: Cancellation) -> Iterator[None]:
    """Hold the global generator; a caller who leaves while another model has it stops waiting."""
    while not _NOISE.acquire(timeout=0.05):
        caller.check()
    try:
        yield
    finally:
        _NOISE.release()


def _warm_up(model: LibraryModel) -> None:
    """Two steps, so that the first request does not pay for what torch prepares on first use."""
    model.generate_with_prompt_cache(
        target_text="Ready.", prompt_cache=None, max_len=2, inference_timesteps=2
    )


class ReferenceBackend:
    """The official library behind our promises."""

    required_files: ClassVar[tuple[tuple[str, ...], ...]] = REQUIRED_FILES

    def __init__(self, model: LibraryModel, layout: Layout, thread: WorkerThread) -> None:
        self._model = model
        self._layout = layout
        self._thread = thread
        self._normalizer: Any = None
        tensors = [*model.parameters(), *model.buffers()]
        caches = [model.base_lm.kv_cache.kv_cache, model.residual_lm.kv_cache.kv_cache]
        self.memory_bytes = sum(tensor.nbytes for tensor in [*tensors, *caches])

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

        def job(caller: Cancellation) -> LibraryModel:
            with _turn(caller):  # random initial weights are drawn from the same generator
                model = load_model(directory, device=options.device, dtype=options.dtype)
                _warm_up(model)
                return model

        try:
            return cls(await thread.run(job), layout, thread)
        except BaseException:
            await thread.close()
            raise

    async def synthesize(self, request: SpeechRequest) -> Speech:
        """Queue for the thread and speak."""
        return await self._thread.run(lambda caller: self._speak(request, caller))

    async def close(self) -> None:
        """Free the weights and end the thread."""
        del self._model
        await self._thread.close()

    def _speak(self, request: SpeechRequest, caller: Cancellation) -> Speech:
        import torch

        model = self._model
        vae = model.audio_vae
        # The decoder runs once a step; the autoencoder's layers, before and after all steps.
        steps = [model.feat_decoder, *vae.encoder.modules(), *vae.decoder.modules()]
        hooks = [one.register_forward_pre_hook(lambda *_: caller.check()) for one in steps]
        try:
            with _turn(caller), torch.inference_mode():
                torch.manual_seed(request.seed or 0)
                return self._generate(request)
        finally:
            for hook in hooks:
                hook.remove()

    def _generate(self, request: SpeechRequest) -> Speech:
        model, layout = self._model, self._layout
        text = inputs.spoken_text(request)
        if request.normalize:
            text = inputs.normalized(text, self._text_normalizer())
        text = inputs.without_control_tokens(text, model.text_tokenizer)
        prompt = self._prompt_cache(request, text)
        tokens = len(model.text_tokenizer(text))
        bounds = inputs.lengths(
            request, layout, tokens=tokens, prefill=self._prefill_size(text, prompt)
        )
        retry = request.retry_badcase is not False
        samples, _, patches = model.generate_with_prompt_cache(
            target_text=text,
            prompt_cache=prompt,
            min_len=bounds.min_len,
            max_len=bounds.max_len,
            inference_timesteps=request.inference_timesteps or inputs.INFERENCE_TIMESTEPS,
            cfg_value=request.cfg_value or inputs.CFG_VALUE,
            retry_badcase=retry,
            retry_badcase_max_times=request.retry_badcase_max_times or inputs.RETRY_ATTEMPTS,
            retry_badcase_ratio_threshold=bounds.ratio,
        )
        bound = bounds.room if request.max_seconds is not None else bounds.max_len
        if patches.shape[0] >= bound:
            raise inputs.too_long(layout)  # cut off in the middle of the text
        return Speech(
            samples.squeeze(0).numpy(),
            layout.sample_rate_hz,
            bad_case=patches.shape[0] >= tokens * bounds.ratio,
        )

    def _prompt_cache(self, request: SpeechRequest, text: str) -> dict[str, Any] | None:
        """The recorded voice in the form that the library's build_prompt_cache returns."""
        cache: dict[str, Any] = {}
        if request.reference is not None:
            cache["ref_audio_feat"] = inputs.patches_of(
                request.reference, self._model, pad_left=False
            )
            cache["mode"] = "reference"
        if request.prompt is not None:
            cache["audio_feat"] = inputs.patches_of(request.prompt, self._model, pad_left=True)
            transcript = inputs.joined_transcript(request.prompt_text or "", text)
            cache["prompt_text"] = inputs.without_control_tokens(
                transcript, self._model.text_tokenizer
            )
            cache["mode"] = "ref_continuation" if request.reference else "continuation"
        return cache or None

    def _prefill_size(self, text: str, prompt: dict[str, Any] | None) -> int:
        """Tokens and patches that the model reads before it makes the first patch."""
        prompt = prompt or {}
        written = len(self._model.text_tokenizer(prompt.get("prompt_text", "") + text)) + 1
        continued = prompt["audio_feat"].size(0) if "audio_feat" in prompt else 0
        reference = prompt["ref_audio_feat"].size(0) + 2 if "ref_audio_feat" in prompt else 0
        return int(written + continued + reference)

    def _text_normalizer(self) -> Any:
        if self._normalizer is None:
            self._normalizer = inputs.text_normalizer()
        return self._normalizer
