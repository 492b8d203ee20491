"""Wire shapes of speech: the JSON body of `generate`, the form of `clone`, the audio answer."""

from typing import Annotated, Any

from fastapi import UploadFile
from fastapi.responses import Response
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, FiniteFloat, model_validator

from app.domain.speech import SpeechRequest
from app.services.tts_service import SpeechAnswer, VoiceUploads

_EXAMPLE_TEXT = "The quick brown fox jumps over the lazy dog."


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("must not be blank")
    return text


def _not_only_brackets(style: str) -> str:
    if not style.strip("()（） \t\n"):
        raise ValueError("must not be blank")
    return style


_DEFAULTED = (
    "cfg_value",
    "inference_timesteps",
    "retry_badcase_max_times",
    "retry_badcase_ratio_threshold",
)


class SpeechFields(BaseModel):
    """What `generate` and `clone` have in common."""

    model_config = ConfigDict(extra="forbid")

    text: Annotated[str, AfterValidator(_not_blank)] = Field(
        min_length=1,
        description="What to say: 1 to `TTS_MAX_TEXT_CHARS` characters (5,000 by default).",
    )
    model: str | None = Field(
        None, min_length=1, max_length=200, description="A known model; null is the default model."
    )
    voice: str | None = Field(
        None, min_length=1, max_length=200, description="A voice of the model; null is its default."
    )
    style: Annotated[str, AfterValidator(_not_only_brackets)] | None = Field(
        None,
        min_length=1,
        max_length=500,
        description="How to say it, in words; never read aloud. VoxCPM2 only, and not together "
        "with `prompt_text`.",
    )
    cfg_value: FiniteFloat = Field(
        2.0, ge=0.1, le=10, description="Guidance: higher follows the text more closely."
    )
    inference_timesteps: int = Field(
        10, ge=2, le=100, description="Diffusion steps: more is finer and slower."
    )
    normalize: bool = Field(
        False, description="Spell out numbers and symbols. English and Chinese text only."
    )
    denoise: bool = Field(
        False, description="Clean the recording first. Needs a denoiser; a 400 without one."
    )
    seed: int | None = Field(
        None, ge=0, le=2**32 - 1, description="Null draws one; X-Seed returns the one used."
    )
    min_seconds: FiniteFloat | None = Field(None, gt=0, description="Shortest audio wanted.")
    max_seconds: FiniteFloat | None = Field(None, ge=0.2, description="Longest audio wanted.")
    retry_badcase: bool | None = Field(
        None, description="Try again when the audio is far too long for its text; null is yes."
    )
    retry_badcase_max_times: int = Field(3, ge=1, le=10, description="Attempts in all.")
    retry_badcase_ratio_threshold: FiniteFloat = Field(
        6.0, ge=2, le=20, description="Steps of audio per token of text that count as too long."
    )
    sample_rate: int | None = Field(
        None, ge=8_000, le=48_000, description="Rate of the answer in Hz; null is the model's own."
    )

    @model_validator(mode="before")
    @classmethod
    def _few_fields(cls, data: Any) -> Any:
        """Refuse a flood of unknown fields before an error is made of each."""
        if isinstance(data, dict) and len(data) > 2 * len(cls.model_fields):
            raise ValueError("has too many fields")
        return data

    def to_request(self, **more: Any) -> SpeechRequest:
        """The domain request; a default that the caller did not send is left to the model."""
        values = self.model_dump(include=set(SpeechFields.model_fields))
        for name in _DEFAULTED:
            if name not in self.model_fields_set:
                values[name] = None
        return SpeechRequest(**values, **more)


class GenerateBody(SpeechFields):
    """The JSON body of `generate`."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={"examples": [{"text": _EXAMPLE_TEXT}]},
    )


def _as_form(schema: dict[str, Any]) -> None:
    """A form can send text and files, but no null: a field left out says the same."""
    schema["properties"]["text"]["examples"] = [_EXAMPLE_TEXT]
    for field in schema["properties"].values():
        if {"type": "null"} in field.get("anyOf", []):
            (value,) = (one for one in field.pop("anyOf") if one != {"type": "null"})
            if "contentMediaType" in value:
                field |= value
            else:
                field["anyOf"] = [{"const": ""}, value]
            field.pop("default", None)


class CloneForm(SpeechFields):
    """The multipart form of `clone`."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra=_as_form,
    )

    prompt_wav: UploadFile | None = Field(
        None,
        description="A recording of the voice, 1 to 30 s: wav, mp3, flac, ogg, opus, m4a or webm. "
        "Send its transcript with it; models with reference cloning also take it without.",
    )
    prompt_text: Annotated[str, AfterValidator(_not_blank)] | None = Field(
        None, min_length=1, description="Exactly what is said in `prompt_wav`."
    )
    reference_wav: UploadFile | None = Field(
        None, description="A recording of the voice alone, on models with reference cloning."
    )

    def to_request(self, **more: Any) -> SpeechRequest:
        """The domain request, still without the recordings."""
        return super().to_request(prompt_text=self.prompt_text, **more)

    async def uploads(self) -> VoiceUploads:
        """The recordings' bytes; the whole body's size was bounded while it was received."""
        return VoiceUploads(
            prompt_wav=await self.prompt_wav.read() if self.prompt_wav else None,
            reference_wav=await self.reference_wav.read() if self.reference_wav else None,
        )


def audio_response(answer: SpeechAnswer) -> Response:
    """The WAV file with its headers."""
    headers = {
        "Content-Disposition": 'attachment; filename="speech.wav"',
        "X-Model": answer.model,
        "X-Seed": str(answer.seed),
        "X-Sample-Rate": str(answer.sample_rate_hz),
        "X-Audio-Duration": f"{answer.duration_seconds:.3f}",
        "Server-Timing": ", ".join(
            f"{stage};dur={seconds * 1000:.1f}" for stage, seconds in answer.timings_seconds.items()
        ),
    }
    if answer.bad_case:
        headers["X-Bad-Case"] = "true"
    if answer.fallback:
        headers["X-Model-Fallback"] = (
            f"{answer.fallback.instead_of}; reason={answer.fallback.reason}"
        )
    return Response(answer.wav, media_type="audio/wav", headers=headers)
