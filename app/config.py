"""Every setting, with its type, default and bounds. Reading them happens in `load_settings`.

Environment names are flat (`TTS_MODEL_NAME`); in code they are grouped by prefix
(`settings.tts.model_name`). Nothing is read on import.
"""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from dotenv import dotenv_values
from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

MEBIBYTE = 2**20

# What may stand in a header and in an address: a hub id with or without a revision, a local name.
MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9._-]+)*(@[A-Za-z0-9._/-]+)?")

Names = Annotated[tuple[str, ...], NoDecode]


class SettingError(ValueError):
    """A setting whose value is well-formed, but makes no sense beside the others."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(f"{name}: {message}")


def _split(value: Any) -> Any:
    """`a, b` -> (`a`, `b`): lists in the environment are separated by commas."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value


class SpeechSettings(BaseSettings):
    """`TTS_*`: what may be asked of text-to-speech, and what happens under load."""

    model_config = SettingsConfigDict(env_prefix="TTS_", extra="ignore")

    model_name: str = Field(
        "openbmb/VoxCPM-0.5B",
        min_length=1,
        description="Model of a request that names none: a hub id (`@revision` may follow), "
        "a name from `MODEL_DIRECTORIES`, `hibari/heart`, or a directory with a checkpoint.",
    )
    fallback_model_name: str = Field(
        "hibari/heart",
        description="Embedded model that answers while the default model's weights are not on "
        "disk. Empty: no fallback.",
    )
    max_text_chars: int = Field(
        5_000, ge=1, le=1_000_000, description="Longest `text` of one request."
    )
    max_upload_bytes: int = Field(
        20 * MEBIBYTE, ge=1_024, description="Largest uploaded voice, counted while it is read."
    )
    max_queue: int = Field(
        32,
        ge=0,
        description="Requests that one model takes on beside the first, waiting or spoken "
        "together; beyond it the answer is 429.",
    )
    request_timeout_seconds: float = Field(
        300.0,
        gt=0,
        description="For receiving a request, and again for answering it; beyond it: 504.",
    )
    device: str = Field(
        "auto", description="Torch device of VoxCPM: `auto`, `cpu`, `cuda`, `cuda:1` or `mps`."
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="Number format of VoxCPM. `auto`: the checkpoint's own, but float32 on a CPU "
        "without bfloat16 arithmetic.",
    )
    engine: Literal["batched", "reference"] = Field(
        "batched",
        description="What runs VoxCPM: our engine, which speaks many requests at once, or the "
        "official library, one at a time.",
    )
    quantization: Literal["none", "int8-lm"] = Field(
        "none",
        description="`int8-lm`: the engine keeps the weights of VoxCPM's language models as 8-bit "
        "integers. Less memory, rounding errors.",
    )
    batch_size: int = Field(
        16, ge=1, le=32, description="How many requests the engine speaks at once; others wait."
    )
    batch_invariant: bool = Field(
        True,
        description="Whether a request gives the same bits whoever else is speaking. `false` is "
        "quicker in bfloat16 with many requests; a seed then holds for a lone request only.",
    )
    voice_cache_bytes: int = Field(
        64 * MEBIBYTE, ge=0, description="Memory for encoded voices, of each loaded model."
    )
    voice_cache_dir: Path | None = Field(
        None, description="Where encoded voices are kept on disk. Empty: in memory only."
    )
    voice_cache_disk_bytes: int = Field(
        1_024 * MEBIBYTE, ge=0, description="Disk for encoded voices, in `TTS_VOICE_CACHE_DIR`."
    )

    @field_validator("voice_cache_dir", mode="before")
    @classmethod
    def _no_directory(cls, value: Any) -> Any:
        return None if value == "" else value

    @field_validator("model_name", "fallback_model_name")
    @classmethod
    def _strip(cls, value: str) -> str:
        return value.strip()


