"""Model weights on disk: where they are, whether they are complete, how they get there.

The cache directory has the hub's own layout (`models--org--name/` with `blobs/`, `snapshots/` and
`refs/`), so a cache that somebody filled with `hf download` for a machine without a network serves
as it is, and what this server fetched is found by every other tool.

What counts as complete: every required file is in the snapshot directory. That is sound because a
name appears there only when the whole file is there. The official client links a file after it
received all of its bytes; `app.stores.hub_files`, which does the fetching here, goes further:

1. it receives every file into `blobs/<hash>.incomplete` and checks size and hash before the file
   gets its own name in `blobs/`,
2. it links files into the snapshot only when all of them have been checked, the largest last,
3. it writes `refs/<revision>` last of all, and that is where `WeightStore.locate` starts.

Hence there is no moment at which an unchecked or half a file can be located, and no marker of our
own that a cache filled by other means would lack.

Fetching runs in a child process: it can be killed at any moment, computes its hashes away from the
event loop, never delays the exit of the server, and ends by itself when its parent is gone.
"""

import asyncio
import contextlib
import json
import logging
import os
import re
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

from app.domain.models import DirectorySource, HubSource, ModelSpec

logger = logging.getLogger(__name__)

COMMIT = re.compile(r"[0-9a-f]{40}")

_REPOSITORY = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
_REVISION = re.compile(r"\w[\w.-]*(/\w[\w.-]*)*", re.ASCII)
_SOURCE_ROOT = Path(__file__).parents[2]
_MAX_LINE_BYTES = 64 * 1024
_TERMINATE_SECONDS = 2.0


class WeightsError(Exception):
    """Weights could not be had. `reason` is short, names no path and may be shown to anyone."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class HubUnreachableError(WeightsError):
    """The hub does not answer: worth another try later."""


class WeightsNotFoundError(WeightsError):
    """No such repository or revision, or no access to it: another try changes nothing."""


class WeightsIntegrityError(WeightsError):
    """What arrived is not what the hub announced. It has been deleted."""


_FAILURES: dict[str, tuple[type[WeightsError], str]] = {
    "unreachable": (HubUnreachableError, "the model hub cannot be reached"),
    "not-found": (WeightsNotFoundError, "the model hub has no such model or revision"),
    "forbidden": (WeightsNotFoundError, "the model hub gives no access to this model"),
    "integrity": (WeightsIntegrityError, "the model's files arrived damaged"),
    "no-space": (WeightsError, "no disk space left for the model's files"),
    "unwritable": (WeightsError, "the model cache cannot be written"),
    "other": (WeightsError, "the download of the model failed"),
}


def repository_directory(cache_directory: Path, repository: str) -> Path:
    """Where the hub's layout keeps everything of one model repository."""
    return cache_directory / f"models--{repository.replace('/', '--')}"


