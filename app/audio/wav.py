"""Whole WAV files: writing them, and what the header of one states."""

import io
import wave

import numpy as np

from app.domain.audio import Samples

_FULL_SCALE = 32_768
# What writers of streams put where they cannot know the size.
_UNKNOWN_SIZE = 0x7FFF_0000
_MOST_CHUNKS = 256


def wav_bytes(samples: Samples, sample_rate_hz: int) -> bytes:
    """The samples as a mono 16-bit WAV file; beyond full scale is clipped, never wrapped.

    Full scale is 2^15, as it is for whoever reads the file: 16-bit audio that was decoded comes
    back bit by bit.
    """
    # float32 holds every scaled value exactly, and clipping comes before the narrow type.
    scaled = np.rint(samples * np.float32(_FULL_SCALE))
    pcm = np.clip(scaled, -_FULL_SCALE, _FULL_SCALE - 1).astype("<i2")
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(pcm.itemsize)
        file.setframerate(sample_rate_hz)
        file.writeframes(pcm.tobytes())
    return buffer.getvalue()


def stated_wav_seconds(data: bytes) -> float | None:
    """The length that a WAV file's header states, whatever the file holds; None if it does not."""
    at, bytes_per_second = 12, 0
    for _ in range(_MOST_CHUNKS):
        name, size = data[at : at + 4], int.from_bytes(data[at + 4 : at + 8], "little")
        if name == b"fmt ":
            bytes_per_second = int.from_bytes(data[at + 16 : at + 20], "little")
        elif name == b"data":
            is_known = bytes_per_second and size < _UNKNOWN_SIZE
            return size / bytes_per_second if is_known else None
        at += 8 + size + size % 2
    return None
