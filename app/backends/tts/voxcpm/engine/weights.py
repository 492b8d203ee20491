"""A checkpoint's tensors, mapped from its files and handed out one by one.

Each tensor is taken once, by name and shape; whoever takes it copies it into the form it computes
with. The pages of the file that were read for it can then be dropped, so that loading needs
little more memory than the loaded model.
"""

import ctypes
import mmap
import sys
from pathlib import Path

import torch
from torch import Tensor

from app.backends.base import BackendLoadError
from app.backends.tts.voxcpm.checkpoint import read_weights

_MADV_DONTNEED = 4
# Of the files, while they are being read.
_MOST_RESIDENT_BYTES = 64 << 20
_MADVISE = ctypes.CDLL(None).madvise if sys.platform == "linux" else None


class Weights:
    """Tensors by the names that the library's modules give them, `audio_vae.` included."""

    def __init__(self, directory: Path, *, dtype: torch.dtype, device: torch.device) -> None:
        """Map the files of `directory`. Raises BackendLoadError for one that is damaged."""
        self._dtype = dtype
        self._device = device
        self._tensors = read_weights(directory, "model.safetensors", "pytorch_model.bin")
        vae = read_weights(directory, "audiovae.safetensors", "audiovae.pth")
        self._tensors |= {f"audio_vae.{name}": tensor for name, tensor in vae.items()}
        self._taken: list[Tensor] = []
        self.taken_bytes = 0

    def take(self, name: str) -> Tensor:
        """A tensor in the model's dtype, on its device.

        Raises BackendLoadError if there is none of this name, as `take_audio` does.
        """
        return self._take(name, self._dtype)

    def take_audio(self, name: str) -> Tensor:
        """A tensor of the audio autoencoder, float32 (or its own integers), on the device."""
        return self._take(f"audio_vae.{name}", torch.float32)

    def finish(self) -> None:
        """Every tensor must have been taken. Raises BackendLoadError otherwise."""
        self._release()
        if self._tensors:
            message = f"its weights do not fit its config.json: {len(self._tensors)} are not used"
            raise BackendLoadError(message)

    def _take(self, name: str, dtype: torch.dtype) -> Tensor:
        source = self._tensors.pop(name, None)
        if source is None:
            raise BackendLoadError(f"its weights are not complete: {name} is missing")
        if sum(tensor.nbytes for tensor in self._taken) > _MOST_RESIDENT_BYTES:
            self._release()
        self._taken.append(source)
        tensor = source.to(self._device, dtype if source.is_floating_point() else source.dtype)
        self.taken_bytes += tensor.nbytes
        # Vectors are kept as they are; a copy does not hang on the file.
        return tensor.clone() if tensor.dim() < 2 else tensor

    def _release(self) -> None:
        for tensor in self._taken:
            _drop_pages(tensor)
        self._taken.clear()


def _drop_pages(tensor: Tensor) -> None:
    """Take the whole pages under a mapped tensor out of this process's memory.

    Whoever reads the tensor again gets them from the file.
    """
    if _MADVISE is None or tensor.device.type != "cpu":
        return
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if end > start:
        _MADVISE(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_DONTNEED)
