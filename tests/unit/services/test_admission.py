"""The bound on waiting requests."""

from contextlib import ExitStack

import pytest

from app.errors import QueueFullError
from app.services.admission import Admission


def test_one_is_served_while_max_queue_wait_and_the_next_is_refused() -> None:
    admission = Admission(max_queue=2)
    with ExitStack() as places:
        for _ in range(3):
            places.enter_context(admission.enter("a"))
        with pytest.raises(QueueFullError) as refused, admission.enter("a"):
            pass
        assert refused.value.retry_after_seconds
        with admission.enter("b"):
            pass  # another model's queue is its own
    with admission.enter("a"):
        pass


def test_a_failed_request_gives_its_place_back() -> None:
    admission = Admission(max_queue=0)
    for _ in range(3):
        with pytest.raises(RuntimeError), admission.enter("a"):
            raise RuntimeError
