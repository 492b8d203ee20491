"""POST /api/v1/text-to-speech/generate: speech, headers, fallback, refusals."""

import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.checkpoints import build_checkpoint
from tests.conftest import ARCHITECTURES
from tests.library import assert_same_speech, decoded, library_speech
from tests.servers import Running, make_settings, serving

GENERATE = "/api/v1/text-to-speech/generate"
TEXT = "The quick brown fox jumps over the lazy dog."


def generate(server: Running, **body: Any) -> httpx.Response:
    return server.client.post(GENERATE, json={"text": TEXT, **body})


def fields_of(response: httpx.Response) -> list[str]:
    return [error["field"] for error in response.json()["errors"]]


# -- the embedded voice ----------------------------------------------------------------------


def test_a_newcomer_hears_speech_and_is_told_whose_it_is(bare: Running) -> None:
    response = generate(bare)

    samples, rate = decoded(response.content)
    assert response.status_code == 200
    assert response.headers["content-type"] == "audio/wav"
    assert response.headers["content-disposition"] == 'attachment; filename="speech.wav"'
    assert response.headers["x-model"] == "hibari/heart"
    assert response.headers["x-model-fallback"] == "openbmb/VoxCPM-0.5B; reason=unavailable"
    assert rate == 24_000 == int(response.headers["x-sample-rate"])
    assert 2 < len(samples) / rate < 4
    assert abs(len(samples) / rate - float(response.headers["x-audio-duration"])) < 0.001
    assert np.abs(samples).max() > 3_000
    assert response.headers["x-request-id"]
    assert "speech;dur=" in response.headers["server-timing"]
    riff_size, data_size = struct.unpack_from("<4xI", response.content)[0], 2 * len(samples)
    assert riff_size == len(response.content) - 8
    assert response.content.endswith(samples.tobytes())
    assert int(response.headers["content-length"]) == 44 + data_size


def test_the_embedded_voice_named_is_no_fallback(bare: Running) -> None:
    response = generate(bare, model="hibari/heart", voice="heart")
    assert response.status_code == 200
    assert "x-model-fallback" not in response.headers


def test_a_seed_repeats_the_audio_and_is_always_returned(bare: Running) -> None:
    first = generate(bare)
    again = generate(bare, seed=int(first.headers["x-seed"]))
    other = generate(bare, seed=1)
    assert again.content == first.content
    assert other.content != first.content


@pytest.mark.parametrize(
    "fields",
    [{"cfg_value": 2.0}, {"inference_timesteps": 10}, {"max_seconds": 3}, {"retry_badcase": True}],
)
def test_nothing_is_spoken_by_a_stand_in_that_cannot_honour_it(
    bare: Running, fields: dict[str, Any]
) -> None:
    response = generate(bare, **fields)
    assert response.status_code == 503
    assert response.json()["type"] == "model-unavailable"
    assert int(response.headers["retry-after"]) >= 1


@pytest.mark.parametrize("text", ["你好，世界。", "مرحبا بالعالم", "Привет"])
def test_text_that_the_stand_in_cannot_read_waits_for_the_default_model(
    bare: Running, text: str
) -> None:
    assert generate(bare, text=text).status_code == 503
    named = generate(bare, text=text, model="hibari/heart")
    assert named.status_code == 400
    assert named.json()["type"] == "unspeakable-text"
    assert fields_of(named) == ["text"]


@pytest.mark.parametrize("text", ["", "   \n\t ", "...", "🙂🙂"])
def test_nothing_to_say_is_refused(bare: Running, text: str) -> None:
    response = generate(bare, text=text, model="hibari/heart")
    assert response.status_code == 400
    assert fields_of(response) == ["text"]


@pytest.mark.parametrize("field", ["cfg_value", "style", "denoise", "normalize", "min_seconds"])
def test_a_field_that_the_model_cannot_honour_is_refused_by_name(bare: Running, field: str) -> None:
    value: Any = {"style": "calm", "denoise": True, "normalize": True}.get(field, 2)
    response = generate(bare, model="hibari/heart", **{field: value})
    assert response.status_code == 400
    assert response.json()["type"] == "unsupported-parameter"
    assert fields_of(response) == [field]


def test_an_unknown_voice_is_refused_with_those_there_are(bare: Running) -> None:
    response = generate(bare, model="hibari/heart", voice="emma")
    assert response.status_code == 400
    assert "heart" in response.json()["detail"]


def test_a_named_model_is_never_replaced(bare: Running) -> None:
    response = generate(bare, model="openbmb/VoxCPM-0.5B")
    assert response.status_code == 503
    assert response.json()["type"] == "model-unavailable"


