"""Encoded voices, kept so that a recording is encoded once however often it is spoken with.

Entries are found by the content of the recording, so nothing has to be told apart or expired. The
memory's part is bounded in bytes, least recently used first out; with a directory they are also
kept on disk, one file each, for the next process or the one beside this one.
"""

import hashlib
import logging
import os
import tempfile
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path
from time import time

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from app.domain.audio import Clip

logger = logging.getLogger(__name__)

_SUFFIX = ".voice"
_PARTIAL = "partial-"
# A file that is still being written is younger.
_LEFTOVER_SECONDS = 3_600


def voice_key(clip: Clip, *, model: str, role: str) -> str:
    """A name for what `model` makes of a recording that is used as `role`."""
    digest = hashlib.sha256(np.ascontiguousarray(clip.samples, dtype=np.float32).tobytes())
    digest.update(f"{clip.sample_rate_hz} {model} {role}".encode())
    return digest.hexdigest()


class VoiceCache:
    """Tensors by key. Used from one thread; other processes may share the directory."""

    def __init__(
        self, max_bytes: int, directory: Path | None = None, max_disk_bytes: int = 0
    ) -> None:
        """Keep up to `max_bytes` in memory, and `max_disk_bytes` in `directory`."""
        self._max_bytes = max_bytes
        self._directory = directory
        self._max_disk_bytes = max_disk_bytes
        self._tensors: OrderedDict[str, Tensor] = OrderedDict()
        self.bytes_in_memory = 0
        if directory is not None:
            _remove_leftovers(directory)

    def get(self, key: str) -> Tensor | None:
        """What was put under `key`, if it is still there. It must not be written to."""
        tensor = self._tensors.get(key)
        if tensor is not None:
            self._tensors.move_to_end(key)
            return tensor
        tensor = self._read(key)
        if tensor is not None:
            self._keep(key, tensor)
        return tensor

    def put(self, key: str, tensor: Tensor, *, on_disk: bool = True) -> None:
        """Keep `tensor`, and write it to disk if there is a directory and it may go there."""
        tensor = tensor.detach().clone()
        self._keep(key, tensor)
        if on_disk and self._directory is not None:
            try:
                self._write(self._directory, key, tensor)
            except OSError as error:
                logger.warning("an encoded voice could not be written", extra={"error": str(error)})

    def _keep(self, key: str, tensor: Tensor) -> None:
        if tensor.nbytes > self._max_bytes:
            return
        before = self._tensors.pop(key, None)
        self._tensors[key] = tensor
        self.bytes_in_memory += tensor.nbytes - (before.nbytes if before is not None else 0)
        while self.bytes_in_memory > self._max_bytes:
            _, oldest = self._tensors.popitem(last=False)
            self.bytes_in_memory -= oldest.nbytes

    def _read(self, key: str) -> Tensor | None:
        if self._directory is None:
            return None
        path = self._directory / (key + _SUFFIX)
        try:
            tensor = load(path.read_bytes())["latents"]
            os.utime(path)
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError, KeyError) as error:
            logger.warning("an encoded voice on disk is damaged", extra={"error": str(error)})
            with suppress(OSError):
                path.unlink()
            return None
        return tensor

    def _write(self, directory: Path, key: str, tensor: Tensor) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=directory, prefix=_PARTIAL, delete=False) as file:
            try:
                file.write(save({"latents": tensor.cpu().contiguous()}))
                file.flush()
                os.fsync(file.fileno())
                Path(file.name).replace(directory / (key + _SUFFIX))
            except OSError:
                Path(file.name).unlink(missing_ok=True)
                raise
        self._make_room(directory)

    def _make_room(self, directory: Path) -> None:
        files = []
        for path in directory.glob("*" + _SUFFIX):
            try:
                state = path.stat()
            except FileNotFoundError:  # another process was quicker
                continue
            files.append((state.st_mtime_ns, state.st_size, path))
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= self._max_disk_bytes:
                break
            path.unlink(missing_ok=True)
            total -= size


def _remove_leftovers(directory: Path) -> None:
    """What processes that were killed had begun to write."""
    for path in directory.glob(_PARTIAL + "*"):
        with suppress(FileNotFoundError):  # another process was quicker
            if time() - path.stat().st_mtime > _LEFTOVER_SECONDS:
                path.unlink()
