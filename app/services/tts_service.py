"""Text to speech and voice cloning: from a request to WAV bytes.

Everything touched is an argument. The order is: choose the model, take a place in its queue, decode
recordings, judge the request, lease the model, speak, encode; all within one deadline.
"""

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator
from concurrent.futures import Executor
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from time import perf_counter

import numpy as np

from app.audio.decode import ClipLimits, decode_clip
from app.audio.resample import resample
from app.audio.wav import wav_bytes
from app.config import SpeechSettings
from app.domain.audio import Clip
from app.domain.models import Capabilities, ModelStatus
from app.domain.speech import Speech, SpeechRequest
from app.errors import (
    DeadlineExceededError,
    FieldError,
    InternalError,
    PayloadTooLargeError,
    TextTooLongError,
    ValidationError,
)
from app.services import speech_rules
from app.services.admission import Admission
from app.services.model_loader import ModelLoader

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Fallback:
    """Which default model could not answer, and why: `downloading` or `unavailable`."""

    instead_of: str
    reason: str


@dataclass(frozen=True, slots=True, eq=False)
class SpeechAnswer:
    """Finished speech: a whole WAV file and what a client wants to know about it."""

    wav: bytes
    model: str
    seed: int
    sample_rate_hz: int
    duration_seconds: float
    bad_case: bool
    fallback: Fallback | None
    timings_seconds: dict[str, float]


@dataclass(frozen=True, slots=True, eq=False)
class VoiceUploads:
    """Uploaded recordings of a voice, as the bytes that came."""

    prompt_wav: bytes | None = None
    reference_wav: bytes | None = None


async def synthesize(
    request: SpeechRequest, *, models: ModelLoader, admission: Admission, settings: SpeechSettings
) -> SpeechAnswer:
    """Speak a text.

    Raises a ValidationError, ModelNotFoundError, QueueFullError, ModelLoadingError,
    ModelUnavailableError or DeadlineExceededError.
    """
    _check_text_length(request, settings)
    name, fallback = _choose_model(request, models)
    async with _deadline(settings.request_timeout_seconds):
        with admission.enter(name):
            return await _speak(request, name, fallback, models)


async def clone(
    request: SpeechRequest,
    uploads: VoiceUploads,
    *,
    models: ModelLoader,
    admission: Admission,
    settings: SpeechSettings,
    decoders: Executor,
) -> SpeechAnswer:
    """Speak a text in the voice of a recording; no other model ever stands in.

    Raises what `synthesize` raises, and for the recordings PayloadTooLargeError,
    UnsupportedMediaTypeError and AudioRejectedError.
    """
    _check_text_length(request, settings)
    if uploads.prompt_wav is None and uploads.reference_wav is None:
        raise ValidationError.of_field("prompt_wav", "a recording of the voice is required")
    if request.prompt_text is not None and uploads.prompt_wav is None:
        raise ValidationError.of_field("prompt_text", "is the transcript of prompt_wav; send both")
    name = models.catalog.spec(request.model or models.catalog.default_name).name
    async with _deadline(settings.request_timeout_seconds):
        with admission.enter(name):
            request = replace(
                request,
                prompt=await _decoded(uploads.prompt_wav, "prompt_wav", settings, decoders),
                reference=await _decoded(
                    uploads.reference_wav, "reference_wav", settings, decoders
                ),
            )
            return await _speak(request, name, None, models)


