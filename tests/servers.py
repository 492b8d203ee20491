"""Real servers for tests: uvicorn on a socket, in a thread of this process or as a process."""

import os
import queue
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from app.config import ModelSettings, Settings, SpeechSettings
from app.main import create_app

REPOSITORY = Path(__file__).parent.parent
# Nothing listens on the discard port: the hub is out of reach, at once.
NO_HUB = "http://127.0.0.1:9"


def make_settings(
    cache_dir: Path,
    *,
    tts: dict[str, Any] | None = None,
    models: dict[str, Any] | None = None,
    **server: Any,
) -> Settings:
    """Settings that ignore the environment's .env and keep weights under `cache_dir`."""
    return Settings(
        tts=SpeechSettings(**(tts or {})),
        models=ModelSettings(cache_dir=cache_dir, **(models or {})),
        **{"port": 0, **server},
    )


@dataclass(frozen=True)
class Running:
    """A server that answers at `url`; `client` has no time-out short enough to matter."""

    url: str
    client: httpx.Client

    def wait_until(self, path: str, condition: Any, *, seconds: float = 20.0) -> httpx.Response:
        """Ask `path` until `condition(response)` holds."""
        give_up = time.monotonic() + seconds
        while True:
            response = self.client.get(path)
            if condition(response):
                return response
            assert time.monotonic() < give_up, (path, response.status_code, response.text)
            time.sleep(0.02)


@contextmanager
def serving(settings: Settings) -> Iterator[Running]:
    """The application of `settings` behind a real uvicorn, in a thread."""
    config = uvicorn.Config(
        create_app(settings), host="127.0.0.1", port=0, log_config=None, lifespan="on"
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        with httpx.Client(base_url=url, timeout=60) as client:
            yield Running(url, client)
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive(), "the server did not stop"


@dataclass(frozen=True)
class ServerProcess:
    """`python -m app.server` as a user runs it."""

    process: subprocess.Popen[str]
    url: str
    startup_text: str

    def stop(self, *, seconds: float = 60.0) -> int:
        """SIGTERM, and the exit status."""
        self.process.terminate()
        return self.process.wait(seconds)


@contextmanager
def server_process(cache_dir: Path, **environment: str) -> Iterator[ServerProcess]:
    """Start the server as a process of its own, from a directory that is not the checkout."""
    process = subprocess.Popen(
        [sys.executable, "-m", "app.server"],
        cwd=cache_dir,
        env={
            **os.environ,
            "PYTHONPATH": str(REPOSITORY),
            "PORT": "0",
            "MODEL_CACHE_DIR": str(cache_dir / "models"),
            "HF_ENDPOINT": NO_HUB,
            **environment,
        },
        stdout=subprocess.PIPE,
        text=True,
    )
    stdout = process.stdout
    assert stdout
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    reader = threading.Thread(target=lambda: [lines.put(line) for line in stdout])
    reader.start()
    try:
        text = _read_startup(lines)
        address = re.search(r"(http://[^/\s]+\S*)/docs", text)
        assert address, text
        yield ServerProcess(process, address[1], text)
    finally:
        process.kill()
        process.wait(10)
        reader.join(10)
        stdout.close()


def _read_startup(lines: "queue.SimpleQueue[str]") -> str:
    """What the server prints once it is up, to the end of the curl line."""
    text = ""
    while "-o speech.wav" not in text:
        text += lines.get(timeout=60)
    return text
