"""Makes recordings as uploads bring them: a voice-like tone in every container, and hostile files.

Nothing here is read from disk. What takes a while to make is made once in a process.
"""

import functools
import io
import struct
import zlib
from collections.abc import Callable
from typing import Any

import av
import numpy as np
import soundfile
from numpy.typing import NDArray

TONE_HZ = 220.0

# container -> (PyAV's name of the muxer, the encoder, options of the muxer)
_MUXERS: dict[str, tuple[str, str, dict[str, str]]] = {
    "mp3": ("mp3", "mp3", {}),
    "opus": ("ogg", "libopus", {}),
    "m4a": ("mp4", "aac", {}),
    "m4a-fragmented": (
        "mp4",
        "aac",
        {"movflags": "frag_keyframe+empty_moov+default_base_moof", "frag_duration": "200000"},
    ),
    "mov": ("mov", "pcm_s16le", {}),
    "alac": ("mp4", "alac", {}),
    "webm": ("webm", "libopus", {}),
    # As a browser's recorder writes it: no length stated anywhere.
    "webm-live": ("webm", "libopus", {"live": "1", "cluster_time_limit": "200"}),
    "aac": ("adts", "aac", {}),
}
# container -> (soundfile's name of the format, the subtype)
_SOUNDFILES: dict[str, tuple[str, str]] = {
    "wav": ("WAV", "PCM_16"),
    "wav-u8": ("WAV", "PCM_U8"),
    "wav-24": ("WAV", "PCM_24"),
    "wav-32": ("WAV", "PCM_32"),
    "wav-float": ("WAV", "FLOAT"),
    "wav-double": ("WAV", "DOUBLE"),
    "wav-ulaw": ("WAV", "ULAW"),
    "wav-ima": ("WAV", "IMA_ADPCM"),
    "flac": ("FLAC", "PCM_16"),
    "ogg": ("OGG", "VORBIS"),
    "aiff": ("AIFF", "PCM_16"),
    "caf": ("CAF", "PCM_16"),
}
CONTAINERS = (*_SOUNDFILES, *_MUXERS)


def voice(seconds: float, sample_rate_hz: int) -> NDArray[np.float32]:
    """A voice-like sound: harmonics of `TONE_HZ` that rise and fall, over a little noise."""
    moments = np.arange(round(seconds * sample_rate_hz)) / sample_rate_hz
    harmonics = sum(0.3 / k * np.sin(2 * np.pi * TONE_HZ * k * moments) for k in range(1, 5))
    noise = 1e-3 * np.random.default_rng(0).standard_normal(len(moments))
    return ((0.7 + 0.3 * np.sin(2 * np.pi * 3 * moments)) * harmonics + noise).astype(np.float32)


@functools.cache
def make_recording(
    seconds: float, sample_rate_hz: int = 48_000, container: str = "wav", channels: int = 1
) -> bytes:
    """A recording of `voice` as a file of one of `CONTAINERS`, the same in every channel."""
    samples = np.tile(voice(seconds, sample_rate_hz)[:, np.newaxis], (1, channels))
    return encode(samples, sample_rate_hz, container)


def encode(samples: NDArray[np.floating], sample_rate_hz: int, container: str) -> bytes:
    """Samples of shape (frames, channels) as a file of one of `CONTAINERS`."""
    buffer = io.BytesIO()
    if container in _SOUNDFILES:
        file_format, subtype = _SOUNDFILES[container]
        soundfile.write(buffer, samples, sample_rate_hz, format=file_format, subtype=subtype)
        return buffer.getvalue()
    muxer, codec, options = _MUXERS[container]
    layout = {1: "mono", 2: "stereo"}[samples.shape[1]]
    with av.open(buffer, "w", format=muxer, options=options) as output:
        stream: Any = output.add_stream(codec, rate=sample_rate_hz)
        stream.layout = layout
        for start in range(0, len(samples), 8192):
            planes = np.ascontiguousarray(samples[start : start + 8192].T, dtype=np.float32)
            frame = av.AudioFrame.from_ndarray(planes, "fltp", layout)
            frame.sample_rate = sample_rate_hz
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return buffer.getvalue()


def header_first(mp4: bytes) -> bytes:
    """The same MP4 file with its index before the audio, as files for the web have it."""
    boxes, at = [], 0
    while at < len(mp4):
        size = int.from_bytes(mp4[at : at + 4], "big")
        boxes.append(mp4[at : at + size])
        at += size
    index = next(box for box in boxes if box[4:8] == b"moov")
    moved = bytearray(index)
    table = moved.find(b"stco") + 8
    for row in range(int.from_bytes(moved[table : table + 4], "big")):
        place = table + 4 + 4 * row
        offset = int.from_bytes(moved[place : place + 4], "big") + len(moved)
        moved[place : place + 4] = offset.to_bytes(4, "big")
    rest = [box for box in boxes if box is not index]
    return b"".join([rest[0], bytes(moved), *rest[1:]])


