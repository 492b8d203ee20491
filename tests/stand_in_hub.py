"""A stand-in for the Hugging Face hub on loopback, for tests: one repository, and its moods.

It answers the routes that the official client uses, with the headers that the client relies on:

    GET      /api/models/{repository}/revision/{revision}     the commit
    GET      /api/models/{repository}/tree/{commit}           files, sizes, git and SHA-256 hashes
    GET/HEAD /{repository}/resolve/{revision}/{file}          small files, and redirects for large
    GET      /content/{sha256}                                large files, from another origin

As on the real hub, large files (weights) come from another origin, to which the client must not
send its token. Every body byte handed to a socket is counted, and `Faults` says what goes wrong.
"""

import contextlib
import hashlib
import json
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Self
from urllib.parse import unquote, urlsplit

LARGE_SUFFIXES = (".safetensors", ".bin", ".pth")
_PIECE_BYTES = 16 * 1024


@dataclass
class Faults:
    """What goes wrong. Faults of content concern large files only."""

    bytes_per_second: float | None = None  # of each connection
    cut_after: int | None = None  # bytes of one answer, then the connection breaks...
    cuts_left: int = 0  # ...this many times
    cut_hard: bool = False  # with a reset instead of an orderly end
    truncate_to: int | None = None  # files end early, and the answer says that this is all
    corrupt: bool = False  # one byte is wrong
    ignore_range: bool = False  # always the whole file
    silent: bool = False  # connections are accepted and nothing is answered
    api_error: tuple[int, str] | None = None  # status and X-Error-Code for the API
    file_error: tuple[int, str] | None = None  # the same for files


@dataclass(frozen=True)
class StoredFile:
    """A file of the repository with the hashes the hub states for it."""

    name: str
    content: bytes
    git_hash: str
    sha256: str | None

    @classmethod
    def of(cls, name: str, content: bytes) -> Self:
        """Hash the content in the hub's ways."""
        large = name.endswith(LARGE_SUFFIXES)
        header = f"blob {len(content)}\0".encode()
        return cls(
            name=name,
            content=content,
            git_hash=hashlib.sha1(header + content, usedforsecurity=False).hexdigest(),
            sha256=hashlib.sha256(content).hexdigest() if large else None,
        )

    def listed(self) -> dict[str, object]:
        """The entry in the tree."""
        entry: dict[str, object] = {
            "type": "file",
            "path": self.name,
            "size": len(self.content),
            "oid": self.git_hash,
        }
        if self.sha256:
            size = len(self.content)
            entry["lfs"] = {"oid": self.sha256, "size": size, "pointerSize": 134}
        return entry


