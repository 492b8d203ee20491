"""Models as values: which there are, where their weights come from, what they can do."""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

# Script names as Unicode spells them at the start of a character's name: "LATIN SMALL LETTER A".
LATIN = "LATIN"


class ModelState(StrEnum):
    """Where a model is on its way into memory."""

    ABSENT = "absent"
    DOWNLOADING = "downloading"
    LOADING = "loading"
    READY = "ready"
    UNLOADING = "unloading"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class HubSource:
    """Weights in a repository of the Hugging Face hub, at a revision (branch, tag or commit)."""

    repository: str
    revision: str = "main"


@dataclass(frozen=True, slots=True)
class DirectorySource:
    """Weights in a directory of this machine. The path never reaches a client."""

    directory: Path


@dataclass(frozen=True, slots=True)
class EmbeddedSource:
    """Weights that ship inside an installed package: always on disk."""


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A model this server knows: its public name, the backend that runs it, its weights."""

    name: str
    backend: str
    source: HubSource | DirectorySource | EmbeddedSource
    kind: str = "text-to-speech"


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a model can do, known without loading it.

    `parameters` holds the wire names of the request fields that the model honours beyond `text`
    and `model`. `scripts` is what its text may be written in (None: any), as Unicode script
    names; `prompt_sample_rate_hz` is the rate at which it takes a recorded voice.
    """

    parameters: frozenset[str]
    languages: tuple[str, ...]
    voices: tuple[str, ...]
    sample_rate_hz: int
    max_chars: int | None = None
    max_seconds: float | None = None
    scripts: frozenset[str] | None = None
    prompt_sample_rate_hz: int | None = None


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """One model at one moment. `progress` is 0 to 1 while downloading, else None."""

    spec: ModelSpec
    state: ModelState
    on_disk: bool
    progress: float | None = None
    reason: str | None = None
    capabilities: Capabilities | None = None
