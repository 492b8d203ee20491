"""The engine's loop: which utterances are read, spoken, turned into sound and let go, and when.

All utterances that are being spoken make one patch together in each step. Between two steps new
ones are read in, a piece of work at a time, and those whose caller has gone are dropped. Nothing
here depends on chance or on time but the order of work: what an utterance sounds like does not.
"""

import logging
import queue
from collections import deque
from collections.abc import Generator
from contextlib import suppress
from dataclasses import dataclass, field
from math import ceil
from time import perf_counter
from typing import Protocol

import torch
from torch import Tensor

from app.backends.tts.voxcpm.engine.codec import AudioDecoder, DecoderState
from app.backends.tts.voxcpm.engine.contention import ThreadGovernor
from app.backends.tts.voxcpm.engine.network import Mark, Network, SequenceState
from app.domain.audio import Samples

logger = logging.getLogger(__name__)

# Patches in each chunk of a stream, the last figure for all that follow. A lone patch costs more
# to decode than its share of several, so the chunks grow once the listener has something to hear.
_STREAM_CHUNKS = (1, 1, 2, 4)
# Samples that are decoded at once where nobody is listening yet. More would save no time, and the
# decoder's intermediate results, some hundred times as large, would fragment memory.
_WHOLE_CHUNK_SAMPLES = 16_384
# Reading prompts may take as long as the speaking of the others did in the step before.
_READING_SHARE = 1.0


class Listener(Protocol):
    """Told of an utterance from the engine's thread; every call returns at once."""

    def heard(self, samples: Samples) -> None:
        """More sound: float32 of shape (n,)."""
        ...

    def finished(self, *, bad_case: bool, cut_off: bool) -> None:
        """All of the sound has been heard; the last call.

        `bad_case`: it is far too long for its text. `cut_off`: it ended for want of room.
        """
        ...

    def failed(self, error: Exception) -> None:
        """There will be no more sound; the last call."""
        ...


@dataclass(frozen=True, slots=True)
class Plan:
    """What an utterance is to be. Lengths are in patches.

    It may stop by itself once it has `min_patches` + 2 of them, and ends at `max_patches`. An
    attempt that reaches `bad_case_patches` is thrown away, unless it is the last of `attempts`.
    One that reaches `room_patches` has been cut off.
    """

    seed: int
    steps: int
    guidance: float
    min_patches: int
    max_patches: int
    attempts: int
    bad_case_patches: float
    room_patches: int


@dataclass(frozen=True, slots=True)
class Prepared:
    """An utterance that has been read and can speak.

    `context` are the last patches of a prompt that it continues, (n, patch size, features), which
    the audio decoder has to hear first.
    """

    plan: Plan
    state: SequenceState
    context: Tensor


@dataclass(slots=True, eq=False)
class Utterance:
    """One thing to be said, in one voice.

    `preparation` reads the prompt in the engine's thread, and gives way between pieces of work. A
    streamed utterance is heard while it is made and has one attempt; any other is heard at its
    end.
    """

    preparation: Generator[None, None, Prepared]
    listener: Listener
    streamed: bool
    cancelled: bool = False


@dataclass(slots=True, eq=False)
class _Speaker:
    """An utterance that is being spoken."""

    utterance: Utterance
    plan: Plan
    state: SequenceState
    start: Mark
    context: Tensor
    generator: torch.Generator
    audio: DecoderState
    attempt: int = 1
    made: int = 0
    chunks: int = 0
    finished: bool = False
    undecoded: list[Tensor] = field(default_factory=list)
    unheard: list[Samples] = field(default_factory=list)

    def is_awaited(self) -> bool:
        """Whether somebody waits for what has been made and not yet decoded."""
        if not self.utterance.streamed:
            return self.finished
        enough = _STREAM_CHUNKS[min(self.chunks, len(_STREAM_CHUNKS) - 1)]
        return self.finished or len(self.undecoded) >= enough


