"""The files of one model on the hub: which are needed, receiving them, checking them, naming them.

Addresses, credentials, proxies, sessions and the meaning of error answers are the hub client's
(`huggingface_hub`). Only the receiving of bytes is ours: the client writes each attempt to a new
temporary file and deletes it when the attempt fails, so that a download of gigabytes which is
killed at 90 % starts again from nothing, and it checks sizes but not hashes. Here a partial file
has a stable name, is continued with a Range request, even by the next process, and becomes a blob
only after its hash was checked. Files come over plain HTTP, not by the client's Xet protocol: that
cannot be continued, keeps a cache outside of ours and talks to hosts which mirrors do not mirror.
"""

import hashlib
import os
import re
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import httpx2
from huggingface_hub import HfApi, RepoFile, get_session, hf_hub_url, hf_raise_for_status
from huggingface_hub.constants import HF_HUB_DOWNLOAD_TIMEOUT
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined,unused-ignore]

from app.stores.weights import COMMIT, repository_directory

_WANTED_SUFFIXES = frozenset(
    {".bin", ".jinja", ".json", ".model", ".pt", ".pth", ".py", ".safetensors", ".txt"}
)
_WANTED_STEMS = ("licence", "license", "notice")
_PICKLES = frozenset({".bin", ".pt", ".pth"})
_BLOB = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_SHA256_DIGITS = 64
_PARTIAL_SUFFIX = ".incomplete"
_PASSING_STATUSES = frozenset({408, 425, 429})
# Attempts in a row that bring not one byte. Files may be on another host than the list of them:
# while nothing has come at all, that host is probably out of reach, which is to be known soon.
_MAX_STALLS = 5
_MAX_STALLS_AT_START = 1


class DamagedError(Exception):
    """The bytes are not those that the hub announced."""


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file as the hub lists it. `blob` is its git hash or, for large files, its SHA-256."""

    name: str
    size: int
    blob: str

    def matches(self, path: Path) -> bool:
        """Whether the file at `path` has exactly the announced content."""
        if path.stat().st_size != self.size:
            return False
        with path.open("rb") as content:
            if len(self.blob) == _SHA256_DIGITS:
                digest = hashlib.file_digest(content, "sha256")
            else:
                header = f"blob {self.size}\0".encode()
                digest = hashlib.file_digest(
                    content, lambda: hashlib.sha1(header, usedforsecurity=False)
                )
        return digest.hexdigest() == self.blob


@dataclass(frozen=True, slots=True)
class Download:
    """One revision of one repository, and the places its files take in the cache."""

    repository: str
    commit: str
    files: tuple[RemoteFile, ...]
    headers: dict[str, str] = field(repr=False)  # the operator's token is in there
    timeout: httpx2.Timeout
    directory: Path

    @property
    def snapshot(self) -> Path:
        """The directory that a model is loaded from."""
        return self.directory / "snapshots" / self.commit

    def blob(self, file: RemoteFile) -> Path:
        """The checked content of a file."""
        return self.directory / "blobs" / file.blob

    def partial(self, file: RemoteFile) -> Path:
        """The beginning of a file's content, not checked."""
        return self.directory / "blobs" / f"{file.blob}{_PARTIAL_SUFFIX}"

    def bytes_on_disk(self) -> int:
        """How much of the files is here, partial files included."""
        return sum(
            min(
                file.size,
                _size(self.snapshot / file.name)
                or _size(self.blob(file))
                or _size(self.partial(file)),
            )
            for file in self.files
        )


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def wanted(names: Collection[str]) -> frozenset[str]:
    """The files a model needs: no pictures, samples or pages, and no pickle that has a safe twin.

    The loaders take `model.safetensors` before `pytorch_model.bin`, and so on for other stems.
    """

    def is_wanted(name: str) -> bool:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name:
            return False
        twin = path.with_name(f"{path.stem.replace('pytorch_model', 'model')}.safetensors")
        if path.suffix in _PICKLES and str(twin) in names:
            return False
        return path.suffix in _WANTED_SUFFIXES or path.stem.lower().startswith(_WANTED_STEMS)

    return frozenset(filter(is_wanted, names))