async def _speak(
    request: SpeechRequest, name: str, fallback: Fallback | None, models: ModelLoader
) -> SpeechAnswer:
    capabilities = models.capabilities(name)
    if capabilities is not None:
        request = _as_this_model_takes_it(request, capabilities)
        speech_rules.check(request, capabilities)
    seed = request.seed if request.seed is not None else secrets.randbits(32)
    began = perf_counter()
    async with models.lease(name) as backend:
        leased = perf_counter()
        speech = await backend.synthesize(replace(request, seed=seed))
    spoken = perf_counter()
    speech = await asyncio.to_thread(_at_sample_rate, speech, request.sample_rate)
    wav = await asyncio.to_thread(wav_bytes, speech.samples, speech.sample_rate_hz)
    return SpeechAnswer(
        wav=wav,
        model=name,
        seed=seed,
        sample_rate_hz=speech.sample_rate_hz,
        duration_seconds=len(speech.samples) / speech.sample_rate_hz,
        bad_case=speech.bad_case,
        fallback=fallback,
        timings_seconds={
            "model": leased - began,
            "speech": spoken - leased,
            "encode": perf_counter() - spoken,
        },
    )


def _choose_model(request: SpeechRequest, models: ModelLoader) -> tuple[str, Fallback | None]:
    """The model that was named, or the default, or what stands in for it for the time being."""
    catalog = models.catalog
    if request.model is not None:
        return catalog.spec(request.model).name, None
    default = models.status(catalog.default_name)
    if default.on_disk or catalog.fallback_name is None:
        return default.spec.name, None
    stand_in = models.capabilities(catalog.fallback_name)
    if stand_in is None or not speech_rules.can_honour(request, stand_in):
        return default.spec.name, None  # leasing it says what is the matter
    models.downloads.ensure(default.spec)
    fallback = Fallback(default.spec.name, _why_missing(default))
    logger.warning(
        "another model stands in for the default",
        extra={"model": catalog.fallback_name, "default": default.spec.name}
        | {"reason": fallback.reason},
    )
    return catalog.fallback_name, fallback


def _why_missing(default: ModelStatus) -> str:
    return "unavailable" if default.reason else "downloading"


def _as_this_model_takes_it(request: SpeechRequest, capabilities: Capabilities) -> SpeechRequest:
    """A prompt without a transcript gives its voice as a reference, where the model has that."""
    if request.prompt is None or request.prompt_text is not None:
        return request
    if "reference_wav" in capabilities.parameters and request.reference is None:
        return replace(request, prompt=None, reference=request.prompt)
    if "prompt_text" in capabilities.parameters:
        raise ValidationError.of_field(
            "prompt_text", "this model needs the transcript of prompt_wav"
        )
    return request


def _check_text_length(request: SpeechRequest, settings: SpeechSettings) -> None:
    limit = settings.max_text_chars
    for field, text in (("text", request.text), ("prompt_text", request.prompt_text or "")):
        if len(text) > limit:
            message = f"must not exceed {limit} characters"
            raise TextTooLongError(
                f"{field}: {message}", errors=(FieldError(field, message, limit),)
            )


async def _decoded(
    data: bytes | None, field: str, settings: SpeechSettings, decoders: Executor
) -> Clip | None:
    if data is None:
        return None
    if len(data) > settings.max_upload_bytes:
        raise PayloadTooLargeError(f"{field}: must not exceed {settings.max_upload_bytes} bytes.")
    work = partial(decode_clip, data, field=field, limits=ClipLimits())
    return await asyncio.get_running_loop().run_in_executor(decoders, work)


def _at_sample_rate(speech: Speech, sample_rate_hz: int | None) -> Speech:
    if not np.isfinite(speech.samples).all():
        raise InternalError("The model produced sound that is not audio. Try another seed.")
    rate = sample_rate_hz or speech.sample_rate_hz
    samples = resample(speech.samples, speech.sample_rate_hz, rate)
    return replace(speech, samples=samples, sample_rate_hz=rate)


@asynccontextmanager
async def _deadline(seconds: float) -> AsyncIterator[None]:
    """Stop the work after so long. Raises DeadlineExceededError."""
    try:
        async with asyncio.timeout(seconds) as deadline:
            yield
    except TimeoutError:
        if not deadline.expired():
            raise
        raise DeadlineExceededError(f"The request took longer than {seconds:g} seconds.") from None
