"""An uploaded file in, one mono clip out: every container, every limit, every refusal.

Uploads are hostile until decoded. FFmpeg (through PyAV) reads them from memory, with a list of
containers and codecs and no protocols, one thread, no logging. What it would believe of a header
without a bound (indexes, compressed tags) is looked at first, and what it decodes is counted
while it comes. Two things must never happen here: `av.logging.set_level` (a decoder thread then
waits for the GIL for ever), and the text of an exception in a detail.
"""

import io
import itertools
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from app.audio.wav import stated_wav_seconds
from app.domain.audio import Clip, Samples
from app.errors import AppError, AudioRejectedError, UnsupportedMediaTypeError

if TYPE_CHECKING:
    from av import AudioFrame
    from av.container import InputContainer

_Planes = NDArray[np.generic]

_CODECS = (
    "aac,adpcm_ima_qt,adpcm_ima_wav,adpcm_ms,alac,flac,mp3,mp3float,opus,vorbis,"
    "pcm_alaw,pcm_mulaw,pcm_f32be,pcm_f32le,pcm_f64be,pcm_f64le,pcm_s16be,pcm_s16le,"
    "pcm_s24be,pcm_s24le,pcm_s32be,pcm_s32le,pcm_s8,pcm_u8"
)
_MOST_STREAMS = 16
_OPTIONS = {
    "format_whitelist": "wav,mp3,flac,ogg,matroska,webm,mov,aac,aiff,caf",
    "codec_whitelist": _CODECS,
    "protocol_whitelist": "none",
    "max_streams": str(_MOST_STREAMS),
}
# A partial frame at either end and a stray tag are what ordinary recorders and cutters leave.
_MOST_BAD_PACKETS = 3
_MOST_CPU_SECONDS = 3.0
# An honest clip needs a few; with video between the audio, one for each piece of audio.
_MOST_SEEKS = 20_000
_MOST_MISSING_SECONDS = 1.0
# Lossy decoders overshoot full scale by a little; far beyond it is a file of another scale.
_LOUDEST_SAMPLE = 8.0
_SILENCE_PEAK = 1e-4
_FRAMES_AT_ONCE = 256


@dataclass(frozen=True, slots=True)
class ClipLimits:
    """What a clip may be; a clip at a limit is within it."""

    min_seconds: float = 1.0
    max_seconds: float = 30.0
    max_channels: int = 2
    min_sample_rate_hz: int = 8_000
    max_sample_rate_hz: int = 192_000

    @property
    def max_frames(self) -> int:
        """The most samples that one channel of any clip within the limits has."""
        return int(self.max_seconds * self.max_sample_rate_hz)


def decode_clip(data: bytes, *, field: str, limits: ClipLimits) -> Clip:
    """Decode a whole upload to mono at its own rate, or say which field is wrong and why.

    Blocks; call it in a thread. Raises `UnsupportedMediaTypeError` for what is not audio and
    `AudioRejectedError` for audio that is outside the limits, silent, damaged or cut short.
    """
    import av  # 60 to 100 ms: paid by the first upload, not by the start of the server

    if not data:
        raise AudioRejectedError.of_field(field, "the file is empty")
    audio = _without_id3(data)
    _refuse_boundless_index(audio, field, limits)
    upload, take = _Upload(audio), _Take(field, limits)
    options = _OPTIONS | {"advanced_editlist": "0" if _has_many_edits(audio) else "1"}
    try:
        with av.open(upload, "r", options=options, metadata_errors="replace") as container:
            stated_seconds = _stated_seconds(audio, container)
            _decode_into(take, container, upload)
    except av.FFmpegError as error:
        if not upload.is_spent():
            raise take.unreadable() from error
    if upload.is_spent():
        raise take.rejected("the file takes too long to decode")
    return take.finish(stated_seconds)