def test_without_a_fallback_the_answer_is_503(tmp_path: Path) -> None:
    with serving(make_settings(tmp_path, tts={"fallback_model_name": ""})) as server:
        response = generate(server)
        assert response.status_code == 503
        assert response.json()["type"] in {"model-loading", "model-unavailable"}
        assert "retry-after" in response.headers


def test_the_answer_comes_at_the_rate_that_was_asked_for(bare: Running) -> None:
    native, _ = decoded(generate(bare, seed=1).content)
    for rate in (8_000, 16_000, 48_000):
        response = generate(bare, seed=1, sample_rate=rate)
        samples, decoded_rate = decoded(response.content)
        assert decoded_rate == rate == int(response.headers["x-sample-rate"])
        assert abs(len(samples) - len(native) * rate / 24_000) <= 2


# -- VoxCPM ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_speech_equals_the_official_library_with_the_same_seed(
    voxcpm: Running, checkpoints: dict[str, Path], name: str
) -> None:
    response = generate(voxcpm, model=f"tiny/{name}", seed=7, max_seconds=1.6)
    patches = 10 if name != "voxcpm-0.5b" else 20
    expected = library_speech(checkpoints[name], TEXT, seed=7, max_len=patches)

    samples, rate = decoded(response.content)
    assert rate == ARCHITECTURES[name]  # type: ignore[index]
    assert len(samples) == round(1.6 * rate)
    assert_same_speech(response.content, expected)


def test_every_parameter_reaches_the_library(voxcpm: Running, checkpoints: dict[str, Path]) -> None:
    response = generate(
        voxcpm,
        seed=3,
        cfg_value=1.3,
        inference_timesteps=4,
        max_seconds=0.8,
        retry_badcase=False,
        retry_badcase_ratio_threshold=2.5,
    )
    expected = library_speech(
        checkpoints["voxcpm-0.5b"],
        TEXT,
        seed=3,
        cfg_value=1.3,
        inference_timesteps=4,
        max_len=10,
        retry_badcase=False,
        retry_badcase_ratio_threshold=2.5,
    )
    assert_same_speech(response.content, expected)


def test_a_style_is_put_before_the_text_without_its_own_brackets(
    voxcpm: Running, checkpoints: dict[str, Path]
) -> None:
    response = generate(
        voxcpm, model="tiny/voxcpm2", style="a calm (old) voice", seed=1, max_seconds=0.8
    )
    expected = library_speech(
        checkpoints["voxcpm2"], f"(a calm old voice){TEXT}", seed=1, max_len=5
    )
    assert_same_speech(response.content, expected)
    refused = generate(voxcpm, model="tiny/voxcpm-1.5", style="calm")
    assert refused.status_code == 400
    assert fields_of(refused) == ["style"]


def test_a_control_token_in_a_text_is_read_and_not_obeyed(
    voxcpm: Running, checkpoints: dict[str, Path]
) -> None:
    written = "One <|audio_start|> two."
    response = generate(voxcpm, text=written, seed=1, max_seconds=0.8)
    obeyed, read = (
        library_speech(checkpoints["voxcpm-0.5b"], text, seed=1, max_len=10)
        for text in (written, "One < |audio_start|> two.")
    )
    assert not np.array_equal(obeyed, read)
    assert_same_speech(response.content, read)


def test_speech_that_never_ends_is_flagged_after_the_last_attempt(voxcpm: Running) -> None:
    response = generate(
        voxcpm, text="Hi.", retry_badcase_max_times=1, retry_badcase_ratio_threshold=2
    )
    assert response.status_code == 200
    assert response.headers["x-bad-case"] == "true"
    short = generate(voxcpm, max_seconds=0.8)
    assert "x-bad-case" not in short.headers


def test_speech_that_ends_by_itself_has_at_least_min_seconds(tmp_path: Path) -> None:
    directory = build_checkpoint(tmp_path / "stops", "voxcpm-1.5", stops=True)
    settings = make_settings(tmp_path, tts={"model_name": str(directory)})
    with serving(settings) as server:
        durations = [
            float(generate(server, **fields).headers["x-audio-duration"])
            for fields in ({}, {"min_seconds": 1.7}, {"min_seconds": 4.0})
        ]
    assert durations == [0.64, 1.76, 4.0]


def test_normalization_is_for_languages_that_the_library_knows(
    voxcpm: Running, checkpoints: dict[str, Path]
) -> None:
    spelled = generate(voxcpm, text="It costs $5.", normalize=True, seed=1, max_seconds=0.8)
    expected = library_speech(
        checkpoints["voxcpm-0.5b"], "It costs $5.", seed=1, max_len=10, normalize=True
    )
    assert_same_speech(spelled.content, expected)
    arabic = generate(voxcpm, text="لدي ٣ كتب", normalize=True)
    assert arabic.status_code == 400
    assert fields_of(arabic) == ["normalize"]
    symbols = generate(voxcpm, text="a < b and c > d", normalize=True)
    assert symbols.status_code in {200, 400}


