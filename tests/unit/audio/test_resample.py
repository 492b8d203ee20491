"""One sample rate to another."""

import numpy as np
import pytest

from app.audio.resample import resample
from tests.recordings import voice


def tone(hz: float, sample_rate_hz: int, seconds: float = 1.0) -> np.ndarray:
    moments = np.arange(round(seconds * sample_rate_hz)) / sample_rate_hz
    return (0.5 * np.sin(2 * np.pi * hz * moments)).astype(np.float32)


def test_equal_rates_change_nothing() -> None:
    samples = voice(1, 16_000)

    assert resample(samples, 16_000, 16_000) is samples


@pytest.mark.parametrize(
    ("from_hz", "to_hz"),
    [(48_000, 16_000), (44_100, 16_000), (16_000, 48_000), (8_000, 44_100), (22_050, 24_000)],
)
def test_a_tone_stays_the_same_tone(from_hz: int, to_hz: int) -> None:
    resampled = resample(tone(1_000, from_hz), from_hz, to_hz)

    assert resampled.dtype == np.float32
    assert len(resampled) == to_hz
    # Away from the ends, where the filter has neighbours on both sides.
    middle = slice(to_hz // 10, -to_hz // 10)
    np.testing.assert_allclose(resampled[middle], tone(1_000, to_hz)[middle], atol=1e-4)


def test_what_the_new_rate_cannot_carry_is_gone() -> None:
    resampled = resample(tone(12_000, 48_000), 48_000, 16_000)

    assert np.abs(resampled[1_600:-1_600]).max() < 1e-4


@pytest.mark.parametrize("count", [0, 1, 7])
def test_very_short_samples_are_no_trouble(count: int) -> None:
    resampled = resample(np.zeros(count, np.float32), 48_000, 16_000)

    assert len(resampled) == pytest.approx(count / 3, abs=1)
