"""What is asked of a text-to-speech model, and what comes back."""

from dataclasses import dataclass

from app.domain.audio import Clip, Samples


@dataclass(frozen=True, slots=True)
class SpeechRequest:
    """Text to be spoken, with everything that shapes how.

    A field that is `None` (or `False`) was not set by the caller: the model's own default holds.
    `prompt` with `prompt_text` continues a recording in its voice; `reference` gives a voice
    alone. Lengths are seconds of audio, `seed` is 0 to 2**32 - 1.
    """

    text: str
    model: str | None = None
    voice: str | None = None
    style: str | None = None
    cfg_value: float | None = None
    inference_timesteps: int | None = None
    normalize: bool = False
    denoise: bool = False
    seed: int | None = None
    min_seconds: float | None = None
    max_seconds: float | None = None
    retry_badcase: bool | None = None
    retry_badcase_max_times: int | None = None
    retry_badcase_ratio_threshold: float | None = None
    sample_rate: int | None = None
    prompt: Clip | None = None
    prompt_text: str | None = None
    reference: Clip | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Speech:
    """What a model said: float32 samples of shape (n,) within [-1, 1], mono.

    `bad_case` says that every attempt looked wrong (far too long for its text) and the last one
    is returned all the same.
    """

    samples: Samples
    sample_rate_hz: int
    bad_case: bool = False
