"""From a request to a prompt that has been read: tokens, encoded voices, lengths.

The order of a prompt: a reference voice between its two marks (second generation only), the text
behind the prompt's transcript, the mark where audio starts, and the prompt's audio.
"""

from collections.abc import Generator, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from app.audio.resample import resample
from app.backends.tts.voxcpm import inputs
from app.backends.tts.voxcpm.engine.loading import LoadedModel
from app.backends.tts.voxcpm.engine.scheduler import Plan, Prepared
from app.backends.tts.voxcpm.engine.voices import VoiceCache, voice_key
from app.backends.tts.voxcpm.layout import Layout
from app.domain.audio import Clip
from app.domain.speech import SpeechRequest

_AUDIO_START, _REFERENCE_START, _REFERENCE_END = 101, 103, 104
# Patches of a prompt that the library lets its audio decoder hear before the first new one.
_CONTEXT_PATCHES = {"voxcpm": 2, "voxcpm2": 3}


@dataclass(frozen=True, slots=True)
class _Voice:
    """A recording as the model hears it.

    `latents` are (patches, patch size, features), `positions` what the language models read of
    them, (patches, hidden).
    """

    latents: Tensor
    positions: Tensor


class PromptReader:
    """Prepares utterances, in the engine's thread."""

    def __init__(self, model: LoadedModel, layout: Layout, voices: VoiceCache) -> None:
        self._network = model.network
        self._encoder = model.encoder
        self._tokenizer = model.tokenizer
        self._fingerprint = model.fingerprint
        self._layout = layout
        self._voices = voices

    def prepare(
        self, request: SpeechRequest, text: str, *, streamed: bool
    ) -> Generator[None, None, Prepared]:
        """Read `text`, which is ready to be spoken, and the voices of `request`.

        Gives way between pieces of work. Raises TextTooLongError.
        """
        text = inputs.without_control_tokens(text, self._tokenizer)
        spoken = len(self._tokenizer(text))
        tokens = [*self._tokenizer(self._transcript(request, text) + text), _AUDIO_START]
        reference = yield from self._voice(request.reference, pad_left=False)
        prompt = yield from self._voice(request.prompt, pad_left=True)
        parts = self._parts(tokens, reference, prompt)
        size = sum(len(positions) for positions, _ in parts)
        lengths = inputs.lengths(request, self._layout, tokens=spoken, prefill=size)
        reading = self._network.read(parts, prompt.latents[-1:])
        yield from reading.chunks()
        plan = _plan(request, lengths, tokens=spoken, streamed=streamed)
        context = prompt.latents[-_CONTEXT_PATCHES[self._layout.architecture] :]
        return Prepared(plan, reading.state, context.to(self._network.device))

    def _parts(
        self, tokens: list[int], reference: "_Voice", prompt: "_Voice"
    ) -> list[tuple[Tensor, bool]]:
        text, audio = self._network.embed_text, True
        parts = [(text(tokens), not audio), (prompt.positions, audio)]
        if len(reference.positions):
            parts = [
                (text([_REFERENCE_START]), not audio),
                (reference.positions, audio),
                (text([_REFERENCE_END]), not audio),
                *parts,
            ]
        return parts

    def _transcript(self, request: SpeechRequest, text: str) -> str:
        if request.prompt is None:
            return ""
        transcript = inputs.joined_transcript(request.prompt_text or "", text)
        return inputs.without_control_tokens(transcript, self._tokenizer)

    def _voice(self, clip: Clip | None, *, pad_left: bool) -> Generator[None, None, _Voice]:
        """Encode a recording, unless that has been done before; without one, no positions."""
        if clip is None:
            nothing = torch.zeros(0, self._network.patch_size, self._network.features)
            return _Voice(nothing, self._network.embed_text([]))
        role = "prompt" if pad_left else "reference"
        key = voice_key(clip, model=self._fingerprint, role=role)
        latents = self._voices.get(key)
        shape = (self._network.patch_size, self._network.features)
        if latents is None or latents.shape[1:] != shape:  # the disk may hold anything
            encoded = []
            for frames in self._encoded(clip, pad_left=pad_left):
                encoded.append(frames.cpu())
                yield
            latents = torch.cat(encoded).view(-1, *shape)
            self._voices.put(key, latents)
        # Positions hold what this process's number format made of them: not for the disk.
        positions = self._voices.get(key + "-positions")
        if positions is None:
            positions = self._network.embed_patches(latents)
            self._voices.put(key + "-positions", positions, on_disk=False)
            yield
        return _Voice(latents, positions)

    def _encoded(self, clip: Clip, *, pad_left: bool) -> Iterator[Tensor]:
        """Latents (frames, features) of a recording, padded to whole patches."""
        samples = resample(clip.samples, clip.sample_rate_hz, self._layout.prompt_sample_rate_hz)
        audio = torch.from_numpy(samples)
        lacking = -len(audio) % (self._network.patch_size * self._encoder.samples_per_frame)
        padding = (lacking, 0) if pad_left else (0, lacking)
        audio = torch.nn.functional.pad(audio, padding).to(self._network.device)
        return self._encoder.encode(audio)


def _plan(request: SpeechRequest, lengths: inputs.Lengths, *, tokens: int, streamed: bool) -> Plan:
    attempts = request.retry_badcase_max_times or inputs.RETRY_ATTEMPTS
    return Plan(
        seed=request.seed or 0,
        steps=request.inference_timesteps or inputs.INFERENCE_TIMESTEPS,
        guidance=request.cfg_value or inputs.CFG_VALUE,
        min_patches=lengths.min_len,
        # As the library bounds it: far beyond what the text can need.
        max_patches=min(int(tokens * lengths.ratio + 10), lengths.max_len),
        attempts=1 if streamed or request.retry_badcase is False else attempts,
        bad_case_patches=tokens * lengths.ratio,
        # Where the caller has set a length, reaching that is no accident.
        room_patches=lengths.room if request.max_seconds is not None else lengths.max_len,
    )