class WeightStore:
    """The weights this machine has, and the way to get those it lacks."""

    def __init__(self, cache_directory: Path, *, hub_timeout_seconds: float = 5.0) -> None:
        self._cache_directory = cache_directory.absolute()
        self._hub_timeout_seconds = hub_timeout_seconds

    def locate(self, spec: ModelSpec, required_files: Sequence[Sequence[str]]) -> Path | None:
        """The directory with this model's weights, or None while a required file is missing.

        `required_files` lists groups of alternatives; one file of every group must be there.
        Costs one small read and a `stat` for each file.
        """
        if isinstance(spec.source, HubSource):
            directory = self._snapshot(spec.source)
        elif isinstance(spec.source, DirectorySource):
            directory = spec.source.directory
        else:
            raise TypeError("embedded weights are not in the weight store")
        if directory is None:
            return None
        try:
            complete = all(
                any((directory / name).is_file() for name in group) for group in required_files
            )
        except OSError:  # no permission to look
            return None
        return directory if complete else None

    async def fetch(self, spec: ModelSpec, on_progress: Callable[[int, int], None]) -> Path:
        """Download what is missing; returns the directory. Raises a `WeightsError`.

        `on_progress` gets bytes on disk and bytes in total, and the former never falls. What an
        earlier, interrupted fetch left on disk is used. Cancelling stops the child process before
        the cancellation goes on.
        """
        source = spec.source
        if not isinstance(source, HubSource):
            raise TypeError("only weights on the hub can be fetched")
        if not _is_well_formed(source):
            raise _failure("not-found", "malformed name", source)
        try:
            child = await self._start(source)
        except OSError as error:  # no memory or no process left
            raise _failure("other", type(error).__name__, source) from error
        try:
            return await _follow(child, source, on_progress)
        finally:
            await _unless_interrupted(_stop(child))

    def _snapshot(self, source: HubSource) -> Path | None:
        if not _is_well_formed(source):
            return None
        repository = repository_directory(self._cache_directory, source.repository)
        commit = source.revision
        if not COMMIT.fullmatch(commit):
            try:
                commit = (repository / "refs" / commit).read_text("ascii").strip()
            except (OSError, ValueError):
                return None
        return repository / "snapshots" / commit if COMMIT.fullmatch(commit) else None

    async def _start(self, source: HubSource) -> Process:
        return await asyncio.create_subprocess_exec(
            # -P: what is imported does not depend on the directory the server was started in.
            *(sys.executable, "-P", "-m", "app.stores.hub_download"),
            *("--cache", str(self._cache_directory)),
            *("--repository", source.repository, "--revision", source.revision),
            *("--hub-timeout", str(self._hub_timeout_seconds)),
            env=_child_environment(),
            stdin=PIPE,  # never written to: its end tells the child that we are gone
            stdout=PIPE,
            stderr=DEVNULL,  # the client's warnings hold signed addresses and paths
            limit=_MAX_LINE_BYTES,
            start_new_session=True,  # Ctrl-C in a terminal is for the server, which then stops us
        )


def _child_environment() -> dict[str, str]:
    """Ours, so that HF_ENDPOINT, HF_TOKEN, HF_HUB_DOWNLOAD_TIMEOUT and proxies are the operator's.

    Telemetry is off because it tells the hub what is installed here, and costs a request.
    """
    inherited = dict(os.environ)  # noqa: TID251 - handed on whole, not read for settings
    search_path = filter(None, [str(_SOURCE_ROOT), inherited.get("PYTHONPATH")])
    return inherited | {
        "PYTHONPATH": os.pathsep.join(search_path),
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }


def _is_well_formed(source: HubSource) -> bool:
    """Whether the names can be parts of a path: they become directories of the cache."""
    return bool(_REPOSITORY.fullmatch(source.repository) and _REVISION.fullmatch(source.revision))


def _failure(kind: str, message: str, source: HubSource) -> WeightsError:
    """The exception for what the child reported; its message is for the log alone."""
    error_class, reason = _FAILURES.get(kind, _FAILURES["other"])
    # Only what the exception does not carry: how bad the failure is, is for the caller to say.
    logger.info("hub download failed", extra={"repository": source.repository, "cause": message})
    return error_class(reason)


async def _follow(
    child: Process, source: HubSource, on_progress: Callable[[int, int], None]
) -> Path:
    """Read what the child reports until it is done or has failed."""
    while (event := await _next_event(child)) is not None:
        match event:
            case {"event": "progress", "done_bytes": int(done), "total_bytes": int(total)}:
                on_progress(done, total)
            case {"event": "done", "directory": str(directory)}:
                return Path(directory)
            case {"event": "failed", "kind": str(kind), "message": str(message)}:
                raise _failure(kind, message, source)
            case _:
                break
    raise _failure("other", "the download process ended without a result", source)


async def _next_event(child: Process) -> Any:
    """The next line of the child as a value; None at its end and for anything but JSON."""
    assert child.stdout is not None  # it was started with a pipe
    try:
        line = await child.stdout.readline()
        return json.loads(line) if line else None
    except ValueError:  # not JSON, or longer than the limit
        return None


async def _stop(child: Process) -> None:
    """End the child, if it still runs, and wait until it is gone."""
    with contextlib.suppress(ProcessLookupError):
        if child.returncode is None:
            child.terminate()
        try:
            async with asyncio.timeout(_TERMINATE_SECONDS):
                await child.wait()
        except TimeoutError:
            child.kill()
            await child.wait()


async def _unless_interrupted(stopping: Coroutine[Any, Any, None]) -> None:
    """Finish `stopping` although we are cancelled, and cancelled again while we wait for it.

    An anyio scope repeats its cancellation at every wait; the child must be gone all the same.
    """
    task = asyncio.create_task(stopping)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled
    task.result()