class _Upload(io.BytesIO):
    """The bytes as FFmpeg sees them: they end when it has had enough time.

    Ending the file is the one way to stop FFmpeg while it searches: 20 MB of empty WAV chunks are
    a million seeks and 10 s. The time is the processor's, so that a busy machine refuses no
    honest file. Nothing here may raise: PyAV keeps what a callback raises and throws it at the
    thread's next call, which may be about another caller's file.
    """

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self._ends_at = time.thread_time() + _MOST_CPU_SECONDS
        self._seek_count = 0

    def is_spent(self) -> bool:
        """Whether reading and decoding have had all that they get."""
        return self._seek_count > _MOST_SEEKS or time.thread_time() > self._ends_at

    def read(self, size: int | None = -1, /) -> bytes:
        """The next bytes, none when the time is up."""
        return b"" if self.is_spent() else super().read(size)

    def seek(self, offset: int, whence: int = 0, /) -> int:
        """The new place, or -1."""
        self._seek_count += 1
        return -1 if self.is_spent() else super().seek(offset, whence)


def _decode_into(take: "_Take", container: "InputContainer", upload: _Upload) -> None:
    """Feed every frame of the first audio stream to the take, which stops what is too much."""
    import av

    if not container.streams.audio:
        raise UnsupportedMediaTypeError(f"{take.field}: the file has no audio in it")
    stream = container.streams.audio[0]
    # Without a decoder for the codec the stream has no context, whatever the type says.
    if stream.codec_context is None or stream.codec_context.codec.name not in _CODECS.split(","):
        raise take.unreadable()
    stream.codec_context.thread_count = 1
    stream.codec_context.options = {"max_samples": str(take.limits.max_frames + 1)}
    take.check_format(stream.codec_context.sample_rate, stream.codec_context.channels)
    bad_packets = 0
    for packet in container.demux(stream):
        try:
            take.add(stream.codec_context.decode(packet))
        except av.FFmpegError:
            bad_packets += 1
            if bad_packets > _MOST_BAD_PACKETS:
                raise
        if upload.is_spent():
            return
    if bad_packets and not take.frame_count:
        raise take.unreadable()


class _Take:
    """What has been decoded so far, within the limits."""

    def __init__(self, field: str, limits: ClipLimits) -> None:
        self.field = field
        self.limits = limits
        self.frame_count = 0
        self._sample_rate_hz = 0
        self._planes: list[_Planes] = []
        self._pieces: list[Samples] = []

    def add(self, frames: "list[AudioFrame]") -> None:
        """Take decoded frames; the first that goes beyond a limit ends it."""
        for frame in frames:
            self.check_format(frame.sample_rate, frame.layout.nb_channels)
            if self._sample_rate_hz not in (0, frame.sample_rate):
                raise self.rejected("the sample rate changes within the file")
            self._sample_rate_hz = frame.sample_rate
            self.frame_count += frame.samples
            longest = self.limits.max_seconds
            if self.frame_count > longest * self._sample_rate_hz:
                raise self.rejected(f"the clip is longer than {longest:g} s", limit=longest)
            if frame.samples:
                self._planes.append(_planes(frame))
        if len(self._planes) >= _FRAMES_AT_ONCE:
            self._mix()

    def check_format(self, sample_rate_hz: int, channels: int) -> None:
        """Refuse a rate or a channel count that is out of range; 0 is not known yet."""
        limits = self.limits
        if channels > limits.max_channels:
            message = f"the file has {channels} channels, more than {limits.max_channels}"
            raise self.rejected(message, limit=limits.max_channels)
        lowest, highest = limits.min_sample_rate_hz, limits.max_sample_rate_hz
        if sample_rate_hz and not lowest <= sample_rate_hz <= highest:
            message = f"the sample rate is {sample_rate_hz} Hz, not {lowest} to {highest} Hz"
            raise self.rejected(message, limit=min(max(sample_rate_hz, lowest), highest))

    def finish(self, stated_seconds: float | None) -> Clip:
        """The clip, once all of it is there and it can serve as a voice."""
        rate_hz, shortest = self._sample_rate_hz, self.limits.min_seconds
        if not rate_hz or self.frame_count < shortest * rate_hz:
            raise self.rejected(f"the clip is shorter than {shortest:g} s", limit=shortest)
        held_seconds = self.frame_count / rate_hz
        if stated_seconds is not None and stated_seconds - held_seconds > _MOST_MISSING_SECONDS:
            lengths = f"it states {stated_seconds:.1f} s and holds {held_seconds:.1f} s"
            raise self.rejected(f"the file is cut short: {lengths}")
        self._mix()
        samples = np.concatenate(self._pieces)
        if not np.isfinite(samples).all():
            raise self.rejected("the clip has samples that are not finite numbers")
        if np.abs(samples).max() > _LOUDEST_SAMPLE:
            message = f"the clip goes beyond {_LOUDEST_SAMPLE:g} times full scale"
            raise self.rejected(message, limit=_LOUDEST_SAMPLE)
        # From the lowest to the highest, so that a constant offset is silence too.
        if np.ptp(samples) < 2 * _SILENCE_PEAK:
            raise self.rejected("the clip is silent")
        # The little that is over full scale is decoder overshoot, or a hot float recording
        # that plays as its clipped self everywhere.
        return Clip(np.clip(samples, -1.0, 1.0), rate_hz)

    def _mix(self) -> None:
        """Mix what has gathered; frames of some codecs are too short to be mixed one by one."""
        for _, alike in itertools.groupby(self._planes, key=lambda each: (each.dtype, len(each))):
            self._pieces.append(_to_mono(np.concatenate(list(alike), axis=1)))
        self._planes.clear()

    def rejected(self, message: str, *, limit: float | None = None) -> AppError:
        """The error for audio that cannot be used."""
        return AudioRejectedError.of_field(self.field, message, limit=limit)

    def unreadable(self) -> AppError:
        """The error for bytes that do not decode: never audio, or audio that broke off."""
        if self.frame_count:
            return self.rejected("the file is damaged")
        return UnsupportedMediaTypeError(
            f"{self.field}: the file cannot be read as audio; it is damaged, or none of"
            " wav, mp3, flac, ogg, opus, m4a, webm, aiff and caf"
        )