class Scheduler:
    """Runs a network and an audio decoder for many utterances at once, on the thread of `run`."""

    def __init__(self, network: Network, decoder: AudioDecoder, *, batch_size: int) -> None:
        self._network = network
        self._decoder = decoder
        self._batch_size = batch_size
        patch_samples = network.patch_size * decoder.samples_per_frame
        self._whole_chunk = max(1, _WHOLE_CHUNK_SAMPLES // patch_samples)
        self._inbox: queue.SimpleQueue[Utterance | None] = queue.SimpleQueue()
        self._waiting: deque[Utterance] = deque()
        self._speaking: list[_Speaker] = []
        self._last_step_seconds = 0.0
        self._ended = False
        self.seconds = {"read": 0.0, "speak": 0.0, "decode": 0.0}
        self.steps = 0

    def submit(self, utterance: Utterance) -> None:
        """Queue an utterance; any thread may call this. To drop it, set its `cancelled`."""
        self._inbox.put(utterance)
        if self._ended:
            self._refuse_rest()

    def close(self) -> None:
        """Make `run` drop everything and return; any thread may call this."""
        self._inbox.put(None)

    def run(self) -> None:
        """Work until closed. Whoever is still being served then, or comes later, is refused."""
        try:
            governor = ThreadGovernor()
            with torch.inference_mode():
                while self._receive():
                    with governor.watch():
                        self._turn()
        finally:
            self._waiting.extend(one.utterance for one in self._speaking)
            self._speaking = []
            self._ended = True
            self._refuse_rest()

    def _refuse_rest(self) -> None:
        with suppress(queue.Empty):
            while True:
                utterance = self._inbox.get_nowait()
                if utterance is not None:
                    self._waiting.append(utterance)
        while self._waiting:
            self._waiting.popleft().listener.failed(RuntimeError("the engine has been closed"))

    def _receive(self) -> bool:
        """Take in what was submitted, waiting while there is nothing to do. False: closed."""
        idle = not self._waiting and not self._speaking
        try:
            while True:
                utterance = self._inbox.get(block=idle)
                if utterance is None:
                    return False
                self._waiting.append(utterance)
                idle = False
        except queue.Empty:
            return True

    def _turn(self) -> None:
        """Read prompts for a while, then take all speakers one step further."""
        self._waiting = deque(one for one in self._waiting if not one.cancelled)
        self._speaking = [one for one in self._speaking if not one.utterance.cancelled]
        self._read()
        if not self._speaking:
            return
        began = perf_counter()
        try:
            self._step()
        except Exception as error:
            # Whatever it was, the callers must hear of it and the engine must go on.
            logger.exception("a step of the engine failed")
            for one in self._speaking:
                one.utterance.listener.failed(error)
            self._speaking = []
        self._last_step_seconds = perf_counter() - began

    def _read(self) -> None:
        """Read prompts until one can speak or, beside others, until it is their turn again."""
        began = perf_counter()
        while self._waiting and len(self._speaking) < self._batch_size:
            utterance = self._waiting[0]
            if utterance.cancelled:
                self._waiting.popleft()
                continue
            try:
                prepared = _carried_on(utterance.preparation)
                if prepared is not None:
                    self._speaking.append(self._speaker(utterance, prepared))
                    self._waiting.popleft()
            except Exception as error:  # noqa: BLE001 - carried over to the caller
                self._waiting.popleft()
                utterance.listener.failed(error)
            spent = perf_counter() - began
            if self._speaking and spent >= _READING_SHARE * self._last_step_seconds:
                break
        self.seconds["read"] += perf_counter() - began

    def _speaker(self, utterance: Utterance, prepared: Prepared) -> _Speaker:
        generator = torch.Generator(self._network.device).manual_seed(prepared.plan.seed)
        return _Speaker(
            utterance,
            prepared.plan,
            prepared.state,
            prepared.state.mark(),
            prepared.context,
            generator,
            self._fresh_audio(prepared.context),
        )

    def _fresh_audio(self, context: Tensor) -> DecoderState:
        audio = self._decoder.start()
        if len(context):
            self._decoder.decode(context.flatten(0, 1).float()[None], [audio])
        return audio

    def _step(self) -> None:
        began = perf_counter()
        speakers, network = self._speaking, self._network
        states = [one.state for one in speakers]
        patches = network.make_patches(
            states,
            torch.stack([network.noise(one.generator) for one in speakers]),
            [one.plan.guidance for one in speakers],
            [one.plan.steps for one in speakers],
        )
        for one, patch, stop in zip(speakers, patches, network.say_stop(states), strict=True):
            one.undecoded.append(patch)
            one.made += 1
            enough = one.made > one.plan.min_patches + 1
            one.finished = (stop and enough) or one.made >= one.plan.max_patches
        again = [one for one in speakers if one.finished and self._is_to_be_repeated(one)]
        spoken = perf_counter()
        self._decode([one for one in self._due() if one not in again])
        decoded = perf_counter()
        going_on = [row for row, one in enumerate(speakers) if not one.finished]
        if going_on:
            network.advance([states[row] for row in going_on], patches[going_on])
        for one in again:
            self._repeat(one)
        self._speaking = [one for one in speakers if not one.finished]
        self.steps += 1
        self.seconds["decode"] += decoded - spoken
        self.seconds["speak"] += perf_counter() - decoded + spoken - began

    def _is_to_be_repeated(self, one: _Speaker) -> bool:
        return one.made >= one.plan.bad_case_patches and one.attempt < one.plan.attempts

    def _repeat(self, one: _Speaker) -> None:
        """Start again behind the prompt, with the noise that comes next."""
        one.state.rewind(one.start)
        one.audio = self._fresh_audio(one.context)
        one.attempt += 1
        one.made = one.chunks = 0
        one.finished = False
        one.undecoded.clear()
        one.unheard.clear()

    def _due(self) -> list[_Speaker]:
        """Whose patches to decode now.

        Those for which somebody waits, and of the rest as many as keep up with what is made: all
        of them at once would hold up the others.
        """
        awaited = [one for one in self._speaking if one.is_awaited()]
        rest = [one for one in self._speaking if not one.utterance.streamed and not one.finished]
        rest.sort(key=lambda one: len(one.undecoded), reverse=True)
        keeping_up = rest[: ceil(len(rest) / self._whole_chunk)]
        return awaited + [one for one in keeping_up if len(one.undecoded) >= self._whole_chunk]

    def _decode(self, due: list[_Speaker]) -> None:
        """Turn patches into sound: those with as many patches together, the fewest first."""
        for count in sorted({len(one.undecoded) for one in due}):
            alike = [one for one in due if len(one.undecoded) == count]
            size = max(1, self._whole_chunk // count)
            for start in range(0, len(alike), size):
                self._decode_alike(alike[start : start + size])

    def _decode_alike(self, together: list[_Speaker]) -> None:
        latents = torch.stack([torch.cat(one.undecoded) for one in together]).float()
        samples = self._decoder.decode(latents, [one.audio for one in together]).cpu().numpy()
        for one, sound in zip(together, samples, strict=True):
            one.undecoded.clear()
            one.chunks += 1
            one.unheard.append(sound)
            self._deliver(one)

    def _deliver(self, one: _Speaker) -> None:
        listener = one.utterance.listener
        if one.utterance.streamed or one.finished:
            for samples in one.unheard:
                listener.heard(samples)
            one.unheard.clear()
        if one.finished:
            listener.finished(
                bad_case=one.made >= one.plan.bad_case_patches,
                cut_off=one.made >= one.plan.room_patches,
            )


def _carried_on(preparation: Generator[None, None, Prepared]) -> Prepared | None:
    """Do one more piece of the work; the result once it is done."""
    try:
        next(preparation)
    except StopIteration as done:
        prepared: Prepared = done.value
        return prepared
    return None
