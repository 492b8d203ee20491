"""POST /api/v1/text-to-speech/clone: the voice of a recording, and what is no recording."""

import tempfile
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.conftest import ARCHITECTURES
from tests.library import assert_same_speech, decoded, latents, library_clone
from tests.recordings import make_recording
from tests.servers import Running, make_settings, serving

CLONE = "/api/v1/text-to-speech/clone"
TEXT = "Good morning."


def clone(server: Running, files: dict[str, bytes], **form: Any) -> httpx.Response:
    return server.client.post(
        CLONE,
        data={"text": TEXT, "max_seconds": "0.8", "seed": "5", **form},
        files={field: ("../../voice.wav", data) for field, data in files.items()},
    )


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_clone_equals_the_library_fed_the_same_samples(
    voxcpm: Running, checkpoints: dict[str, Path], recording: bytes, name: str
) -> None:
    response = clone(
        voxcpm, {"prompt_wav": recording}, model=f"tiny/{name}", prompt_text="One two."
    )
    directory = checkpoints[name]
    prompt = {
        "prompt_text": "One two. ",
        "audio_feat": latents(directory, recording, pad_left=True),
        "mode": "continuation",
    }
    expected = library_clone(
        directory, TEXT, seed=5, prompt=prompt, max_len=10 if name == "voxcpm-0.5b" else 5
    )
    _, rate = decoded(response.content)
    assert rate == ARCHITECTURES[name]  # type: ignore[index]
    assert_same_speech(response.content, expected)


@pytest.mark.parametrize("field", ["reference_wav", "prompt_wav"])
def test_a_recording_without_a_transcript_is_a_reference_where_the_model_has_that(
    voxcpm: Running, checkpoints: dict[str, Path], recording: bytes, field: str
) -> None:
    response = clone(voxcpm, {field: recording}, model="tiny/voxcpm2")
    directory = checkpoints["voxcpm2"]
    prompt = {"ref_audio_feat": latents(directory, recording, pad_left=False), "mode": "reference"}
    expected = library_clone(directory, TEXT, seed=5, prompt=prompt, max_len=5)
    assert_same_speech(response.content, expected)


def test_reference_and_prompt_together(
    voxcpm: Running, checkpoints: dict[str, Path], recording: bytes
) -> None:
    other = make_recording(1.5, 16_000, "flac", 1)
    response = clone(
        voxcpm,
        {"reference_wav": recording, "prompt_wav": other},
        model="tiny/voxcpm2",
        prompt_text="One two.",
    )
    directory = checkpoints["voxcpm2"]
    prompt = {
        "ref_audio_feat": latents(directory, recording, pad_left=False),
        "audio_feat": latents(directory, other, pad_left=True),
        "prompt_text": "One two. ",
        "mode": "ref_continuation",
    }
    expected = library_clone(directory, TEXT, seed=5, prompt=prompt, max_len=5)
    assert_same_speech(response.content, expected)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_another_recording_or_transcript_gives_other_speech(
    voxcpm: Running, recording: bytes, name: str
) -> None:
    def speech(wav: bytes, transcript: str) -> np.ndarray:
        response = clone(voxcpm, {"prompt_wav": wav}, model=f"tiny/{name}", prompt_text=transcript)
        assert response.status_code == 200
        return decoded(response.content)[0]

    first = speech(recording, "One two.")
    assert not np.array_equal(first, speech(make_recording(2.5, 16_000, "wav", 1), "One two."))
    assert not np.array_equal(first, speech(recording, "Three four."))
    np.testing.assert_array_equal(first, speech(recording, "One two."))


@pytest.mark.parametrize("container", ["wav", "mp3", "flac", "ogg", "opus", "m4a", "webm"])
def test_any_common_container_serves(voxcpm: Running, container: str) -> None:
    wav = make_recording(1.5, 48_000, container, 2)
    response = clone(voxcpm, {"prompt_wav": wav}, prompt_text="One two.")
    assert response.status_code == 200


def test_cloning_never_falls_back(bare: Running, recording: bytes) -> None:
    response = bare.client.post(
        CLONE,
        data={"text": TEXT, "prompt_text": "One."},
        files={"prompt_wav": ("v.wav", recording)},
    )
    assert response.status_code == 503
    assert response.json()["type"] == "model-unavailable"
    assert "download" in response.json()["detail"] or "disk" in response.json()["detail"]


def test_the_embedded_voice_says_that_it_cannot_clone(bare: Running, recording: bytes) -> None:
    response = bare.client.post(
        CLONE,
        data={"text": TEXT, "prompt_text": "One.", "model": "hibari/heart"},
        files={"prompt_wav": ("v.wav", recording)},
    )
    assert response.status_code == 400
    assert [one["field"] for one in response.json()["errors"]] == ["prompt_wav", "prompt_text"]


@pytest.mark.parametrize(
    ("files", "form", "field"),
    [
        ((), {}, "prompt_wav"),
        ((), {"prompt_text": "One."}, "prompt_wav"),
        (("reference_wav",), {"prompt_text": "One.", "model": "tiny/voxcpm2"}, "prompt_text"),
        (("prompt_wav",), {}, "prompt_text"),
        (("reference_wav",), {}, "reference_wav"),
        (("prompt_wav",), {"prompt_text": "One.", "style": "calm"}, "style"),
        (
            ("prompt_wav",),
            {"prompt_text": "One.", "style": "calm", "model": "tiny/voxcpm2"},
            "style",
        ),
        (("prompt_wav",), {"prompt_text": "One.", "text": " "}, "text"),
        (("prompt_wav",), {"prompt_text": "One.", "format": "mp3"}, "format"),
    ],
)
def test_what_is_missing_or_too_much_is_named(
    voxcpm: Running, recording: bytes, files: tuple[str, ...], form: dict[str, str], field: str
) -> None:
    response = clone(voxcpm, dict.fromkeys(files, recording), **form)
    assert response.status_code == 400
    assert response.json()["errors"][0]["field"] == field


def test_a_file_field_that_holds_text_is_refused(voxcpm: Running) -> None:
    response = voxcpm.client.post(CLONE, data={"text": TEXT, "prompt_wav": "/etc/passwd"})
    assert response.status_code == 400


def test_a_file_over_the_limit_is_refused_by_name(
    tmp_path: Path, checkpoints: dict[str, Path]
) -> None:
    settings = make_settings(
        tmp_path, tts={"model_name": str(checkpoints["voxcpm2"]), "max_upload_bytes": 50_000}
    )
    wav = make_recording(3.0, 16_000, "wav", 1)
    with serving(settings) as server:
        response = clone(server, {"reference_wav": wav})
        assert response.status_code == 413
        assert "reference_wav" in response.json()["detail"]
        assert "50000" in response.json()["detail"]
        huge = clone(server, {"reference_wav": bytes(2 * 2**20)})
        assert huge.status_code == 413


def test_uploads_leave_nothing_on_disk(
    voxcpm: Running, recording: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Where the form parser and anyone else would put temporary files.
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    large = make_recording(29.0, 48_000, "wav", 1)
    clone(voxcpm, {"prompt_wav": large}, prompt_text="One two.")
    clone(voxcpm, {"prompt_wav": recording + bytes(2**21)}, prompt_text="One two.")
    clone(voxcpm, {"prompt_wav": b"no audio" * 2**18}, prompt_text="One two.")
    assert list(tmp_path.iterdir()) == []
