"""One sample rate to another, for whole clips. Streams keep a resampler with state instead."""

import numpy as np

from app.domain.audio import Samples


def resample(samples: Samples, from_hz: int, to_hz: int) -> Samples:
    """Mono samples at another rate; the same array when the rates are equal.

    The result may go beyond full scale by a little where the input came close to it.
    """
    if from_hz == to_hz:
        return samples
    import soxr  # a native library: loaded by the first clip that needs it

    resampled = soxr.resample(samples, from_hz, to_hz, quality="VHQ")
    return np.asarray(resampled, dtype=np.float32)
