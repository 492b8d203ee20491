"""What a VoxCPM checkpoint directory holds and what its config.json says, read without torch."""

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, Field, ValidationError

from app.backends.base import BackendLoadError
from app.domain.models import Capabilities, HubSource, ModelSpec

REQUIRED_FILES: tuple[tuple[str, ...], ...] = (
    ("config.json",),
    ("tokenizer.json",),
    ("model.safetensors", "pytorch_model.bin"),
    ("audiovae.safetensors", "audiovae.pth"),
)

_SHARED_PARAMETERS = frozenset(
    {
        "cfg_value",
        "inference_timesteps",
        "normalize",
        "seed",
        "min_seconds",
        "max_seconds",
        "retry_badcase",
        "retry_badcase_max_times",
        "retry_badcase_ratio_threshold",
        "sample_rate",
        "prompt_wav",
        "prompt_text",
    }
)


@dataclass(frozen=True, slots=True)
class Layout:
    """The facts of a checkpoint that a server needs before it loads it.

    One step of the model makes one patch of `patch_seconds`; text, prompt and speech together
    hold at most `max_length` tokens and patches.
    """

    architecture: Literal["voxcpm", "voxcpm2"]
    sample_rate_hz: int
    prompt_sample_rate_hz: int
    patch_seconds: float
    max_length: int

    def capabilities(self) -> Capabilities:
        """What a model of this layout can do."""
        second = self.architecture == "voxcpm2"
        own = frozenset({"style", "reference_wav"}) if second else frozenset()
        return Capabilities(
            parameters=_SHARED_PARAMETERS | own,
            # The first two generations were trained on Chinese and English, the third on many.
            languages=("zh", "en", "multilingual") if second else ("zh", "en"),
            voices=(),
            sample_rate_hz=self.sample_rate_hz,
            max_seconds=self.max_length * self.patch_seconds,
            prompt_sample_rate_hz=self.prompt_sample_rate_hz,
        )


# Known without a download, so that a client can choose before anything is fetched.
PUBLISHED: dict[str, Layout] = {
    "openbmb/VoxCPM-0.5B": Layout("voxcpm", 16_000, 16_000, 0.08, 4_096),
    "openbmb/VoxCPM1.5": Layout("voxcpm", 44_100, 44_100, 0.16, 4_096),
    "openbmb/VoxCPM2": Layout("voxcpm2", 48_000, 16_000, 0.16, 8_192),
}


def capabilities_of(spec: ModelSpec, directory: Path | None) -> Capabilities | None:
    """What a model can do, from its config.json or from what is known of the published ones."""
    if directory is not None:
        return read_layout(directory).capabilities()
    source = spec.source
    layout = PUBLISHED.get(source.repository) if isinstance(source, HubSource) else None
    return layout.capabilities() if layout else None


class _VAEConfig(BaseModel):
    """The audio autoencoder's part of config.json, with the library's defaults."""

    encoder_rates: list[int] = [2, 5, 8, 8]
    sample_rate: int = 16_000
    out_sample_rate: int = 48_000


class _Config(BaseModel):
    architecture: Literal["voxcpm", "voxcpm2"] = "voxcpm"
    patch_size: int | None = Field(None, ge=1)
    max_length: int | None = Field(None, ge=1)
    audio_vae_config: _VAEConfig | None = None


def read_layout(directory: Path) -> Layout:
    """Read config.json. Raises BackendLoadError if it is not a VoxCPM checkpoint's."""
    try:
        values = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        if isinstance(values, dict) and isinstance(values.get("architecture"), str):
            values["architecture"] = values["architecture"].lower()
        config = _Config.model_validate(values)
    except (OSError, ValueError, ValidationError) as error:
        raise BackendLoadError("its config.json is not that of a VoxCPM checkpoint") from error
    vae = config.audio_vae_config or _VAEConfig()
    second = config.architecture == "voxcpm2"
    patch_size = config.patch_size or (4 if second else 2)
    return Layout(
        architecture=config.architecture,
        sample_rate_hz=vae.out_sample_rate if second else vae.sample_rate,
        prompt_sample_rate_hz=vae.sample_rate,
        patch_seconds=patch_size * prod(vae.encoder_rates) / vae.sample_rate,
        max_length=config.max_length or (8_192 if second else 4_096),
    )
