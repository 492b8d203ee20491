"""A process that speaks alone and beside a busy neighbour, and prints how long a step took."""

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter

from app.backends.base import TTSOptions
from app.backends.tts.voxcpm.layout import read_layout
from app.backends.tts.voxcpm.reference import ReferenceBackend
from app.domain.models import DirectorySource, ModelSpec
from app.domain.speech import SpeechRequest

TEXT = "The quick brown fox jumps over the lazy dog."


@contextmanager
def busy_neighbour() -> Iterator[None]:
    """A pure Python loop in a process of its own."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


async def main(directory: Path, steps: int, rounds: int) -> None:
    """Load, warm up, and measure each round alone and then beside."""
    spec = ModelSpec("bench", "voxcpm", DirectorySource(directory))
    backend = await ReferenceBackend.load(spec, directory, TTSOptions())
    seconds = steps * read_layout(directory).patch_seconds
    request = SpeechRequest(
        TEXT, seed=0, min_seconds=seconds, max_seconds=seconds, retry_badcase=False
    )

    async def milliseconds_per_step() -> float:
        began = perf_counter()
        await backend.synthesize(request)
        return (perf_counter() - began) * 1000 / steps

    await milliseconds_per_step()
    measured: dict[str, list[float]] = {"alone": [], "beside": []}
    for _ in range(rounds):
        measured["alone"].append(await milliseconds_per_step())
        with busy_neighbour():
            measured["beside"].append(await milliseconds_per_step())
    print(json.dumps(measured))


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
