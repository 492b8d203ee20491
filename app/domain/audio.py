"""Audio as values: mono samples with their sample rate."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Samples = NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Clip:
    """A recording: float32 samples of shape (n,) within [-1, 1], mono."""

    samples: Samples
    sample_rate_hz: int

    @property
    def duration_seconds(self) -> float:
        """Length of the recording."""
        return len(self.samples) / self.sample_rate_hz
