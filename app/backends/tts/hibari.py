"""The embedded voice: hibari, an English model that ships inside its package.

It needs no download and speaks faster than real time on any machine, so it answers while a large
model is still on its way.
"""

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np

from app.backends.base import BackendLoadError, TTSOptions
from app.backends.worker import Cancellation, WorkerThread
from app.domain.audio import Samples
from app.domain.models import LATIN, Capabilities, ModelSpec
from app.domain.speech import Speech, SpeechRequest
from app.errors import FieldError, UnspeakableTextError

if TYPE_CHECKING:
    from hibari import Hibari

SAMPLE_RATE_HZ = 24_000
# The only voice in the package: hibari would download any other by itself.
VOICE = "heart"


class HibariBackend:
    """One voice on one thread; a sentence is the step after which a caller may leave."""

    required_files: ClassVar[tuple[tuple[str, ...], ...]] = ()

    def __init__(self, engine: "Hibari", thread: WorkerThread) -> None:
        self._engine = engine
        self._thread = thread
        self.memory_bytes = Path(engine.model_path).stat().st_size

    @classmethod
    def describe(cls, _spec: ModelSpec, _directory: Path | None) -> Capabilities:
        """English only, one voice."""
        return Capabilities(
            parameters=frozenset({"voice", "seed", "sample_rate"}),
            languages=("en",),
            voices=(VOICE,),
            sample_rate_hz=SAMPLE_RATE_HZ,
            scripts=frozenset({LATIN}),
        )

    @classmethod
    async def load(cls, spec: ModelSpec, _directory: Path | None, _options: TTSOptions) -> Self:
        """Start the thread and read the model on it."""
        thread = WorkerThread(spec.name)
        try:
            return cls(await thread.run(_load_engine), thread)
        except BaseException as error:
            await thread.close()
            if isinstance(error, ImportError):
                raise BackendLoadError("the hibari-tts package is not installed") from error
            raise

    async def synthesize(self, request: SpeechRequest) -> Speech:
        """Speak English text at 24 kHz."""
        samples = await self._thread.run(lambda caller: self._speak(request, caller))
        return Speech(samples, SAMPLE_RATE_HZ)

    async def close(self) -> None:
        """End the thread."""
        await self._thread.close()

    def _speak(self, request: SpeechRequest, caller: Cancellation) -> Samples:
        sentences = []
        for sentence in self._engine.stream(request.text, seed=request.seed):
            caller.check()
            sentences.append(sentence)
        samples = np.concatenate([*sentences, np.zeros(0, np.float32)])
        if samples.size == 0:
            message = "there is nothing in it that this model can speak"
            raise UnspeakableTextError(f"text: {message}", errors=(FieldError("text", message),))
        return samples


def _load_engine(_: Cancellation) -> "Hibari":
    from hibari import Hibari

    engine = Hibari(voice=VOICE)
    engine("Ready.")  # reads the pronunciation tables, which the first request would wait for
    return engine