def _planes(frame: "AudioFrame") -> _Planes:
    """A frame's samples as they were decoded, one row a channel; packed ones take turns."""
    values: _Planes = frame.to_ndarray()
    channels = frame.layout.nb_channels
    return values if len(values) == channels else values.reshape(-1, channels).T


def _to_mono(planes: _Planes) -> Samples:
    """The mean of the channels as float32 with full scale at 1."""
    # A float file may hold anything; what is not finite is refused once, at the end.
    with np.errstate(over="ignore", invalid="ignore"):
        mono: Samples = planes.astype(np.float32).mean(axis=0, dtype=np.float32)
    if planes.dtype == np.uint8:
        mono -= 128.0
    if planes.dtype.kind in "iu":
        mono /= 2.0 ** (8 * planes.dtype.itemsize - 1)
    return mono


# What is read from the bytes themselves, because FFmpeg believes it without a bound, or does not
# pass it on.

# Version, flags, and the size in 7 bits a byte.
_ID3_TAG = re.compile(rb"ID3[\x02-\x04].(.)(.{4})", re.DOTALL)
_MOST_LEADING_TAGS = 8
_MOST_TABLES = 20_000
_MOST_EDITS = 4
# At 24 bytes each, FFmpeg refuses more by itself.
_MOST_ENTRIES = 2**31 // 24
_FRAMES_PER_PCM_ENTRY = 1024
# 4-bit codecs in old QuickTime files list every frame, two to a byte.
_MOST_ENTRIES_PER_BYTE = 4
_MATROSKA_DURATION = re.compile(rb"\x44\x89[\x84\x88]")


def _without_id3(data: bytes) -> bytes:
    """The file without its ID3 tags: FFmpeg inflates and keeps every compressed frame in them.

    A megabyte of tags became a gigabyte of memory and 12 s. Leading tags are cut off; one inside
    (a chunk of a WAV or AIFF file) loses its name, which makes it a chunk of no meaning.
    """
    start = 0
    for _ in range(_MOST_LEADING_TAGS):
        tag = _ID3_TAG.match(data, start)
        if not tag:
            break
        size = 0
        for byte in tag[2]:
            size = size << 7 | byte & 0x7F
        has_footer = bool(tag[1][0] & 0x10)
        start = tag.end() + size + (10 if has_footer else 0)
    data = data[start:]
    for version in (b"\x02", b"\x03", b"\x04"):
        data = data.replace(b"ID3" + version, b"---" + version)
    return data


