"""The one shape of every error, however it arises."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.backends.registry import TTS_BACKENDS
from tests.recordings import HOSTILE, make_recording
from tests.servers import Running, make_settings, serving

GENERATE = "/api/v1/text-to-speech/generate"
CLONE = "/api/v1/text-to-speech/clone"


def assert_problem(response: httpx.Response, status: int, kind: str) -> dict[str, Any]:
    """The specification of an error's body and headers."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = response.json()
    assert body["type"] == kind
    assert body["status"] == status
    assert body["title"]
    assert isinstance(body["detail"], str)
    assert body["detail"]
    assert body["instance"] == response.request.url.path
    assert body["request_id"] == response.headers["x-request-id"]
    assert set(body) <= {
        *("type", "title", "status", "detail", "instance", "request_id", "errors", "progress")
    }
    for error in body["errors"]:
        assert {"field", "message"} <= set(error) <= {"field", "message", "limit"}
    if status == 400:
        assert body["errors"]
    if status in {429, 503}:
        assert int(response.headers["retry-after"]) >= 1
    assert "Traceback" not in response.text
    return body


Ask = Callable[[httpx.Client], httpx.Response]


def say(**fields: Any) -> Ask:
    return lambda client: client.post(GENERATE, json={"text": "Hi.", **fields})


def clone(wav: bytes, **form: Any) -> Ask:
    data = {"text": "Hi.", "prompt_text": "One.", "model": "tiny/voxcpm2", **form}
    return lambda client: client.post(CLONE, data=data, files={"prompt_wav": ("a.wav", wav)})


@pytest.mark.parametrize(
    ("ask", "status", "kind"),
    [
        (lambda client: client.get("/nowhere"), 404, "not-found"),
        (lambda client: client.delete("/api/v1/models"), 405, "method-not-allowed"),
        (lambda client: client.post(GENERATE, content=b"{"), 400, "validation"),
        (lambda client: client.post(CLONE, content=b"x"), 400, "validation"),
        (
            lambda client: client.post(
                CLONE, content=b"x", headers={"Content-Type": "multipart/form-data; boundary=a"}
            ),
            400,
            "validation",
        ),
        (say(cfg_value=99), 400, "validation"),
        (say(text="x" * 5_001), 400, "text-too-long"),
        (say(text="word " * 999), 400, "text-too-long"),
        (say(model="hibari/heart", style="calm"), 400, "unsupported-parameter"),
        (say(model="hibari/heart", text="你好"), 400, "unspeakable-text"),
        (say(model="nobody/nothing"), 404, "model-not-found"),
        (say(model="openbmb/VoxCPM2"), 503, "model-loading"),
        (clone(make_recording(0.3)), 400, "audio-rejected"),
        (clone(b"no audio at all"), 415, "unsupported-media-type"),
        (clone(bytes(50 * 2**20)), 413, "payload-too-large"),
    ],
)
def test_every_error_has_the_one_shape(voxcpm: Running, ask: Ask, status: int, kind: str) -> None:
    assert_problem(ask(voxcpm.client), status, kind)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_with_a_precise_4xx(voxcpm: Running, name: str) -> None:
    response = clone(HOSTILE[name]())(voxcpm.client)
    assert response.status_code in {400, 413, 415}
    kinds = {400: "audio-rejected", 413: "payload-too-large", 415: "unsupported-media-type"}
    body = assert_problem(response, response.status_code, kinds[response.status_code])
    assert "prompt_wav" in body["detail"]
    assert response.elapsed.total_seconds() < 5


@pytest.mark.parametrize(("backend", "words"), [("BrokenBackend", "log"), ("DeafBackend", "seed")])
def test_a_surprise_is_a_500_that_tells_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    backend: str,
    words: str,
) -> None:
    # A backend of our own Protocol in the place of one whose library cannot be made to fail so.
    monkeypatch.setitem(TTS_BACKENDS, "voxcpm", f"tests.fakes:{backend}")
    (tmp_path / "weights.bin").write_bytes(b"0")
    with serving(make_settings(tmp_path, tts={"model_name": str(tmp_path)})) as server:
        response = server.client.post(GENERATE, json={"text": "Marzipan."})
        assert server.client.get("/health/live").status_code == 200
    body = assert_problem(response, 500, "internal")
    assert words in body["detail"]
    assert "secret" not in response.text
    assert "Marzipan" not in response.text
    if backend == "BrokenBackend":
        (record,) = (one for one in caplog.records if one.message == "request failed")
        assert vars(record)["error"] == "RuntimeError"
        assert "synthesize" in vars(record)["traceback"]
        assert "Marzipan" not in caplog.text + str(vars(record))


def test_a_clients_request_id_is_kept_if_it_is_harmless(voxcpm: Running) -> None:
    def answered(sent: str) -> str:
        return voxcpm.client.get("/", headers={"X-Request-Id": sent}).headers["x-request-id"]

    assert answered("order-66.a_b") == "order-66.a_b"
    for harmful in ("a b", "x" * 129, '"}', ""):
        assert answered(harmful) != harmful
