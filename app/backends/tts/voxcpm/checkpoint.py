"""Loading a VoxCPM checkpoint into the library's own modules, with its integrity checked.

The library's loader accepts a checkpoint with missing weights and leaves them random; it also
fixes the number format in config.json. So the parts are put together here.
"""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.backends.base import BackendLoadError

if TYPE_CHECKING:
    import torch

# voxcpm.model.voxcpm.VoxCPMModel or voxcpm.model.voxcpm2.VoxCPM2Model; the library has no types.
LibraryModel = Any

logger = logging.getLogger(__name__)

# CPU features that make bfloat16 arithmetic quick (x86 and Arm names).
_BFLOAT16_FLAGS = {"amx_bf16", "avx512_bf16", "bf16"}
_CPU_INFO = Path("/proc/cpuinfo")


def load_model(directory: Path, *, device: str, dtype: str) -> LibraryModel:
    """Build the model of `directory` on `device` (`auto` picks one), ready to generate.

    `dtype` is `auto`, `float32` or `bfloat16`. Blocking; call it on the model's own thread.
    Raises BackendLoadError for a checkpoint that is damaged or does not fit the library.
    """
    library = library_classes(directory)
    import torch
    from transformers import LlamaTokenizerFast

    config = read_config(directory, library)
    config.dtype = choose_dtype(dtype, config.dtype, device)
    vae = library.vae(config=config.audio_vae_config)
    tokenizer = LlamaTokenizerFast.from_pretrained(str(directory))
    model = library.model(config, tokenizer, vae, device=None if device == "auto" else device)
    model = model.to(getattr(torch, config.dtype))
    model.audio_vae = model.audio_vae.to(torch.float32)
    _fill(model, directory)
    model = model.to(model.device).eval()
    # The library compiles only for the plain name "cuda"; elsewhere it would only complain.
    return model.optimize(disable=model.device != "cuda")


@dataclass(frozen=True, slots=True)
class LibraryClasses:
    """The library's classes for one generation of the model."""

    model: Any
    config: Any
    vae: Any
    vae_config: Any


def library_classes(directory: Path) -> LibraryClasses:
    """The classes that the checkpoint's architecture needs; imports the library.

    Raises BackendLoadError if the installed libraries do not fit together.
    """
    try:
        from voxcpm.model import voxcpm, voxcpm2
    except (ImportError, OSError) as error:
        # A torchaudio built for another torch fails with a bare OSError about a shared library.
        raise BackendLoadError(
            "the installed torch, torchaudio and voxcpm do not fit together; "
            "install the versions that this server's lock file names"
        ) from error
    architecture = json.loads((directory / "config.json").read_bytes()).get("architecture")
    if str(architecture).lower() == "voxcpm2":
        return LibraryClasses(
            voxcpm2.VoxCPM2Model, voxcpm2.VoxCPMConfig, voxcpm2.AudioVAEV2, voxcpm2.AudioVAEConfigV2
        )
    return LibraryClasses(
        voxcpm.VoxCPMModel, voxcpm.VoxCPMConfig, voxcpm.AudioVAE, voxcpm.AudioVAEConfig
    )


def read_config(directory: Path, library: LibraryClasses) -> Any:
    """The checkpoint's config.json as the library's VoxCPMConfig, its audio part always there."""
    config = library.config.model_validate_json((directory / "config.json").read_bytes())
    config.audio_vae_config = config.audio_vae_config or library.vae_config()
    return config


def choose_dtype(wanted: str, checkpoint: str, device: str) -> str:
    """The checkpoint's own format, unless it is told otherwise or the CPU would emulate it."""
    import torch

    own = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}.get(checkpoint, checkpoint)
    if wanted != "auto":
        return wanted
    on_cpu = device == "cpu" or (
        device == "auto" and not torch.cuda.is_available() and not torch.backends.mps.is_available()
    )
    return "float32" if on_cpu and not _cpu_has_bfloat16() else own


def _cpu_has_bfloat16() -> bool:
    if not _CPU_INFO.exists():
        return False
    return not _BFLOAT16_FLAGS.isdisjoint(_CPU_INFO.read_text(encoding="utf-8").split())


def _fill(model: LibraryModel, directory: Path) -> None:
    """Copy the checkpoint's weights into `model`; every one must be there, and no other."""
    state = read_weights(directory, "model.safetensors", "pytorch_model.bin")
    vae_state = read_weights(directory, "audiovae.safetensors", "audiovae.pth")
    state.update({f"audio_vae.{name}": tensor for name, tensor in vae_state.items()})
    expected = set(model.state_dict())
    missing, unexpected = sorted(expected - set(state)), sorted(set(state) - expected)
    if missing or unexpected:
        logger.error("checkpoint keys: missing %s, unexpected %s", missing[:20], unexpected[:20])
        raise BackendLoadError(
            f"its weights are not complete: {len(missing)} missing, {len(unexpected)} unexpected"
        )
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise BackendLoadError("its weights have other shapes than its config.json says") from error


def read_weights(directory: Path, preferred: str, fallback: str) -> "dict[str, torch.Tensor]":
    """Map the tensors of one file of a checkpoint. Raises BackendLoadError if it is damaged."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if (directory / preferred).exists():
            return load_file(directory / preferred)
        # weights_only: a pickle from a hub must not run code.
        loaded = torch.load(directory / fallback, map_location="cpu", weights_only=True, mmap=True)
    except (SafetensorError, RuntimeError, OSError, EOFError, ValueError) as error:
        raise BackendLoadError("a file of its weights is damaged") from error
    state: dict[str, torch.Tensor] = loaded.get("state_dict", loaded)
    return state
