"""What the settings of VoxCPM's engine do, as a client and an operator notice it."""

import io
from pathlib import Path

import numpy as np
import soundfile

from tests.servers import Running, make_settings, serving

GENERATE = "/api/v1/text-to-speech/generate"
CLONE = "/api/v1/text-to-speech/clone"
BODY = {"text": "Good morning.", "max_seconds": 1.6, "seed": 3}


def samples(wav: bytes) -> np.ndarray:
    return soundfile.read(io.BytesIO(wav), dtype="int16")[0].astype(int)


def test_the_official_library_can_be_chosen_and_says_the_same(
    tmp_path: Path, voxcpm: Running, checkpoints: dict[str, Path]
) -> None:
    settings = make_settings(
        tmp_path, tts={"model_name": str(checkpoints["voxcpm-0.5b"]), "engine": "reference"}
    )
    with serving(settings) as server:
        of_the_library = server.client.post(GENERATE, json=BODY)
    of_the_engine = voxcpm.client.post(GENERATE, json=BODY)
    assert of_the_library.status_code == of_the_engine.status_code == 200
    left, right = samples(of_the_library.content), samples(of_the_engine.content)
    assert len(left) == len(right)
    assert np.abs(left - right).max() <= 2
    assert np.abs(left).max() > 300


def test_encoded_voices_are_kept_where_the_operator_wants_them(
    tmp_path: Path, checkpoints: dict[str, Path], recording: bytes
) -> None:
    settings = make_settings(
        tmp_path,
        tts={
            "model_name": str(checkpoints["voxcpm-0.5b"]),
            "voice_cache_dir": tmp_path / "voices",
        },
    )
    with serving(settings) as server:
        answers = [
            server.client.post(
                CLONE,
                data={"text": "Hi.", "prompt_text": "Hello.", "max_seconds": "0.8", "seed": "1"},
                files={"prompt_wav": recording},
            )
            for _ in range(2)
        ]
    assert [answer.status_code for answer in answers] == [200, 200]
    assert answers[0].content == answers[1].content
    assert [path.suffix for path in (tmp_path / "voices").iterdir()] == [".voice"]


def test_int8_weights_speak(tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    settings = make_settings(
        tmp_path,
        tts={
            "model_name": str(checkpoints["voxcpm-1.5"]),
            "quantization": "int8-lm",
            "dtype": "bfloat16",
        },
    )
    with serving(settings) as server:
        answer = server.client.post(GENERATE, json=BODY)
    assert answer.status_code == 200
    assert np.abs(samples(answer.content)).max() > 300