class ModelSettings(BaseSettings):
    """`MODEL_*`: which models there are, where their weights live, how long they stay loaded."""

    model_config = SettingsConfigDict(env_prefix="MODEL_", extra="ignore")

    cache_dir: Path = Field(Path("models"), description="Where downloaded weights are kept.")
    directories: Annotated[dict[str, Path], NoDecode] = Field(
        default_factory=dict,
        description="Local checkpoints as `name=directory` pairs, separated by commas.",
    )
    allowed: Names = Field(
        (), description="Further hub ids that clients may name, separated by commas."
    )
    preload: Names = Field((), description="Models to load when the server starts.")
    load_timeout_seconds: float = Field(
        120.0, gt=0, description="How long a request waits for a model to load from disk."
    )
    retry_seconds: float = Field(
        10.0, ge=0, description="After a failed load, how long until a request may try again."
    )
    download_retry_seconds: float = Field(
        60.0, gt=0, description="After a failed download, how long until the next try."
    )
    hub_timeout_seconds: float = Field(
        5.0,
        gt=0,
        description="How long looking a model up on the hub may take before it is out of reach.",
    )
    memory_budget_bytes: int | None = Field(
        None, ge=1, description="Memory for loaded models; the least recently used leave first."
    )
    idle_timeout_seconds: float | None = Field(
        None, gt=0, description="A model that was not used for so long is unloaded."
    )

    @field_validator("memory_budget_bytes", "idle_timeout_seconds", mode="before")
    @classmethod
    def _empty_is_unset(cls, value: Any) -> Any:
        return None if value == "" else value

    @field_validator("allowed", "preload", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        return _split(value)

    @field_validator("directories", mode="before")
    @classmethod
    def _pairs(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        pairs = {}
        for part in _split(value):
            name, separator, directory = part.partition("=")
            if not (separator and name.strip() and directory.strip()):
                raise ValueError(f"expected name=directory, got {part!r}")
            pairs[name.strip()] = directory.strip()
        return pairs


class Settings(BaseSettings):
    """Everything the server can be told, in one object that is passed around."""

    model_config = SettingsConfigDict(extra="ignore")

    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65_535, description="Port to listen on; 0 picks a free one.")
    root_path: str = Field(
        "", description="Path under which a proxy serves this server, such as `/bawabah`."
    )
    debug: bool = Field(
        False, description="Reload on code changes and log at DEBUG. Answers stay the same."
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"] = Field(
        "INFO", description="Least severe level that is logged."
    )
    shutdown_grace_seconds: float = Field(
        30.0, ge=0, description="On SIGTERM, how long running requests may take to finish."
    )
    # NoDecode: variables that happen to be called TTS or MODELS are somebody else's.
    tts: Annotated[SpeechSettings, NoDecode] = Field(default_factory=SpeechSettings)
    models: Annotated[ModelSettings, NoDecode] = Field(default_factory=ModelSettings)

    @field_validator("log_level", mode="before")
    @classmethod
    def _upper(cls, value: Any) -> Any:
        return value.strip().upper() if isinstance(value, str) else value

    @field_validator("root_path")
    @classmethod
    def _one_leading_slash(cls, value: str) -> str:
        path = value.strip().strip("/")
        if path.split("/")[0] in {"api", "docs", "health", "openapi.json", "redoc"}:
            raise ValueError("must not begin like a path of this server")
        return f"/{path}" if path else ""


GROUPS: tuple[type[BaseSettings], ...] = (Settings, SpeechSettings, ModelSettings)


def environment_names() -> dict[str, tuple[type[BaseSettings], str]]:
    """Every environment name, with the group and the field it sets."""
    return {
        f"{group.model_config.get('env_prefix', '')}{field}".upper(): (group, field)
        for group in GROUPS
        for field in group.model_fields
        if field not in {"tts", "models"}
    }


def load_settings(env_file: Path | None = Path(".env")) -> Settings:
    """Read the environment and `env_file`; the environment wins.

    Raises pydantic's ValidationError, which names each wrong setting.
    """
    return Settings(
        _env_file=env_file,
        tts=SpeechSettings(_env_file=env_file),
        models=ModelSettings(_env_file=env_file),
    )


def unknown_env_keys(env_file: Path = Path(".env")) -> list[str]:
    """Keys of `env_file` that set nothing: a misspelt one would silently have no effect."""
    known = environment_names()
    return sorted(key for key in dotenv_values(env_file) if key.upper() not in known)
