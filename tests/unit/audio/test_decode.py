"""Uploads into clips: what every container decodes to, and what hostile files may not do."""

import io
import random
import resource
import socket
import struct
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile

from app.audio.decode import ClipLimits, decode_clip
from app.domain.audio import Clip
from app.errors import AudioRejectedError, UnsupportedMediaTypeError
from tests.recordings import (
    CONTAINERS,
    HARMLESS,
    HOSTILE,
    TONE_HZ,
    encode,
    make_recording,
    texts_that_point_elsewhere,
    voice,
)

LIMITS = ClipLimits()
# Of the hostile files: what is no audio to us, and the limits that the others break.
NO_AUDIO = {
    *("not audio", "a picture", "sdp", "ffconcat", "playlist"),
    *("half an m4a", "mov index, compressed"),
}
BROKEN_LIMITS = {
    "wav header alone": 1.0,
    "wav states 10 s, holds 0.5": 1.0,
    "flac states 5 s, holds two hours": 30.0,
    "flac of two hours of zeros": 30.0,
    "aac of two hours": 30.0,
    "other full scale": 8.0,
    "8 channels": 2,
    "384 kHz": 192_000,
    "4 kHz": 8_000,
    "mp4 index of one size": 30.0,
    "mp4 fragment without sizes": 30.0,
    "mov chunks of everything": 30.0,
}


