"""How many requests may wait for a model. The model itself serves them in order."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from math import ceil
from time import monotonic

from app.errors import QueueFullError

# Weight of the newest request in the running mean of how long one takes.
_SMOOTHING = 0.3
_FIRST_GUESS_SECONDS = 2.0


class Admission:
    """Counts the requests of each model, and refuses those beyond the bound."""

    def __init__(self, max_queue: int) -> None:
        self._max_queue = max_queue
        self._inside: Counter[str] = Counter()
        self._mean_seconds: dict[str, float] = {}

    @contextmanager
    def enter(self, model: str) -> Iterator[None]:
        """Hold a place from arrival to the last sample. Raises QueueFullError at once."""
        if self._inside[model] > self._max_queue:  # one is served while max_queue wait
            raise QueueFullError(
                f"{self._max_queue} requests are waiting for this model already.",
                retry_after_seconds=self._seconds_until_a_place(model),
            )
        self._inside[model] += 1
        began = monotonic()
        try:
            yield
            self._learn(model, monotonic() - began)
        finally:
            self._inside[model] -= 1

    def _learn(self, model: str, seconds: float) -> None:
        """Remember what one request costs: its whole stay, shared with those that it waited for."""
        alone = seconds / self._inside[model]
        mean = self._mean_seconds.get(model, alone)
        self._mean_seconds[model] = mean + _SMOOTHING * (alone - mean)

    def _seconds_until_a_place(self, model: str) -> int:
        return max(1, ceil(self._mean_seconds.get(model, _FIRST_GUESS_SECONDS)))
