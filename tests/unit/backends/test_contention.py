"""The number of threads follows what the machine has left for this process."""

import sys
import time
from collections.abc import Iterator

import pytest
import torch

from app.backends.tts.voxcpm.engine.contention import ThreadGovernor

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="only Linux says how idle its cores are"
)


@pytest.fixture(autouse=True)
def four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def work_undisturbed(governor: ThreadGovernor, seconds: float) -> None:
    with governor.watch():
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            pass


def be_held_up(governor: ThreadGovernor, seconds: float) -> None:
    """A thread that others keep from its core is like one that sleeps."""
    with governor.watch():
        time.sleep(seconds)


def test_a_thread_that_is_held_up_goes_on_with_fewer() -> None:
    governor = ThreadGovernor()
    be_held_up(governor, 0.15)
    assert torch.get_num_threads() == 3
    for _ in range(5):
        be_held_up(governor, 0.15)
    assert torch.get_num_threads() == 1


def test_a_short_hold_up_among_work_changes_nothing() -> None:
    governor = ThreadGovernor()
    be_held_up(governor, 0.01)
    work_undisturbed(governor, 0.15)
    assert torch.get_num_threads() == 4


def test_threads_come_back_once_a_core_is_idle() -> None:
    governor = ThreadGovernor()
    for _ in range(3):
        be_held_up(governor, 0.12)
    assert torch.get_num_threads() < 4
    lowered = torch.get_num_threads()
    give_up = time.monotonic() + 40
    while torch.get_num_threads() == lowered:
        # Asleep: one core more is idle, which the share of the CPU would not forgive for long.
        work_undisturbed(governor, 0.11)
        assert time.monotonic() < give_up, "no core was idle"


def test_one_thread_is_left_alone() -> None:
    torch.set_num_threads(1)
    governor = ThreadGovernor()
    be_held_up(governor, 0.15)
    assert torch.get_num_threads() == 1
