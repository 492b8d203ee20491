"""One side of the comparison as a process of its own, asked over stdin and answering on stdout.

A child that is not asked anything waits for a line and costs nothing. One that dies or does not
answer in time fails the run with its last words.
"""

import json
import os
import queue
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Self

from app.server import PROCESS_DEFAULTS
from bench.disturbance import Disturbance
from bench.rows import Side

_REPLY_SECONDS = 300.0
_FAREWELL_SECONDS = 5.0


class ChildError(RuntimeError):
    """A child has died, or does not answer; holds the end of what it wrote to stderr."""


class Child:
    """A side that has been started; its libraries are imported, its model is not loaded yet."""

    def __init__(self, side: Side, directory: Path, dtype: str, variant: str = "plain") -> None:
        command = [sys.executable, "-W", "ignore", "-m", "bench.sides", side, str(directory)]
        self._name = side
        self.disturbance = Disturbance()
        self._process = subprocess.Popen(
            [*command, dtype, variant],
            env=PROCESS_DEFAULTS | os.environ,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._replies: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._last_words: deque[str] = deque(maxlen=60)
        _follow(self._process.stdout, self._replies.put)
        self._listener = _follow(self._process.stderr, self._last_words.append)
        try:
            self.facts = self._reply("start", _REPLY_SECONDS)
        except ChildError:
            self._end()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def ask(self, what: str, **arguments: Any) -> dict[str, Any]:
        """Have it do something, and wait for the answer."""
        assert self._process.stdin is not None
        try:
            with self.disturbance.watch(self._process.pid):
                print(json.dumps({"do": what} | arguments), file=self._process.stdin, flush=True)
                return self._reply(what, _REPLY_SECONDS)
        except (BrokenPipeError, FileNotFoundError) as error:
            raise self._failure(f"was gone when asked for {what}") from error

    def _reply(self, what: str, timeout_seconds: float) -> dict[str, Any]:
        try:
            line = self._replies.get(timeout=timeout_seconds)
        except queue.Empty:
            message = f"did not answer {what} within {timeout_seconds:.0f} s"
            raise self._failure(message) from None
        if not line:
            raise self._failure(f"died at {what}")
        reply: dict[str, Any] = json.loads(line)
        return reply

    def _failure(self, what: str) -> ChildError:
        self._end()
        words = "".join(self._last_words).strip()
        return ChildError(f"the {self._name} {what}. Its last words:\n{words or '(none)'}")

    def _end(self) -> None:
        """Let it go, by force unless it goes by itself, and hear it out."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
            self._process.wait(_FAREWELL_SECONDS)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        self._listener.join(_FAREWELL_SECONDS)


def _follow(pipe: IO[str] | None, use: Callable[[str], object]) -> threading.Thread:
    """Hand on the pipe's lines as they come, and an empty one at its end."""
    assert pipe is not None

    def follow() -> None:
        for line in pipe:
            use(line)
        use("")

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    return thread
