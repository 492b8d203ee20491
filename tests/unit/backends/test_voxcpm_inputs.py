"""What VoxCPM is given: text, transcripts, seconds as patches."""

import pytest

from app.backends.tts.voxcpm.inputs import joined_transcript, lengths, normalized, spoken_text
from app.backends.tts.voxcpm.layout import PUBLISHED
from app.domain.speech import SpeechRequest
from app.errors import TextTooLongError, UnspeakableTextError

FIRST = PUBLISHED["openbmb/VoxCPM-0.5B"]
THIRD = PUBLISHED["openbmb/VoxCPM2"]


@pytest.mark.parametrize(
    ("prompt_text", "text", "joined"),
    [
        ("One two.", "Three.", "One two. Three."),
        ("  One\n two. ", "Three.", "One two. Three."),
        ("你好。", "世界", "你好。世界"),
        ("你好。", "World", "你好。World"),
        ("Hello.", "世界", "Hello.世界"),
    ],
)
def test_a_transcript_is_joined_as_its_writing_asks(
    prompt_text: str, text: str, joined: str
) -> None:
    assert joined_transcript(prompt_text, text) + text == joined


def test_text_is_one_line_with_the_style_in_front() -> None:
    assert spoken_text(SpeechRequest("a\n  b")) == "a b"
    assert spoken_text(SpeechRequest("a", style="（calm）(old)")) == "(calm old)a"


def test_seconds_become_patches() -> None:
    request = SpeechRequest("x", min_seconds=4.0, max_seconds=8.0)
    bounds = lengths(request, FIRST, tokens=40, prefill=41)
    assert (bounds.min_len, bounds.max_len) == (48, 100)
    assert bounds.ratio == 6.0


def test_a_minimum_beyond_the_ratio_is_no_bad_case() -> None:
    bounds = lengths(SpeechRequest("x", min_seconds=8.0), FIRST, tokens=3, prefill=4)
    assert 100 < 3 * bounds.ratio < 110


def test_a_minimum_above_the_usual_maximum_is_honoured() -> None:
    bounds = lengths(SpeechRequest("x", min_seconds=1_000), THIRD, tokens=900, prefill=901)
    assert bounds.max_len == 6_250


@pytest.mark.parametrize(("tokens", "prefill"), [(1_100, 1_101), (5, 4_095), (2_000, 5_000)])
def test_what_cannot_fit_is_refused(tokens: int, prefill: int) -> None:
    with pytest.raises(TextTooLongError):
        lengths(SpeechRequest("x"), FIRST, tokens=tokens, prefill=prefill)


def test_a_normalizer_that_fails_or_leaves_nothing_is_a_refusal() -> None:
    from voxcpm.utils.text_normalize import TextNormalizer

    normalizer = TextNormalizer()
    assert normalized("It costs $5.", normalizer) == "It costs five dollars."
    for text in ("🙂", "```all code```"):
        with pytest.raises(UnspeakableTextError):
            normalized(text, normalizer)
