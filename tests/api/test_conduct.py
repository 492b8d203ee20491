"""Conduct under load: order, bounds, deadlines, and clients that leave."""

import gc
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.servers import Running, make_settings, serving

GENERATE = "/api/v1/text-to-speech/generate"
# About 600 steps of the tiny model: long enough to leave, to queue behind, and to time out.
LONG = {"text": "word " * 120, "max_seconds": 45, "inference_timesteps": 20}
SHORT = {"text": "Hi.", "max_seconds": 0.4}


class Steps:
    """How many steps the VoxCPM engines of this process have made since it was cleared."""

    def __init__(self) -> None:
        self._before = 0

    def __len__(self) -> int:
        return self._all() - self._before

    def clear(self) -> None:
        self._before = self._all()

    def _all(self) -> int:
        from app.backends.tts.voxcpm.engine.scheduler import Scheduler

        # Engines are deep inside the servers, which are to have no door for tests.
        return sum(one.steps for one in gc.get_objects() if type(one) is Scheduler)


@pytest.fixture
def steps(checkpoints: dict[str, Path]) -> Steps:
    """Counts the steps that any VoxCPM model of this process makes."""
    counted = Steps()
    counted.clear()
    return counted


@pytest.fixture
def narrow(tmp_path: Path, checkpoints: dict[str, Path]) -> Iterator[Running]:
    """A server with a queue of two and a deadline."""
    settings = make_settings(
        tmp_path,
        tts={
            "model_name": str(checkpoints["voxcpm-0.5b"]),
            "max_queue": 2,
            "request_timeout_seconds": 3.0,
        },
    )
    with serving(settings) as server:
        assert server.client.post(GENERATE, json=SHORT).status_code == 200
        yield server


def start_and_leave(server: Running, steps: Steps, body: dict[str, Any]) -> None:
    """Send a request, and close the connection once the model has made some steps."""
    address = server.client.base_url
    raw = server.client.build_request("POST", GENERATE, json=body)
    head = "".join(f"{name}: {value}\r\n" for name, value in raw.headers.items())
    with socket.create_connection((address.host, address.port)) as connection:
        connection.sendall(f"POST {GENERATE} HTTP/1.1\r\n{head}\r\n".encode() + raw.content)
        give_up = time.monotonic() + 20
        while len(steps) < 3:
            assert time.monotonic() < give_up
            time.sleep(0.002)


def test_a_client_that_leaves_stops_the_model_within_a_step(voxcpm: Running, steps: Steps) -> None:
    assert voxcpm.client.post(GENERATE, json=SHORT).status_code == 200
    steps.clear()
    # Steps so long that the server sees the connection close within the one under way.
    start_and_leave(voxcpm, steps, {**LONG, "inference_timesteps": 100})
    at_leaving = len(steps)
    # What comes next waits for the model's thread, so the abandoned request has ended then.
    assert voxcpm.client.post(GENERATE, json=SHORT).status_code == 200
    own = 5
    assert len(steps) - own - at_leaving <= 2, "it went on after its client had left"


def test_beyond_the_queue_requests_are_refused_at_once(narrow: Running) -> None:
    with ThreadPoolExecutor(6) as pool:
        began = time.monotonic()
        calls = []
        for _ in range(6):
            calls.append(pool.submit(narrow.client.post, GENERATE, json=LONG))
            time.sleep(0.05)
        answers = [call.result() for call in calls]
        refused = [answer for answer in answers if answer.status_code == 429]
        assert time.monotonic() - began < 30
    assert len(refused) == 3
    for answer in refused:
        assert answer.json()["type"] == "queue-full"
        assert int(answer.headers["retry-after"]) >= 1
        assert answer.elapsed.total_seconds() < 1
    # The three that were taken ran or waited into their deadline.
    late = [answer for answer in answers if answer.status_code != 429]
    assert {answer.status_code for answer in late} <= {200, 504}
    assert narrow.client.post(GENERATE, json=SHORT).status_code == 200


def test_a_request_over_its_deadline_is_stopped(narrow: Running, steps: Steps) -> None:
    response = narrow.client.post(GENERATE, json={**LONG, "inference_timesteps": 100})
    assert response.status_code == 504
    assert response.json()["type"] == "deadline-exceeded"
    assert "3 seconds" in response.json()["detail"]
    made = len(steps)
    assert narrow.client.post(GENERATE, json=SHORT).status_code == 200
    assert len(steps) - made <= 5 + 2, "the model went on after its deadline"


def test_requests_are_served_in_the_order_in_which_they_came(voxcpm: Running) -> None:
    finished: list[int] = []

    def say(number: int) -> None:
        body = {"text": f"Number {number}.", "max_seconds": 1.6}
        assert voxcpm.client.post(GENERATE, json=body).status_code == 200
        finished.append(number)

    with ThreadPoolExecutor(5) as pool:
        for number in range(5):
            pool.submit(say, number)
            time.sleep(0.05)
    assert finished == sorted(finished)


def test_a_body_that_never_ends_is_given_up(narrow: Running) -> None:
    address = narrow.client.base_url
    head = (
        f"POST {GENERATE} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        "Content-Length: 100\r\n\r\n{"
    )
    with socket.create_connection((address.host, address.port), timeout=20) as connection:
        connection.sendall(head.encode())
        answer = ""
        while "}" not in answer:
            answer += connection.recv(65_536).decode()
    assert " 504 " in answer.splitlines()[0]
    assert "deadline-exceeded" in answer


def test_twenty_first_callers_load_a_real_model_once(
    tmp_path: Path, checkpoints: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    settings = make_settings(tmp_path, tts={"model_name": str(checkpoints["voxcpm2"])})
    with serving(settings) as server, caplog.at_level("INFO"), ThreadPoolExecutor(20) as pool:
        body = {"text": "Hi.", "max_seconds": 0.4, "seed": 1}

        def call(_: int) -> httpx.Response:
            return httpx.post(f"{server.url}{GENERATE}", json=body, timeout=100)

        answers = list(pool.map(call, range(20)))
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.content for answer in answers}) == 1
    loads = [record for record in caplog.records if record.message == "model loaded"]
    assert len(loads) == 1