@dataclass
class StandInHub:
    """The hub as a context manager: `with StandInHub(directory) as hub: ... hub.url`."""

    directory: Path
    repository: str = "org/name"
    revision: str = "main"
    faults: Faults = field(default_factory=Faults)
    gets: Counter[str] = field(default_factory=Counter)
    bytes_sent: Counter[str] = field(default_factory=Counter)
    tokens: dict[str, set[str | None]] = field(default_factory=lambda: {"hub": set(), "cdn": set()})
    active: int = 0  # large files on their way at this moment

    def __enter__(self) -> Self:
        self.files: dict[str, StoredFile] = {}
        self.lock = threading.Lock()
        self.reload()
        self._servers = {name: _Server(name, self) for name in ("hub", "cdn")}
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers.values():
            server.shutdown()
            server.server_close()

    @property
    def url(self) -> str:
        """What belongs into HF_ENDPOINT."""
        return self._servers["hub"].url

    @property
    def content_url(self) -> str:
        """The origin that large files come from."""
        return self._servers["cdn"].url

    @property
    def commit(self) -> str:
        """What the revision points at: changes with the files."""
        names = "".join(f"{file.name}{file.git_hash}" for file in self.files.values())
        return hashlib.sha1(names.encode(), usedforsecurity=False).hexdigest()

    @property
    def total_sent(self) -> int:
        """Bytes of all files that were handed to sockets."""
        return sum(self.bytes_sent.values())

    def reload(self) -> None:
        """Read the directory anew: a push to the repository."""
        self.files = {
            name: StoredFile.of(name, path.read_bytes())
            for path in sorted(self.directory.rglob("*"))
            if path.is_file() and (name := path.relative_to(self.directory).as_posix())
        }

    def forget(self) -> None:
        """Start counting from nothing."""
        self.gets.clear()
        self.bytes_sent.clear()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, name: str, hub: StandInHub) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.name = name
        self.hub = hub
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def handle_error(self, *_: object) -> None:
        """Clients that go away in mid-answer are what these tests are about."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        """Answer any request; `_send_file` knows that HEAD has no body."""
        hub = self.server.hub
        if hub.faults.silent:
            time.sleep(30)
            return
        hub.tokens[self.server.name].add(self.headers.get("Authorization"))
        path = unquote(urlsplit(self.path).path)
        if path.startswith(f"/api/models/{hub.repository}/"):
            self._answer_api(path.removeprefix(f"/api/models/{hub.repository}/"))
        elif path.startswith("/content/"):
            self._send_content(path.removeprefix("/content/"))
        elif path.startswith(f"/{hub.repository}/resolve/"):
            self._resolve(path.removeprefix(f"/{hub.repository}/resolve/"))
        else:
            self._fail(401, "RepoNotFound")  # the hub does not tell whether it exists

    do_HEAD = do_GET

    def _answer_api(self, path: str) -> None:
        hub = self.server.hub
        action, _, revision = path.partition("/")
        if hub.faults.api_error:
            self._fail(*hub.faults.api_error)
        elif revision not in (hub.revision, hub.commit):
            self._fail(404, "RevisionNotFound")
        elif action == "tree":
            self._send_json([file.listed() for file in hub.files.values()])
        else:
            siblings = [{"rfilename": name} for name in hub.files]
            self._send_json({"id": hub.repository, "sha": hub.commit, "siblings": siblings})

    def _resolve(self, path: str) -> None:
        hub = self.server.hub
        file = hub.files.get(path.partition("/")[2])
        if hub.faults.file_error:
            self._fail(*hub.faults.file_error)
        elif file is None:
            self._fail(404, "EntryNotFound")
        elif file.sha256:
            self.send_response(HTTPStatus.FOUND)
            self.send_header("Location", f"{hub.content_url}/content/{file.sha256}")
            self.send_header("X-Repo-Commit", hub.commit)
            self.send_header("X-Linked-Size", str(len(file.content)))
            self.send_header("X-Linked-ETag", f'"{file.sha256}"')
            self.send_header("Content-Length", "0")
            self.end_headers()
        else:
            self._send_file(file, file.content, file.git_hash)

    def _send_content(self, sha256: str) -> None:
        hub = self.server.hub
        file = next(file for file in hub.files.values() if file.sha256 == sha256)
        content = file.content[: hub.faults.truncate_to]
        if hub.faults.corrupt:
            content = bytes([content[0] ^ 1]) + content[1:]
        with hub.lock:
            hub.active += 1
        try:
            self._send_file(file, content, sha256)
        finally:
            with hub.lock:
                hub.active -= 1

    def _send_file(self, file: StoredFile, content: bytes, etag: str) -> None:
        hub = self.server.hub
        start = 0
        requested = self.headers.get("Range")
        if requested and not hub.faults.ignore_range:
            start = int(requested.removeprefix("bytes=").partition("-")[0])
        if start >= len(content) > 0:
            self._fail(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, "")
            return
        self.send_response(HTTPStatus.PARTIAL_CONTENT if start else HTTPStatus.OK)
        if start:
            last = len(content) - 1
            self.send_header("Content-Range", f"bytes {start}-{last}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{etag}"')
        self.send_header("X-Repo-Commit", hub.commit)
        self.end_headers()
        if self.command == "GET":
            hub.gets[file.name] += 1
            self._send_body(file, content[start:])

    def _send_body(self, file: StoredFile, body: bytes) -> None:
        hub, faults = self.server.hub, self.server.hub.faults
        cut_after = faults.cut_after if file.sha256 and faults.cuts_left > 0 else None
        for offset in range(0, len(body), _PIECE_BYTES):
            piece = body[offset : offset + _PIECE_BYTES]
            if cut_after is not None and offset + len(piece) > cut_after:
                self._break_off()
                return
            self.wfile.write(piece)
            with hub.lock:
                hub.bytes_sent[file.name] += len(piece)
            if faults.bytes_per_second and file.sha256:
                time.sleep(len(piece) / faults.bytes_per_second)

    def _break_off(self) -> None:
        faults = self.server.hub.faults
        faults.cuts_left -= 1
        self.close_connection = True
        if faults.cut_hard:
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.connection.close()
        else:
            self.connection.shutdown(socket.SHUT_RDWR)

    def _send_json(self, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _fail(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", "as told by the test")
        self.send_header("Content-Length", "0")
        self.end_headers()


@contextlib.contextmanager
def closed_port() -> Iterator[str]:
    """The address of a hub that refuses connections. The port stays ours: nobody else answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
