"""Whether a model can honour a request, judged by its capabilities alone, before it is loaded.

Nothing is accepted and then ignored: a field that the model cannot honour is refused by name.
"""

import unicodedata

from app.domain.models import Capabilities
from app.domain.speech import SpeechRequest
from app.errors import (
    FieldError,
    TextTooLongError,
    UnspeakableTextError,
    UnsupportedParameterError,
    ValidationError,
)

# Wire name of each field that shapes speech -> its name in SpeechRequest.
_FIELDS = {
    "voice": "voice",
    "style": "style",
    "cfg_value": "cfg_value",
    "inference_timesteps": "inference_timesteps",
    "normalize": "normalize",
    "denoise": "denoise",
    "seed": "seed",
    "min_seconds": "min_seconds",
    "max_seconds": "max_seconds",
    "retry_badcase": "retry_badcase",
    "retry_badcase_max_times": "retry_badcase_max_times",
    "retry_badcase_ratio_threshold": "retry_badcase_ratio_threshold",
    "sample_rate": "sample_rate",
    "prompt_wav": "prompt",
    "prompt_text": "prompt_text",
    "reference_wav": "reference",
}
_NORMALIZED_SCRIPTS = frozenset({"LATIN", "CJK"})


def check(request: SpeechRequest, capabilities: Capabilities) -> None:
    """Raise the ValidationError that says why the model cannot do what is asked, if it cannot."""
    _check_parameters(request, capabilities)
    _check_lengths(request, capabilities)
    _check_text(request, capabilities)
    if request.style and request.prompt_text:
        raise ValidationError.of_field(
            "style", "cannot be combined with prompt_text, which is continued as it was spoken"
        )


def can_honour(request: SpeechRequest, capabilities: Capabilities) -> bool:
    """Whether `check` would pass."""
    try:
        check(request, capabilities)
    except ValidationError:
        return False
    return True


def _check_parameters(request: SpeechRequest, capabilities: Capabilities) -> None:
    asked = [wire for wire, name in _FIELDS.items() if _is_set(getattr(request, name))]
    errors = tuple(
        FieldError(wire, "this model does not support it")
        for wire in asked
        if wire not in capabilities.parameters
    )
    if errors:
        names = ", ".join(error.field for error in errors)
        raise UnsupportedParameterError(f"This model does not support: {names}.", errors=errors)
    if request.voice is not None and request.voice not in capabilities.voices:
        known = ", ".join(capabilities.voices)
        message = f"this model has no such voice; it has: {known}"
        raise UnsupportedParameterError(f"voice: {message}", errors=(FieldError("voice", message),))


def _is_set(value: object) -> bool:
    """None was not sent; false asks for what every model does anyway."""
    return value is not None and value is not False


def _check_lengths(request: SpeechRequest, capabilities: Capabilities) -> None:
    least, most, limit = request.min_seconds, request.max_seconds, capabilities.max_seconds
    if least is not None and most is not None and least > most:
        raise ValidationError.of_field("min_seconds", "must not exceed max_seconds", limit=most)
    for field, value in (("min_seconds", least), ("max_seconds", most)):
        if value is not None and limit is not None and value > limit:
            raise ValidationError.of_field(
                field, f"must not exceed this model's {limit:g} seconds", limit=limit
            )


def _check_text(request: SpeechRequest, capabilities: Capabilities) -> None:
    limit = capabilities.max_chars
    if limit is not None and len(request.text) > limit:
        message = f"must not exceed this model's {limit} characters"
        raise TextTooLongError(f"text: {message}", errors=(FieldError("text", message, limit),))
    scripts = _scripts_of(request.text)
    spoken = capabilities.scripts
    if spoken is not None and not scripts <= spoken:
        other = ", ".join(sorted(script.capitalize() for script in scripts - spoken))
        languages = ", ".join(capabilities.languages)
        raise _unspeakable(f"this model speaks {languages} only and cannot read {other} writing")
    if spoken is not None and not any(character.isalnum() for character in request.text):
        raise _unspeakable("there is nothing in it that this model can speak")
    if request.normalize and not scripts <= _NORMALIZED_SCRIPTS:
        raise ValidationError.of_field(
            "normalize", "is available for English and Chinese text only"
        )


def _unspeakable(message: str) -> UnspeakableTextError:
    return UnspeakableTextError(f"text: {message}", errors=(FieldError("text", message),))


def _scripts_of(text: str) -> frozenset[str]:
    """The scripts of the letters and digits in `text`, as the first word of their Unicode names."""
    # Full-width and other forms count as what they stand for; the micro sign is read as a unit.
    plain = unicodedata.normalize("NFKC", text.replace("\N{MICRO SIGN}", ""))
    characters = {character for character in plain if character.isalpha() or character.isdecimal()}
    names = (unicodedata.name(character, "UNKNOWN") for character in characters)
    return frozenset(name.split()[0] for name in names) - {"DIGIT"}
