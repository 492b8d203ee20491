"""Whole WAV files."""

import io
import struct
import wave

import numpy as np
import pytest
import soundfile

from app.audio.decode import ClipLimits, decode_clip
from app.audio.wav import stated_wav_seconds, wav_bytes
from tests.recordings import patched, voice


def pcm(data: bytes) -> list[int]:
    with wave.open(io.BytesIO(data)) as file:
        return [value for (value,) in struct.iter_unpack("<h", file.readframes(file.getnframes()))]


@pytest.mark.parametrize("sample_rate_hz", [16_000, 44_100, 48_000])
def test_the_header_states_the_true_sizes(sample_rate_hz: int) -> None:
    data = wav_bytes(voice(0.5, sample_rate_hz), sample_rate_hz)

    assert data[:4] == b"RIFF"
    assert struct.unpack("<I", data[4:8]) == (len(data) - 8,)
    assert struct.unpack("<I", data[40:44]) == (len(data) - 44,)
    about = soundfile.info(io.BytesIO(data))
    assert (about.samplerate, about.channels, about.subtype) == (sample_rate_hz, 1, "PCM_16")
    assert about.frames == sample_rate_hz // 2


def test_beyond_full_scale_is_clipped_and_never_wrapped() -> None:
    samples = np.array([1.0, -1.0, 1.5, -1.5, 100.0, -100.0, np.inf, -np.inf], np.float32)

    assert pcm(wav_bytes(samples, 16_000)) == [32_767, -32_768] * 4


def test_values_are_rounded_to_the_nearest() -> None:
    steps = np.array([0.4, 0.6, -0.4, -0.6, 1.4, 1.6, 32_766.6, -32_767.6], np.float32)

    assert pcm(wav_bytes(steps / np.float32(32_768), 16_000)) == [
        0,
        1,
        0,
        -1,
        1,
        2,
        32_767,
        -32_768,
    ]


def test_every_16_bit_value_comes_back() -> None:
    values = np.arange(-32_768, 32_768, dtype=np.int16)

    samples = (values / 32_768).astype(np.float32)

    assert pcm(wav_bytes(samples, 16_000)) == values.tolist()


def test_a_written_file_decodes_to_what_was_written() -> None:
    samples = voice(1.5, 24_000)

    clip = decode_clip(wav_bytes(samples, 24_000), field="audio", limits=ClipLimits())

    assert clip.sample_rate_hz == 24_000
    np.testing.assert_allclose(clip.samples, samples, atol=0.5 / 32_768 + 1e-7)


def test_no_samples_are_an_empty_file() -> None:
    assert pcm(wav_bytes(np.zeros(0, np.float32), 16_000)) == []


def test_the_stated_length_is_the_headers_and_not_the_files() -> None:
    data = wav_bytes(voice(2, 16_000), 16_000)

    assert stated_wav_seconds(data) == 2.0
    assert stated_wav_seconds(data[:1_000]) == 2.0
    assert stated_wav_seconds(patched(data, b"data", 0, b"\xff\xff\xff\xff")) is None
    assert stated_wav_seconds(data[:36]) is None
    assert stated_wav_seconds(b"") is None