def look_up(repository: str, revision: str, cache_directory: Path, timeout: float) -> Download:
    """Ask the hub which commit this is and which files it has."""
    hub = HfApi()
    commit = revision
    if not COMMIT.fullmatch(revision):
        commit = hub.model_info(repository, revision=revision, timeout=timeout).sha or ""
    tree = {
        entry.path: entry
        for entry in hub.list_repo_tree(repository, revision=commit, recursive=True)
        if isinstance(entry, RepoFile)
    }
    needed = wanted(tree)
    files = [
        RemoteFile(name, entry.size, entry.lfs.sha256 if entry.lfs else entry.blob_id)
        for name, entry in tree.items()
        if name in needed
    ]
    if not COMMIT.fullmatch(commit) or not all(_BLOB.fullmatch(file.blob) for file in files):
        raise ValueError("not the answer of a hub")
    return Download(
        repository=repository,
        commit=commit,
        files=tuple(sorted(files, key=lambda file: file.size)),
        # Compressed answers have no length and cannot be continued.
        headers=build_hf_headers() | {"Accept-Encoding": "identity"},
        timeout=httpx2.Timeout(HF_HUB_DOWNLOAD_TIMEOUT, connect=timeout),
        directory=repository_directory(cache_directory, repository),
    )


def obtain(download: Download, file: RemoteFile) -> None:
    """See to it that the checked content of `file` is on disk."""
    blob, partial = download.blob(file), download.partial(file)
    for path in (download.snapshot / file.name, blob):
        if path.exists():
            if file.matches(path):
                return
            path.unlink()
    try:
        _receive(download, file, partial)
        if not file.matches(partial):
            raise DamagedError
    except DamagedError:
        partial.unlink(missing_ok=True)
        raise
    with partial.open("rb") as content:
        os.fsync(content.fileno())  # after a power failure the name must not stand for less
    partial.replace(blob)


def is_passing(status: int) -> bool:
    """Whether an answer of this status may be a better one in a moment."""
    return status in _PASSING_STATUSES or status >= httpx2.codes.INTERNAL_SERVER_ERROR


def _receive(download: Download, file: RemoteFile, partial: Path) -> None:
    """Append to `partial` until it is whole. Breaks are mended for as long as bytes still come."""
    url = hf_hub_url(download.repository, file.name, revision=download.commit)
    partial.touch()
    stalls, allowed = 0, _MAX_STALLS_AT_START
    while (before := _size(partial)) < file.size:
        broken: Exception | None = None
        try:
            _append(url, download, partial, before, file.size)
        except (httpx2.TransportError, HfHubHTTPError) as error:
            if isinstance(error, HfHubHTTPError) and not is_passing(error.response.status_code):
                raise
            broken = error
        if _size(partial) > before:
            stalls, allowed = 0, _MAX_STALLS
        else:
            stalls += 1
        if stalls > allowed:
            raise broken or DamagedError
        if broken:
            time.sleep(0.25 * 2**stalls)


def _append(url: str, download: Download, partial: Path, start: int, size: int) -> None:
    """One request for the rest of a file, written as it comes."""
    headers = download.headers | ({"Range": f"bytes={start}-"} if start else {})
    with get_session().stream("GET", url, headers=headers, timeout=download.timeout) as response:
        if response.status_code == httpx2.codes.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise DamagedError  # the file ends before the announced size
        hf_raise_for_status(response)
        continued = response.status_code == httpx2.codes.PARTIAL_CONTENT
        with partial.open("ab" if continued else "wb") as content:
            for chunk in response.iter_bytes():
                content.write(chunk)
                content.flush()  # what was received survives a kill
                if content.tell() > size:
                    raise DamagedError
        if not continued and _size(partial) < size:
            raise DamagedError  # the server considers this the whole file


def publish(download: Download, revision: str) -> None:
    """Give the checked files their names, largest last, and then the revision its commit."""
    for file in download.files:
        link = download.snapshot / file.name
        if link.exists():
            continue
        link.unlink(missing_ok=True)  # a link that leads nowhere
        link.parent.mkdir(parents=True, exist_ok=True)
        ups = [".."] * (len(PurePosixPath(file.name).parts) + 1)
        try:
            link.symlink_to(Path(*ups, "blobs", file.blob))
        except OSError:  # a file system without links
            download.blob(file).replace(link)
    for path in (download.directory / "blobs").glob(f"*{_PARTIAL_SUFFIX}"):
        # Beginnings of files that a newer revision has replaced. The client's own temporary files
        # have one more part in their names, and may be in use.
        if _BLOB.fullmatch(path.name.removesuffix(_PARTIAL_SUFFIX)):
            path.unlink(missing_ok=True)
    if revision != download.commit:
        reference = download.directory / "refs" / revision
        reference.parent.mkdir(parents=True, exist_ok=True)
        temporary = reference.with_name(f"{reference.name}.{os.getpid()}.tmp")
        temporary.write_text(download.commit, "ascii")
        temporary.replace(reference)
