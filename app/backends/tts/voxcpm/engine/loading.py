"""From a checkpoint directory to networks that are ready to speak."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from app.backends.base import BackendLoadError
from app.backends.tts.voxcpm.checkpoint import choose_dtype, library_classes, read_config
from app.backends.tts.voxcpm.engine.codec import AudioDecoder, AudioEncoder
from app.backends.tts.voxcpm.engine.network import Network
from app.backends.tts.voxcpm.engine.weights import Weights
from app.backends.tts.voxcpm.layout import REQUIRED_FILES


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model's parts. `fingerprint` is that of the checkpoint's files."""

    network: Network
    decoder: AudioDecoder
    encoder: AudioEncoder
    tokenizer: Any
    memory_bytes: int
    fingerprint: str


def load_model(
    directory: Path, *, device: str, dtype: str, quantize: bool, batch_invariant: bool = True
) -> LoadedModel:
    """Build the model of `directory`, and let it make two patches.

    Blocking; call it on the model's own thread. Raises BackendLoadError for a checkpoint that is
    damaged, incomplete or not of its own config.json.
    """
    library = library_classes(directory)
    from transformers import LlamaTokenizerFast
    from voxcpm.model.utils import mask_multichar_chinese_tokens

    config = read_config(directory, library)
    place = torch.device(_choose_device(device))
    number_format: torch.dtype = getattr(torch, choose_dtype(dtype, config.dtype, place.type))
    with torch.inference_mode():
        weights = Weights(directory, dtype=number_format, device=place)
        try:
            # The autoencoder has the largest single tensors: unpacked while memory is still empty.
            decoder = AudioDecoder(config.audio_vae_config, weights.take_audio)
            encoder = AudioEncoder(config.audio_vae_config, weights.take_audio)
            loaded = LoadedModel(
                Network(
                    config,
                    weights,
                    dtype=number_format,
                    device=place,
                    quantize=quantize,
                    batch_invariant=batch_invariant,
                ),
                decoder,
                encoder,
                mask_multichar_chinese_tokens(LlamaTokenizerFast.from_pretrained(str(directory))),
                weights.taken_bytes,
                _fingerprint(directory),
            )
            weights.finish()
            _warm_up(loaded)
        except RuntimeError as error:  # torch's, about shapes that do not fit
            raise BackendLoadError(
                "its weights have other shapes than its config.json says"
            ) from error
    return loaded


def _choose_device(wanted: str) -> str:
    if wanted != "auto":
        return wanted
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _warm_up(loaded: LoadedModel) -> None:
    """So that the first request does not pay for what torch prepares on first use."""
    network = loaded.network
    nothing = torch.zeros(0, network.patch_size, network.features)
    reading = network.read([(network.embed_text([1, 2, 3]), False)], nothing)
    for _ in reading.chunks():
        pass
    generator = torch.Generator(network.device).manual_seed(0)
    audio = loaded.decoder.start()
    for _ in range(2):
        noise = network.noise(generator)[None]
        patches = network.make_patches([reading.state], noise, [2.0], [10])
        network.say_stop([reading.state])
        network.advance([reading.state], patches)
        loaded.decoder.decode(patches.float(), [audio])
    samples = torch.zeros(network.patch_size * loaded.encoder.samples_per_frame)
    for frames in loaded.encoder.encode(samples.to(network.device)):
        network.embed_patches(frames.view(-1, network.patch_size, network.features))


def _fingerprint(directory: Path) -> str:
    """Changes whenever a file of the checkpoint does."""
    files = []
    for alternatives in REQUIRED_FILES:
        for path in (directory / name for name in alternatives):
            if path.exists():
                state = path.stat()
                files.append([path.resolve().name, state.st_size, state.st_mtime_ns])
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()