def patched(data: bytes, name: bytes, offset: int, value: bytes) -> bytes:
    """The data with `value` written `offset` bytes after the end of the first `name`."""
    at = data.index(name) + len(name) + offset
    return data[:at] + value + data[at + len(value) :]


def half(data: bytes) -> bytes:
    """What arrives of an upload that breaks off."""
    return data[: len(data) // 2]


def _not_a_number() -> bytes:
    samples = voice(2, 16_000)
    samples[100] = np.nan
    return encode(samples[:, np.newaxis], 16_000, "wav-float")


def _infinite() -> bytes:
    samples = voice(2, 16_000).astype(np.float64)
    samples[100] = 1e300
    return encode(samples[:, np.newaxis], 16_000, "wav-double")


@functools.cache
def _two_hours_of_zeros() -> bytes:
    """A FLAC file of some 200 kB that decodes to 57.6 million samples."""
    buffer = io.BytesIO()
    zeros = np.zeros(8_000 * 600, np.int16)
    with soundfile.SoundFile(buffer, "w", 8_000, 1, format="FLAC", subtype="PCM_16") as file:
        for _ in range(12):
            file.write(zeros)
    return buffer.getvalue()


@functools.cache
def _two_hours_of_aac() -> bytes:
    """The ADTS frames of a quiet second, as often as two hours need."""
    second = encode(np.zeros((8_000, 1)), 8_000, "aac")
    frames = second.count(b"\xff\xf1")
    return second * (7_200 * 8_000 // (1_024 * frames) + 1)


def _flac_that_states(seconds: int, data: bytes, sample_rate_hz: int) -> bytes:
    # STREAMINFO: the last 32 of the 36 bits that hold the number of samples
    return patched(data, b"fLaC", 4 + 14, struct.pack(">I", seconds * sample_rate_hz))


def _wav_that_states(seconds: int, data: bytes, sample_rate_hz: int) -> bytes:
    return patched(data, b"data", 0, struct.pack("<I", seconds * sample_rate_hz * 2))


def _index_of_one_size() -> bytes:
    # One size for all samples, and a third of 2^31 bytes of index for them.
    return patched(
        make_recording(2.0, 16_000, "m4a"), b"stsz", 4, struct.pack(">II", 1, 30_000_000)
    )


def _fragment_without_sizes() -> bytes:
    fragmented = make_recording(2.0, 16_000, "m4a-fragmented")
    return patched(fragmented, b"trun", 0, struct.pack(">II", 1, 30_000_000))


def _chunks_of_everything() -> bytes:
    mov = make_recording(2.0, 16_000, "mov")
    return patched(mov, b"stsc", 4, struct.pack(">III", 1, 1, 2**31 - 1))


def _compressed_index() -> bytes:
    mp4 = make_recording(2.0, 16_000, "m4a")
    at = mp4.index(b"moov") - 4
    index = mp4[at:] + bytes(5_000_000)
    packed = struct.pack(">I", len(index)) + zlib.compress(index, 9)
    cmvd = struct.pack(">I", len(packed) + 8) + b"cmvd" + packed
    cmov = struct.pack(">I", len(cmvd) + 20) + b"cmov" + struct.pack(">I", 12) + b"dcomzlib" + cmvd
    return mp4[:at] + struct.pack(">I", len(cmov) + 8) + b"moov" + cmov


@functools.cache
def tags_that_inflate() -> bytes:
    """ID3 frames of 10 kB that inflate to 10 MB each, for the front of an MP3 file or a chunk."""

    def number(value: int) -> bytes:
        return bytes(value >> shift & 0x7F for shift in (21, 14, 7, 0))

    inflated = b"\0image/png\0\3\0" + bytes(10_000_000)
    packed = zlib.compress(inflated, 9)
    header = b"APIC" + number(len(packed) + 4) + b"\0\x09" + number(len(inflated))
    body = (header + packed) * 50
    return b"ID3\4\0\0" + number(len(body)) + body


def _wav_with(chunk: bytes) -> bytes:
    wav = make_recording(2.0, 16_000, "wav")
    at = wav.index(b"data")
    return wav[:at] + b"id3 " + struct.pack("<I", len(chunk)) + chunk + wav[at:]


def _empty_chunks() -> bytes:
    wav = make_recording(2.0, 16_000, "wav")
    return wav[: wav.index(b"data")] + bytes(4_000_000)


_SDP = """v=0
o=- 0 0 IN IP4 {host}
s=clip
c=IN IP4 {host}
t=0 0
m=audio {port} RTP/AVP 0
"""
_FFCONCAT = "ffconcat version 1.0\nfile '{path}'\n"
_PLAYLIST = """#EXTM3U
#EXT-X-TARGETDURATION:10
#EXTINF:10,
http://{host}:{port}/clip.wav
#EXTINF:10,
file://{path}
#EXT-X-ENDLIST
"""


def texts_that_point_elsewhere(
    path: str = "/etc/passwd", host: str = "127.0.0.1", port: int = 9
) -> dict[str, bytes]:
    """Small texts that make FFmpeg read a file of this machine or something on the network."""
    texts = {"sdp": _SDP, "ffconcat": _FFCONCAT, "playlist": _PLAYLIST}
    return {
        name: text.format(path=path, host=host, port=port).encode() for name, text in texts.items()
    }


# What an upload must never do any harm with, by name.
HOSTILE: dict[str, Callable[[], bytes]] = {
    "zero length": lambda: b"",
    "not audio": lambda: b"This is a text about recordings. " * 200,
    "a picture": lambda: b"\x89PNG\r\n\x1a\n" + bytes(5_000),
    "sdp": lambda: texts_that_point_elsewhere()["sdp"],
    "ffconcat": lambda: texts_that_point_elsewhere()["ffconcat"],
    "playlist": lambda: texts_that_point_elsewhere()["playlist"],
    "wav header alone": lambda: make_recording(2.0, 16_000, "wav")[:44],
    "wav states 10 s, holds 0.5": lambda: _wav_that_states(
        10, make_recording(0.5, 16_000, "wav"), 16_000
    ),
    "wav states 10 s, holds 5": lambda: _wav_that_states(
        10, make_recording(5.0, 16_000, "wav"), 16_000
    ),
    "flac states 10 s, holds 5": lambda: _flac_that_states(
        10, make_recording(5.0, 16_000, "flac"), 16_000
    ),
    "flac states 5 s, holds two hours": lambda: _flac_that_states(5, _two_hours_of_zeros(), 8_000),
    "flac of two hours of zeros": _two_hours_of_zeros,
    "aac of two hours": _two_hours_of_aac,
    "not a number": _not_a_number,
    "infinite": _infinite,
    "other full scale": lambda: encode(
        32_768 * voice(2, 16_000)[:, np.newaxis], 16_000, "wav-float"
    ),
    "silence": lambda: encode(np.zeros((32_000, 1)), 16_000, "wav"),
    "constant offset": lambda: encode(np.full((32_000, 1), 0.5), 16_000, "wav"),
    "8 channels": lambda: make_recording(2.0, 16_000, "wav", 8),
    "384 kHz": lambda: make_recording(1.0, 384_000, "wav"),
    "4 kHz": lambda: make_recording(2.0, 4_000, "wav"),
    "half a wav": lambda: half(make_recording(5.0, 16_000, "wav")),
    "half a flac": lambda: half(make_recording(5.0, 16_000, "flac")),
    "half an aiff": lambda: half(make_recording(5.0, 16_000, "aiff")),
    "half a webm": lambda: half(make_recording(5.0, 48_000, "webm")),
    "half an m4a": lambda: half(make_recording(5.0, 16_000, "m4a")),
    "half an m4a, index first": lambda: half(header_first(make_recording(5.0, 16_000, "m4a"))),
    "mp4 index of one size": _index_of_one_size,
    "mp4 fragment without sizes": _fragment_without_sizes,
    "mov chunks of everything": _chunks_of_everything,
    "mov index, compressed": _compressed_index,
    "wav of empty chunks": _empty_chunks,
}

# What looks like the above and is an honest clip inside.
HARMLESS: dict[str, Callable[[], bytes]] = {
    "mp3 after tags that inflate": lambda: tags_that_inflate() + make_recording(2.0, 16_000, "mp3"),
    "wav with tags that inflate": lambda: _wav_with(tags_that_inflate()),
    "wav of a stream": lambda: patched(
        make_recording(2.0, 16_000, "wav"), b"data", 0, b"\xff\xff\xff\xff"
    ),
    "metadata in no encoding": lambda: patched(
        make_recording(2.0, 16_000, "m4a"), b"Lavf", -4, b"\xff\xfe\xff\xfe"
    ),
}