def test_text_that_does_not_fit_into_the_model_is_refused_at_once(voxcpm: Running) -> None:
    response = generate(voxcpm, text="word " * 900)
    assert response.status_code == 400
    assert response.json()["type"] == "text-too-long"
    assert response.json()["errors"][0]["limit"] > 0


def test_eight_at_once_say_what_each_says_alone(voxcpm: Running) -> None:
    requests = [
        {
            "text": f"Number {n}.",
            "seed": n,
            "max_seconds": 0.8 + 0.16 * (n % 3),
            "model": f"tiny/{list(ARCHITECTURES)[n % 3]}",
        }
        for n in range(8)
    ]
    alone = [generate(voxcpm, **body).content for body in requests]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda body: generate(voxcpm, **body).content, requests))
    assert together == alone


def test_a_directory_as_model_name_is_served_as_local_and_its_path_stays_secret(
    tmp_path: Path, checkpoints: dict[str, Path]
) -> None:
    directory = checkpoints["voxcpm2"]
    with serving(make_settings(tmp_path, tts={"model_name": str(directory)})) as server:
        response = generate(server, max_seconds=0.5)
        assert response.headers["x-model"] == "local/voxcpm2"
        assert "x-model-fallback" not in response.headers
        everything = [server.client.get(path) for path in ("/api/v1/models", "/openapi.json")]
        everything += [generate(server, model=str(directory)), response]
        for answer in everything:
            assert str(directory.parent) not in answer.text + str(answer.headers)


# -- refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "field", "limit"),
    [
        ({"cfg_value": 0.05}, "cfg_value", 0.1),
        ({"cfg_value": 11}, "cfg_value", 10),
        ({"inference_timesteps": 1}, "inference_timesteps", 2),
        ({"inference_timesteps": 101}, "inference_timesteps", 100),
        ({"seed": -1}, "seed", 0),
        ({"seed": 2**32}, "seed", 2**32 - 1),
        ({"sample_rate": 7_999}, "sample_rate", 8_000),
        ({"retry_badcase_max_times": 0}, "retry_badcase_max_times", 1),
        ({"retry_badcase_ratio_threshold": 1}, "retry_badcase_ratio_threshold", 2),
        ({"text": "x" * 5_001}, "text", 5_000),
        ({"max_seconds": 100_000}, "max_seconds", 327.68),
        ({"min_seconds": 3, "max_seconds": 2}, "min_seconds", 2),
        ({"format": "mp3"}, "format", None),
        ({"stream": True}, "stream", None),
        ({"voice": "nobody"}, "voice", None),
        ({"denoise": True}, "denoise", None),
    ],
)
def test_a_wrong_field_is_named_with_its_limit(
    voxcpm: Running, fields: dict[str, Any], field: str, limit: float | None
) -> None:
    response = generate(voxcpm, model="openbmb/VoxCPM-0.5B", **fields)
    assert response.status_code == 400
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json()["errors"][0]["field"] == field
    assert response.json()["errors"][0].get("limit") == limit


@pytest.mark.parametrize("raw", ['{"text":"a","cfg_value":NaN}', '{"text":"\\ud800"}', "[]", "{"])
def test_hostile_json_is_a_400(voxcpm: Running, raw: str) -> None:
    response = voxcpm.client.post(
        GENERATE, content=raw, headers={"Content-Type": "application/json"}
    )
    assert response.status_code == 400
    assert response.json()["type"] == "validation"


def test_an_unknown_model_is_not_found(bare: Running) -> None:
    for name in ("nobody/nothing", "../../etc/passwd", "/etc", "hibari/heart/x"):
        response = generate(bare, model=name)
        assert response.status_code == 404
        assert response.json()["type"] == "model-not-found"


def test_a_body_over_the_limit_is_refused(tmp_path: Path) -> None:
    settings = make_settings(tmp_path, tts={"max_text_chars": 100})
    with serving(settings) as server:
        response = server.client.post(GENERATE, content=b" " * (2**20 + 4_096))
        assert response.status_code == 413
        assert response.json()["type"] == "payload-too-large"
        assert str(12 * 100 + 2**16) in response.json()["detail"]
        flood = {"text": "Hi.", **{f"k{n}": 1 for n in range(3_000)}}
        many = server.client.post(GENERATE, json=flood)
        assert many.status_code == 400
        assert len(many.json()["errors"]) == 1
