"""Which class runs which backend name, by kind of model.

Classes are named as strings, so that a backend's module (and what it imports) is loaded only when
one of its models is used. A test resolves every string.
"""

from importlib import import_module

from app.backends.base import TTSBackend

TTS_BACKENDS: dict[str, str] = {
    "hibari": "app.backends.tts.hibari:HibariBackend",
    "voxcpm": "app.backends.tts.voxcpm.batched:BatchedBackend",
    "voxcpm-reference": "app.backends.tts.voxcpm.reference:ReferenceBackend",
}


def tts_backend(name: str) -> type[TTSBackend]:
    """The class that runs text-to-speech models of this backend name."""
    module, _, attribute = TTS_BACKENDS[name].partition(":")
    backend: type[TTSBackend] = getattr(import_module(module), attribute)
    return backend
