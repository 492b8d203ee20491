"""The child process of `app.stores.weights`: downloads one model from the Hugging Face hub.

    python -m app.stores.hub_download --cache DIR --repository ORG/NAME --revision REV

Speaks JSON lines on stdout: `progress`, then `done` or `failed`. Ends when its stdin does.
"""

import argparse
import contextlib
import errno
import json
import os
import shutil
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub.errors import (
    DisabledRepoError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined,unused-ignore]

from app.stores.hub_files import DamagedError, Download, is_passing, look_up, obtain, publish
from app.stores.weights import repository_directory

_REPORT_SECONDS = 0.2
_NICENESS = 10
_EXPLANATIONS = frozenset({"x-error-code", "x-error-message"})

_speaking = threading.Lock()


def emit(event: str, **values: Any) -> None:
    """One line to the parent."""
    with _speaking:
        sys.stdout.write(json.dumps({"event": event, **values}) + "\n")
        sys.stdout.flush()


@contextlib.contextmanager
def _reporting(download: Download) -> Iterator[None]:
    """Report the bytes on disk while the block runs, and at its end; never fewer than before."""
    total = sum(file.size for file in download.files)
    reported = -1
    finished = threading.Event()

    def report() -> None:
        nonlocal reported
        if (done := download.bytes_on_disk()) > reported:
            reported = done
            emit("progress", done_bytes=done, total_bytes=total)

    def watch() -> None:
        while not finished.wait(_REPORT_SECONDS):
            report()

    report()
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        finished.set()
        watcher.join()
        report()


@contextlib.contextmanager
def _deadline(seconds: float) -> Iterator[None]:
    """Report the hub as out of reach and end the process when the block takes longer.

    Time-outs of sockets do not bound it: they start anew with each address and each read, and
    looking up a name has none at all.
    """

    def give_up() -> None:
        emit("failed", kind="unreachable", message="no answer in time")
        os._exit(1)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _end_with_parent() -> None:
    """Exit when stdin ends: the parent holds its other end, and is gone, however it went."""

    def watch() -> None:
        while os.read(sys.stdin.fileno(), 1024):
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


# --- The work -------------------------------------------------------------------------------------


def fetch(cache_directory: Path, repository: str, revision: str, hub_timeout: float) -> Path:
    """Everything: list, receive, check, publish. Returns the snapshot directory."""
    with _deadline(hub_timeout):
        download = look_up(repository, revision, cache_directory, hub_timeout)
    os.nice(_NICENESS)  # hashing and decryption must not slow down the speech that is being made
    locks = repository_directory(cache_directory / ".locks", repository)
    for directory in (locks, download.directory / "blobs", download.snapshot):
        directory.mkdir(parents=True, exist_ok=True)
    # One process a repository: others wait here, report the progress they see, and find it done.
    with _reporting(download), WeakFileLock(locks / "fetch.lock"):
        missing = sum(file.size for file in download.files) - download.bytes_on_disk()
        if shutil.disk_usage(download.directory).free < missing:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        for file in download.files:
            obtain(download, file)
        publish(download, revision)
    return download.snapshot


def kind_of(error: Exception) -> str:
    """What went wrong, in the words of the protocol."""
    match error:
        case DamagedError():
            return "integrity"
        case GatedRepoError() | DisabledRepoError():
            return "forbidden"
        case RepositoryNotFoundError() | RevisionNotFoundError() | RemoteEntryNotFoundError():
            return "not-found"
        case HfHubHTTPError():
            return _kind_of_answer(error.response)
        case HFValidationError():
            return "not-found"
        case OfflineModeIsEnabled() | httpx2.HTTPError() | ValueError():
            # A ValueError: something answers that is not a hub, such as a proxy's log-in page.
            return "unreachable"
        case OSError():
            return "no-space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "unwritable"
    return "other"


def _kind_of_answer(response: httpx2.Response) -> str:
    # A hub explains its refusals in headers. Without them a proxy or a log-in page has answered,
    # and that must not be taken for the hub's final word.
    explained = _EXPLANATIONS & set(response.headers)
    if is_passing(response.status_code) or not explained:
        return "unreachable"
    by_status = {401: "forbidden", 403: "forbidden", 451: "forbidden", 404: "not-found"}
    return by_status.get(response.status_code, "other")


def _describe(error: Exception) -> str:
    """For the log: what and where, without texts that could hold a path or a signed address."""
    what = ""
    if isinstance(error, HfHubHTTPError):
        what = str(error.response.status_code)
    elif isinstance(error, httpx2.TransportError):
        what = str(error)  # "[Errno 111] Connection refused", "certificate verify failed"
    elif isinstance(error, OSError) and error.errno is not None:
        what = errno.errorcode.get(error.errno, str(error.errno))
    here = str(Path(__file__).parent)
    frames = traceback.extract_tb(error.__traceback__)
    places = [f"{frame.name}:{frame.lineno}" for frame in frames if frame.filename.startswith(here)]
    return f"{type(error).__name__} {what} in {places[-1] if places else '?'}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one download; the exit code says whether it succeeded."""
    parser = argparse.ArgumentParser(prog="app.stores.hub_download")
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--repository", required=True)
    parser.add_argument("--revision", required=True)
    parser.add_argument("--hub-timeout", type=float, required=True)
    options = parser.parse_args(arguments)
    _end_with_parent()
    try:
        directory = fetch(options.cache, options.repository, options.revision, options.hub_timeout)
    except Exception as error:  # noqa: BLE001 - the parent learns of everything on this one channel
        emit("failed", kind=kind_of(error), message=_describe(error))
        return 1
    emit("done", directory=str(directory))
    return 0


if __name__ == "__main__":
    sys.exit(main())