def _refuse_boundless_index(data: bytes, field: str, limits: ClipLimits) -> None:
    """Refuse an MP4 or MOV file whose tables name far more samples than it holds.

    FFmpeg builds its index while it opens the file, 24 bytes for each sample named: 1.5 kB of
    tables became 2 GB and 20 s. The tables are found by name wherever they are, because FFmpeg
    reads them at places where no writer puts them.
    """
    if b"dcomzlib" in data:  # compressed tables: QuickTime of the last century
        raise UnsupportedMediaTypeError(f"{field}: the file's index is compressed")
    if b"trak" not in data:
        return
    entries = chunks = chunk_frames = 0
    for count, (name, at) in enumerate(_tables(data)):
        if count > _MOST_TABLES:
            raise AudioRejectedError.of_field(field, "the file has too many tables")
        if name == b"stsc":
            chunk_frames = max(chunk_frames, _largest_chunk(data, at))
        elif name in (b"stco", b"co64"):
            chunks += min(_number(data, at + 4), len(data) // 4)
        else:
            entries += _entries_without_bytes(data, name, at)
    entries = max(entries, chunks * chunk_frames // _FRAMES_PER_PCM_ENTRY)
    if entries > min(_MOST_ENTRIES_PER_BYTE * len(data), limits.max_frames):
        message = f"the file lists more audio than it, or {limits.max_seconds:g} s, can hold"
        raise AudioRejectedError.of_field(field, message, limit=limits.max_seconds)


def _tables(data: bytes) -> Iterator[tuple[bytes, int]]:
    """The name and the place of the contents of every table that makes index entries."""
    for name in (b"stsz", b"stz2", b"trun", b"stsc", b"stco", b"co64"):
        for found in re.finditer(name, data):
            has_long_size = _number(data, found.start() - 4) == 1
            yield name, found.end() + (8 if has_long_size else 0)


def _entries_without_bytes(data: bytes, name: bytes, at: int) -> int:
    """The samples that a table names without, or almost without, bytes that say more of each."""
    if name in (b"stsz", b"stz2"):  # one size for all, or the bits that a size takes
        count = _number(data, at + 8) if _number(data, at + 4) else 0
    else:  # trun: flags 0x100 to 0x800 say which values of 4 bytes each sample brings
        sample_bytes = 4 * (_number(data, at) & 0xF00).bit_count()
        count = _number(data, at + 4)
        if sample_bytes and count * sample_bytes <= len(data) - at:
            count = 0
    return count if count <= _MOST_ENTRIES else 0


def _largest_chunk(data: bytes, at: int) -> int:
    """The most samples in a chunk that a `stsc` table states; 0 for one that FFmpeg refuses."""
    count = _number(data, at + 4)
    if not 0 < count <= (len(data) - at - 8) // 12:
        return 0
    rows = np.frombuffer(data, dtype=">u4", count=3 * count, offset=at + 8)
    return int(rows[1::3].max())


def _has_many_edits(data: bytes) -> bool:
    """Whether an edit list would repeat an index more often than any trimmed recording does.

    Such a file is decoded without its edits, and not refused: four bytes of an honest file's
    audio may happen to read like the name of the table.
    """
    places = itertools.islice(re.finditer(b"elst", data), _MOST_STREAMS + 1)
    sizes = [_number(data, found.start() - 4) for found in places]
    fewest, most = 8, 16 + 20 * _MOST_EDITS
    return len(sizes) > _MOST_STREAMS or any(not fewest <= size <= most for size in sizes)


def _number(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 4], "big")


def _stated_seconds(data: bytes, container: "InputContainer") -> float | None:
    """The length that the file states for its audio, where such a statement can be relied on.

    MP3, AAC and Ogg state none: what FFmpeg says of them is an estimate.
    """
    name = container.format.name
    if name == "wav":
        return stated_wav_seconds(data)
    if name == "matroska,webm":
        is_stated = _MATROSKA_DURATION.search(data, 0, 4096)
        if is_stated and container.duration and len(container.streams) == 1:
            return container.duration / 1e6
    elif name in ("flac", "aiff") or name.startswith("mov,"):
        stream = container.streams.audio[0] if container.streams.audio else None
        if stream and stream.duration and stream.time_base:
            return float(stream.duration * stream.time_base)
    return None
