"""Text to speech: `generate` from JSON, `clone` from an uploaded voice."""

from typing import Annotated, Any

from fastapi import APIRouter, Form
from fastapi.responses import Response

from app.config import SpeechSettings
from app.dependencies import AppResources
from app.errors import (
    AudioRejectedError,
    DeadlineExceededError,
    ModelLoadingError,
    ModelNotFoundError,
    ModelUnavailableError,
    PayloadTooLargeError,
    QueueFullError,
    ShuttingDownError,
    TextTooLongError,
    UnspeakableTextError,
    UnsupportedMediaTypeError,
    UnsupportedParameterError,
    ValidationError,
)
from app.problems import responses_for
from app.schemas.tts import CloneForm, GenerateBody, audio_response
from app.services import tts_service

_HEADERS = {
    "X-Request-Id": "Id of this request, also in the server's log.",
    "X-Model": "The model that spoke.",
    "X-Model-Fallback": "The default model that could not, and why; only if another stood in.",
    "X-Seed": "The seed that was used; sent again, it gives the same audio.",
    "X-Sample-Rate": "Rate of the audio in Hz.",
    "X-Audio-Duration": "Length of the audio in seconds.",
    "X-Bad-Case": "`true` if every attempt looked wrong and the last is returned all the same.",
    "Server-Timing": "Milliseconds to get the model, to speak and to encode.",
}
_AUDIO: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "A WAV file: 16-bit, mono, at `sample_rate` or the model's own rate.",
        "content": {"audio/wav": {"schema": {"type": "string", "format": "binary"}}},
        "headers": {
            name: {"description": text, "schema": {"type": "string"}}
            for name, text in _HEADERS.items()
        },
    }
}
_ERRORS = responses_for(
    ValidationError,
    UnsupportedParameterError,
    UnspeakableTextError,
    TextTooLongError,
    ModelNotFoundError,
    PayloadTooLargeError,
    QueueFullError,
    ModelLoadingError,
    ModelUnavailableError,
    ShuttingDownError,
    DeadlineExceededError,
)
_UPLOAD_ERRORS = responses_for(
    ValidationError, UnsupportedParameterError, AudioRejectedError, UnsupportedMediaTypeError
)


def create_router(settings: SpeechSettings) -> APIRouter:
    """The routes, with the body limits that the settings ask for."""
    # A character may be 12 bytes of JSON (two \uXXXX).
    max_json_bytes = 12 * settings.max_text_chars + 2**16
    # Two recordings, and the text fields and separators around them.
    max_form_bytes = 2 * settings.max_upload_bytes + max_json_bytes + 2**20
    router = APIRouter(
        prefix="/api/v1/text-to-speech",
        tags=["text to speech"],
        max_body_size=max_form_bytes,
        form_limits={"max_fields": 50, "max_files": 4, "max_part_size": 2**20},
    )

    @router.post(
        "/generate",
        max_body_size=max_json_bytes,
        summary="Speak a text",
        response_class=Response,
        responses=_AUDIO | _ERRORS,
    )
    async def generate(body: GenerateBody, resources: AppResources) -> Response:
        """Give a text, get a WAV file.

        Without `model` the default model speaks. While its weights are still being downloaded
        (or cannot be had), the embedded English voice stands in, and `X-Model-Fallback` says so.
        """
        answer = await tts_service.synthesize(
            body.to_request(),
            models=resources.models,
            admission=resources.admission,
            settings=resources.settings.tts,
        )
        return audio_response(answer)

    @router.post(
        "/clone",
        summary="Speak a text in the voice of a recording",
        response_class=Response,
        responses=_AUDIO | _ERRORS | _UPLOAD_ERRORS,
    )
    async def clone(
        form: Annotated[CloneForm, Form(media_type="multipart/form-data")], resources: AppResources
    ) -> Response:
        """Give a text and a recording of a voice, get a WAV file in that voice.

        Send `prompt_wav` with its transcript in `prompt_text`; on models with reference cloning
        `reference_wav` (or `prompt_wav` alone) is enough. The recording is kept nowhere.
        """
        answer = await tts_service.clone(
            form.to_request(),
            await form.uploads(),
            models=resources.models,
            admission=resources.admission,
            settings=resources.settings.tts,
            decoders=resources.decoders,
        )
        return audio_response(answer)

    return router
