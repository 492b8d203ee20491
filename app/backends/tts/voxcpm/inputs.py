"""Preparing what VoxCPM is given: text, style, transcripts, seconds as patches, recorded voices.

Nothing here imports torch at module level.
"""

from dataclasses import dataclass
from math import ceil, floor
from typing import TYPE_CHECKING, Any

from app.audio.resample import resample
from app.backends.tts.voxcpm.layout import Layout
from app.domain.audio import Clip
from app.domain.speech import SpeechRequest
from app.errors import FieldError, TextTooLongError, UnspeakableTextError

if TYPE_CHECKING:
    import torch

# The library's defaults.
CFG_VALUE = 2.0
INFERENCE_TIMESTEPS = 10
RETRY_ATTEMPTS = 3
RETRY_RATIO = 6.0
MIN_LEN = 2
MAX_LEN = 4_096
# Speech of fewer patches per token than this is too fast to be speech.
_LEAST_PATCHES_PER_TOKEN = 3


def spoken_text(request: SpeechRequest) -> str:
    """The text as the model reads it: one line, with the style in front in brackets."""
    text = " ".join(request.text.split())
    style = " ".join((request.style or "").translate(_BRACKETS).split())
    return f"({style}){text}" if style else text


def without_control_tokens(text: str, tokenizer: Any) -> str:
    """Break up what the tokenizer would take for one of its own tokens, such as `<|audio_end|>`.

    Written in a text it would steer the model instead of being read.
    """
    for token in tokenizer.tokenizer.get_added_vocab():
        text = text.replace(token, f"{token[:1]} {token[1:]}")
    return text


def text_normalizer() -> Any:
    """The library's normalizer; it takes a while to build."""
    from voxcpm.utils.text_normalize import TextNormalizer

    return TextNormalizer()


def normalized(text: str, normalizer: Any) -> str:
    """Spell out numbers and symbols by the library's `normalizer`.

    Raises UnspeakableTextError where it fails or leaves nothing.
    """
    try:
        result = str(normalizer.normalize(text)).strip()
    except AssertionError as error:  # it asserts on some symbols, "<" among them
        message = "it holds symbols that cannot be normalized; send normalize=false"
        raise _unspeakable(message) from error
    if not result:
        raise _unspeakable("nothing is left of it after normalization")
    return result


def joined_transcript(prompt_text: str, text: str) -> str:
    """`prompt_text` ready to stand before `text`: the library joins them without a space."""
    prompt_text = " ".join(prompt_text.split())
    if _is_cjk(prompt_text[-1:]) or _is_cjk(text[:1]):
        return prompt_text
    return prompt_text + " "


@dataclass(frozen=True, slots=True)
class Lengths:
    """Bounds of one answer in patches, and the ratio of patches to tokens that is a bad case."""

    min_len: int
    max_len: int
    ratio: float
    room: int


def lengths(request: SpeechRequest, layout: Layout, *, tokens: int, prefill: int) -> Lengths:
    """What the library is to be told about length.

    `tokens` is the size of the text, `prefill` that of everything read before the first patch.
    Raises TextTooLongError if the model's memory cannot hold the speech.
    """
    room = layout.max_length - prefill - 1
    least = ceil((request.min_seconds or 0) / layout.patch_seconds - 1e-9)
    if room < max(least, _LEAST_PATCHES_PER_TOKEN * tokens, MIN_LEN + 2):
        raise too_long(layout)
    ratio = request.retry_badcase_ratio_threshold or RETRY_RATIO
    if least >= tokens * ratio:  # asked for by the caller, so no bad case
        ratio = (least + 1) / tokens
    most = max(MAX_LEN, least)
    if request.max_seconds is not None:
        most = max(1, floor(request.max_seconds / layout.patch_seconds + 1e-9))
    # The library may stop once it has made min_len + 2 patches.
    return Lengths(max(MIN_LEN, least - 2), min(most, room), ratio, room)


def too_long(layout: Layout) -> TextTooLongError:
    """The error for text and prompt that do not fit together into the model."""
    message = "text and prompt are too long for this model; send the text in several requests"
    return TextTooLongError(message, errors=(FieldError("text", message, layout.max_length),))


def patches_of(clip: Clip, model: Any, *, pad_left: bool) -> "torch.Tensor":
    """Encode a recorded voice as latents: float32, shape (patches, patch_size, feat_dim).

    Equal to what the library makes of a file with the same samples, which it would read with
    torchaudio or librosa. Prompts are padded on the left, references on the right.
    """
    import torch

    vae = model.audio_vae
    samples = resample(clip.samples, clip.sample_rate_hz, vae.sample_rate)
    audio = torch.from_numpy(samples).unsqueeze(0)
    lacking = -audio.size(1) % (model.patch_size * model.chunk_size)
    audio = torch.nn.functional.pad(audio, (lacking, 0) if pad_left else (0, lacking))
    latents: torch.Tensor = vae.encode(audio.to(model.device), vae.sample_rate).cpu()
    return latents.view(vae.latent_dim, -1, model.patch_size).permute(1, 2, 0)


_BRACKETS = str.maketrans(dict.fromkeys("()（）", " "))


def _is_cjk(character: str) -> bool:
    """Chinese and Japanese writing, and its punctuation, take no space between sentences."""
    return "\u3000" <= character <= "\u9fff" or "\uff00" <= character <= "\uffef"


def _unspeakable(message: str) -> UnspeakableTextError:
    return UnspeakableTextError(f"text: {message}", errors=(FieldError("text", message),))