@pytest.fixture(autouse=True)
def temporary_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a temporary file would appear."""
    directory = tmp_path / "temporary"
    directory.mkdir()
    monkeypatch.setenv("TMPDIR", str(directory))
    monkeypatch.setattr(tempfile, "tempdir", str(directory))
    return directory


def decode(data: bytes, limits: ClipLimits = LIMITS) -> Clip:
    return decode_clip(data, field="prompt_wav", limits=limits)


def rejection(data: bytes, limits: ClipLimits = LIMITS) -> AudioRejectedError:
    with pytest.raises(AudioRejectedError) as caught:
        decode(data, limits)
    return caught.value


def loudest_hz(clip: Clip) -> float:
    spectrum = np.abs(np.fft.rfft(clip.samples * np.hanning(len(clip.samples))))
    return float(np.argmax(spectrum) * clip.sample_rate_hz / len(clip.samples))


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("container", CONTAINERS)
def test_every_container_decodes_to_the_recording(container: str, channels: int) -> None:
    clip = decode(make_recording(2.0, 48_000, container, channels))

    assert clip.sample_rate_hz == 48_000
    assert clip.samples.dtype == np.float32
    assert clip.samples.ndim == 1
    # Codecs of whole frames end with the frame.
    assert clip.duration_seconds == pytest.approx(2.0, abs=0.05)
    assert loudest_hz(clip) == pytest.approx(TONE_HZ, abs=1.0)
    assert np.abs(clip.samples).max() == pytest.approx(np.abs(voice(2, 48_000)).max(), abs=0.03)


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize(
    "container",
    [
        *("wav", "wav-u8", "wav-24", "wav-32", "wav-float", "wav-double", "wav-ulaw", "wav-ima"),
        *("flac", "ogg", "opus", "mp3", "aiff", "caf"),
    ],
)
def test_samples_are_those_of_another_decoder(container: str, channels: int) -> None:
    data = make_recording(2.0, 48_000, container, channels)
    expected, sample_rate_hz = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)

    clip = decode(data)

    assert clip.sample_rate_hz == sample_rate_hz
    np.testing.assert_allclose(clip.samples, expected.mean(axis=1), atol=1e-5)


@pytest.mark.parametrize("container", ["wav", "flac", "mp3", "m4a", "aiff", "alac"])
@pytest.mark.parametrize("sample_rate_hz", [8_000, 22_050, 44_100])
def test_the_rate_is_the_files_own(container: str, sample_rate_hz: int) -> None:
    clip = decode(make_recording(1.5, sample_rate_hz, container))

    assert clip.sample_rate_hz == sample_rate_hz
    assert clip.duration_seconds == pytest.approx(1.5, abs=0.3)
    assert loudest_hz(clip) == pytest.approx(TONE_HZ, abs=1.0)


@pytest.mark.parametrize("container", ["wav", "wav-float", "flac"])
def test_channels_are_mixed_by_their_mean(container: str) -> None:
    left = voice(1.5, 16_000)
    samples = np.stack([left, np.zeros_like(left)], axis=1)

    clip = decode(encode(samples, 16_000, container))

    np.testing.assert_allclose(clip.samples, left / 2, atol=1e-4)


def test_the_first_of_two_audio_streams_is_taken() -> None:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as output:
        streams = [output.add_stream("pcm_s16le", rate=16_000, layout="mono") for _ in range(2)]
        for stream, loudness in zip(streams, (0.25, 0.75), strict=True):
            pcm = np.full((1, 32_000), int(32_768 * loudness), np.int16)
            pcm[:, ::2] *= -1
            frame = av.AudioFrame.from_ndarray(pcm, "s16", "mono")
            frame.sample_rate = 16_000
            output.mux(stream.encode(frame))
            output.mux(stream.encode(None))

    assert np.abs(decode(buffer.getvalue()).samples).max() == 0.25


def test_a_picture_beside_the_audio_does_no_harm() -> None:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as output:
        video = output.add_stream("mjpeg", rate=1, width=64, height=64, pix_fmt="yuvj420p")
        audio = output.add_stream("pcm_s16le", rate=16_000, layout="mono")
        output.mux(video.encode(av.VideoFrame(64, 64, "yuvj420p")))
        output.mux(video.encode(None))
        pcm = (voice(2, 16_000) * 32_767).astype(np.int16)[np.newaxis]
        frame = av.AudioFrame.from_ndarray(pcm, "s16", "mono")
        frame.sample_rate = 16_000
        output.mux(audio.encode(frame))

    assert decode(buffer.getvalue()).duration_seconds == 2.0


def test_a_file_with_a_picture_alone_has_no_audio() -> None:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as output:
        video = output.add_stream("mjpeg", rate=1, width=64, height=64, pix_fmt="yuvj420p")
        output.mux(video.encode(av.VideoFrame(64, 64, "yuvj420p")))
        output.mux(video.encode(None))

    with pytest.raises(UnsupportedMediaTypeError, match="prompt_wav: the file has no audio"):
        decode(buffer.getvalue())


def test_an_audio_codec_that_is_not_listed_is_unreadable() -> None:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as output:
        stream = output.add_stream("ac3", rate=48_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(voice(2, 48_000)[np.newaxis], "fltp", "mono")
        frame.sample_rate = 48_000
        output.mux(stream.encode(frame))
        output.mux(stream.encode(None))

    with pytest.raises(UnsupportedMediaTypeError, match="prompt_wav: the file cannot be read"):
        decode(buffer.getvalue())


@pytest.mark.parametrize(
    ("seconds", "limit"), [(0.999, 1.0), (1.0, None), (30.0, None), (30.001, 30.0)]
)
def test_a_clip_at_a_limit_is_within_it(seconds: float, limit: float | None) -> None:
    data = make_recording(seconds, 8_000, "wav")
    if limit is None:
        assert decode(data).duration_seconds == seconds
    else:
        assert [error.limit for error in rejection(data).errors] == [limit]


def test_other_limits_are_kept() -> None:
    stereo = make_recording(2.0, 16_000, "wav", 2)

    for limits, limit in [
        (replace(LIMITS, max_channels=1), 1),
        (replace(LIMITS, min_sample_rate_hz=16_001), 16_001),
        (replace(LIMITS, max_sample_rate_hz=15_999), 15_999),
        (replace(LIMITS, max_seconds=1.5), 1.5),
        (replace(LIMITS, min_seconds=2.5), 2.5),
    ]:
        error = rejection(stereo, limits)
        assert [each.limit for each in error.errors] == [limit]
        assert f"{limit:g}" in error.detail


def test_the_length_is_counted_at_the_rate_that_is_decoded() -> None:
    # Opus is always decoded at 48 kHz, whatever was recorded.
    assert decode(make_recording(2.0, 8_000, "opus")).sample_rate_hz == 48_000


def test_what_is_a_little_over_full_scale_is_clipped() -> None:
    samples = 4 * voice(2, 16_000)[:, np.newaxis]

    clip = decode(encode(samples, 16_000, "wav-float"))

    np.testing.assert_array_equal(clip.samples, np.clip(samples[:, 0], -1, 1))


def test_a_quiet_clip_is_not_silence() -> None:
    assert decode(encode(1e-3 * voice(2, 16_000)[:, np.newaxis], 16_000, "wav-float"))


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused(name: str, temporary_directory: Path) -> None:
    data = HOSTILE[name]()
    memory_before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    cpu, wall = time.thread_time(), time.monotonic()

    expected = UnsupportedMediaTypeError if name in NO_AUDIO else AudioRejectedError
    with pytest.raises(expected) as caught:
        decode(data)

    # The processor's time, which a busy machine does not stretch; the other is for waiting.
    assert time.thread_time() - cpu < 1.0
    assert time.monotonic() - wall < 5.0
    memory_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory_before_kib
    assert memory_kib < 150 * 1024
    assert list(temporary_directory.iterdir()) == []
    detail = caught.value.detail
    assert detail.startswith("prompt_wav: ")
    for word in ("Invalid data", "Errno", "avcodec", "<none>", "passwd", "127.0.0.1"):
        assert word not in detail
    if name not in NO_AUDIO:
        limit = BROKEN_LIMITS.get(name)
        assert [(error.field, error.limit) for error in caught.value.errors] == [
            ("prompt_wav", limit)
        ]
        assert limit is None or f"{limit:.0f}" in detail


def test_every_name_is_one_of_a_hostile_file() -> None:
    assert NO_AUDIO | BROKEN_LIMITS.keys() <= HOSTILE.keys()


@pytest.mark.parametrize("name", HARMLESS)
def test_harmless_files_are_heard(name: str) -> None:
    data = HARMLESS[name]()
    cpu = time.thread_time()

    clip = decode(data)

    assert time.thread_time() - cpu < 1.0
    assert clip.duration_seconds == pytest.approx(2.0, abs=0.15)


@pytest.mark.parametrize("kind", ["sdp", "ffconcat", "playlist"])
def test_nothing_outside_the_upload_is_opened(kind: str, tmp_path: Path) -> None:
    # A recording that would decode, and a listener that would hear.
    target = tmp_path / "clip.wav"
    target.write_bytes(make_recording(2.0, 16_000, "wav"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0)
        port = listener.getsockname()[1]
        text = texts_that_point_elsewhere(str(target), port=port)[kind]
        started = time.monotonic()

        with pytest.raises(UnsupportedMediaTypeError):
            decode(text)

        assert time.monotonic() - started < 1.0
        with pytest.raises(BlockingIOError):
            listener.accept()


def with_edits(mp4: bytes, rows: bytes) -> bytes:
    """An MP4 file, its index last, with another edit list before the one of its track."""
    edits = struct.pack(">II", 0, len(rows) // 12) + rows
    box = struct.pack(">I", len(edits) + 8) + b"elst" + edits
    at = mp4.index(b"elst") - 4
    edited = mp4[:at] + mp4[at + int.from_bytes(mp4[at : at + 4], "big") :]
    edited = edited[:at] + box + edited[at:]
    for name in (b"moov", b"trak", b"edts"):
        place = mp4.index(name) - 4
        size = int.from_bytes(mp4[place : place + 4], "big") + len(edited) - len(mp4)
        edited = edited[:place] + size.to_bytes(4, "big") + edited[place + 4 :]
    return edited


def test_edits_of_an_mp4_are_kept() -> None:
    # Milliseconds to play, the sample to begin with, the speed.
    rows = struct.pack(">IiI", 1_000, 16_000, 0x10000)

    clip = decode(with_edits(make_recording(3.0, 16_000, "m4a"), rows))

    assert clip.duration_seconds == pytest.approx(1.0, abs=0.15)


def test_ten_thousand_edits_are_not_followed() -> None:
    rows = 10_000 * struct.pack(">IiI", 3_000, 0, 0x10000)

    clip = decode(with_edits(make_recording(3.0, 16_000, "m4a"), rows))

    assert clip.duration_seconds == pytest.approx(3.0, abs=0.2)


def test_a_container_that_is_not_listed_is_unreadable() -> None:
    buffer = io.BytesIO()
    soundfile.write(buffer, voice(2, 16_000), 16_000, format="AU", subtype="PCM_16")

    with pytest.raises(UnsupportedMediaTypeError, match="prompt_wav: the file cannot be read"):
        decode(buffer.getvalue())


def test_one_bad_packet_is_passed_over_and_many_are_not() -> None:
    data = make_recording(3.0, 16_000, "flac")
    frames = [at for at in range(len(data)) if data.startswith(b"\xff\xf8", at)]
    one = bytearray(data)
    one[frames[3] + 20] ^= 0xFF
    assert decode(bytes(one)).duration_seconds == pytest.approx(3.0, abs=0.6)

    many = bytearray(make_recording(20.0, 16_000, "aac"))
    starts = [at for at in range(len(many)) if many.startswith(b"\xff\xf1", at)]
    for at in starts[20:200]:
        many[at + 7 : at + 40] = b"\xff" * 33
    assert "damaged" in rejection(bytes(many)).detail


def test_damaged_files_raise_nothing_but_our_errors() -> None:
    source = random.Random(20_240)
    recordings = [make_recording(1.2, 16_000, container) for container in CONTAINERS]
    ends_at = time.monotonic() + 3.0
    refused = tried = 0
    while tried < 400 and time.monotonic() < ends_at:
        tried += 1
        damaged = _damage(source.choice(recordings), source)
        try:
            clip = decode(damaged)
        except (AudioRejectedError, UnsupportedMediaTypeError):
            refused += 1
        else:
            assert 1.0 <= clip.duration_seconds <= 30.0
            assert np.abs(clip.samples).max() <= 1.0
    assert 0 < refused < tried
    # Nothing of them is left in this thread.
    assert decode(make_recording(1.2, 16_000, "wav"))


def _damage(data: bytes, source: random.Random) -> bytes:
    damaged = bytearray(data)
    reach = len(damaged) if source.random() < 0.4 else min(1_500, len(damaged))
    for _ in range(source.choice((1, 3, 10, 100))):
        at = source.randrange(reach)
        kind = source.random()
        if kind < 0.5:
            damaged[at : at + 1] = source.randbytes(1)
        elif kind < 0.8:
            damaged[at : at + 4] = source.choice((b"\xff" * 4, bytes(4), b"\x7f\xff\xff\xff"))
        elif kind < 0.9:
            del damaged[at : at + source.randrange(1, 50)]
        else:
            damaged[at:at] = damaged[at : at + source.randrange(1, 300)]
    if source.random() < 0.15:
        del damaged[source.randrange(len(damaged)) :]
    return bytes(damaged)


def test_decoding_ends_when_its_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.audio.decode._MOST_CPU_SECONDS", 0.0)

    assert "too long to decode" in rejection(make_recording(2.0, 16_000, "wav")).detail


def test_threads_decode_side_by_side() -> None:
    recordings = [make_recording(2.0, 16_000, name) for name in ("wav", "mp3", "m4a", "ogg")]
    alone = [decode(data).samples for data in recordings]

    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda data: decode(data).samples, recordings * 5))

    for number, samples in enumerate(together):
        np.testing.assert_array_equal(samples, alone[number % len(alone)])


def test_importing_the_module_does_not_import_the_decoder() -> None:
    script = "import sys, app.audio.decode; sys.exit('av' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
