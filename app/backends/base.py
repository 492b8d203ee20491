"""What every model backend promises, one Protocol per kind of model.

A backend class is found by name through `app.backends.registry`. Importing its module must be
cheap: the model library itself is imported inside `load`. Whoever holds a loaded backend may call
it from the event loop at any time; how it queues, batches or threads the work is its own affair.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol, Self

from app.domain.models import Capabilities, ModelSpec
from app.domain.speech import Speech, SpeechRequest


class BackendLoadError(Exception):
    """A model that cannot be loaded. `reason` may be shown to clients: no paths, no traces."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class TTSOptions:
    """How to load a text-to-speech model.

    Torch device and number format (`auto` picks), how weights are quantized, how much is spoken
    at once, and where encoded voices are kept. A backend reads what applies to it.
    """

    device: str = "auto"
    dtype: str = "auto"
    quantization: str = "none"
    batch_size: int = 16
    batch_invariant: bool = True
    voice_cache_bytes: int = 64 << 20
    voice_cache_dir: Path | None = None
    voice_cache_disk_bytes: int = 1 << 30


class TTSBackend(Protocol):
    """A loaded text-to-speech model.

    `required_files` lists what a complete checkpoint directory holds, each entry a group of
    alternatives; it is empty for a model that ships in a package.
    """

    required_files: ClassVar[tuple[tuple[str, ...], ...]]
    memory_bytes: int

    @classmethod
    def describe(cls, spec: ModelSpec, directory: Path | None) -> Capabilities | None:
        """What the model can do, read without loading it. None: not known before it is on disk.

        Raises BackendLoadError if the directory holds no model that this backend can run.
        """
        ...

    @classmethod
    async def load(cls, spec: ModelSpec, directory: Path | None, options: TTSOptions) -> Self:
        """Load the model. Raises BackendLoadError with the reason."""
        ...

    async def synthesize(self, request: SpeechRequest) -> Speech:
        """Speak `request.text`. Cancelling the call stops the work within one step of the model.

        `request.seed` is set. The same request gives the same samples whatever else is served.
        Raises a ValidationError for a text or clip that only the loaded model can judge.
        """
        ...

    async def close(self) -> None:
        """Free the model. Nothing may be asked of it afterwards."""
        ...
