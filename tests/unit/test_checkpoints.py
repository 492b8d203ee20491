"""The random checkpoints that other tests run on: whole, audible, and each its own voice."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.checkpoints import (
    ARCHITECTURES,
    Architecture,
    build_checkpoint,
    checkpoint_config,
    tensor_shapes,
)
from tests.library import latents, library, library_speech
from tests.recordings import encode

TEXT = "Hello world, this is a test."
PATCHES = 8
FEW = 4  # patches, where a difference is all that matters
TOKENIZER_FILES = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
SAMPLE_RATE_HZ: dict[Architecture, int] = {
    "voxcpm-0.5b": 16_000,
    "voxcpm-1.5": 44_100,
    "voxcpm2": 48_000,
}
SAMPLES_PER_PATCH: dict[Architecture, int] = {
    "voxcpm-0.5b": 1_280,
    "voxcpm-1.5": 7_056,
    "voxcpm2": 7_680,
}

each_architecture = pytest.mark.parametrize("name", ARCHITECTURES)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Layers this small are slower on several threads, and far slower beside another process."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def speak(
    directory: Path, text: str = TEXT, *, seed: int = 0, max_len: int = PATCHES
) -> np.ndarray:
    return library_speech(
        directory, text, seed=seed, min_len=2, max_len=max_len, retry_badcase=False
    )


def speak_like(directory: Path, prompt: dict[str, Any]) -> np.ndarray:
    model = library(directory).tts_model
    torch.manual_seed(0)
    samples, _, _ = model.generate_with_prompt_cache(
        target_text=TEXT, prompt_cache=prompt, max_len=FEW
    )
    return samples.squeeze(0).numpy()


def level(samples: np.ndarray) -> float:
    """Root mean square, 1 being full scale."""
    return float(np.sqrt(np.mean(np.square(samples, dtype=np.float64))))


def difference(left: np.ndarray, right: np.ndarray) -> float:
    """How loud the difference is, relative to the first."""
    assert left.shape == right.shape
    return level(left - right) / level(left)


def hum(pitch_hz: float) -> bytes:
    """A WAV file of 1.5 seconds of a voice-like sound: eight harmonics that rise and fall."""
    moments = np.arange(24_000) / 16_000
    harmonics = sum(np.sin(2 * np.pi * pitch_hz * k * moments) / k for k in range(1, 9))
    samples = 0.2 * (0.6 + 0.4 * np.sin(2 * np.pi * 3 * moments)) * harmonics
    return encode(samples[:, np.newaxis], 16_000, "wav")


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    """What is on disk, under the names that the library's model gives it."""
    if (directory / "model.safetensors").exists():
        model = load_file(directory / "model.safetensors")
    else:
        model = torch.load(directory / "pytorch_model.bin", weights_only=True)
    vae = torch.load(directory / "audiovae.pth", weights_only=True)["state_dict"]
    return model | {f"audio_vae.{name}": tensor for name, tensor in vae.items()}


@each_architecture
def test_the_files_are_those_of_the_real_repository(
    checkpoints: dict[str, Path], name: Architecture
) -> None:
    weights = "pytorch_model.bin" if name == "voxcpm-0.5b" else "model.safetensors"

    files = {path.name for path in checkpoints[name].iterdir()}

    assert files == {"config.json", weights, "audiovae.pth"} | TOKENIZER_FILES


@each_architecture
def test_the_library_loads_every_tensor_and_misses_none(
    checkpoints: dict[str, Path], name: Architecture
) -> None:
    written = tensors_of(checkpoints[name])
    loaded = library(checkpoints[name]).tts_model.state_dict()

    assert written.keys() == loaded.keys()
    for key, tensor in written.items():
        assert loaded[key].dtype == tensor.dtype
        assert torch.equal(loaded[key], tensor), key


@each_architecture
def test_a_checkpoint_speaks_for_exactly_as_long_as_it_is_let(
    checkpoints: dict[str, Path], name: Architecture
) -> None:
    samples = speak(checkpoints[name])

    assert library(checkpoints[name]).tts_model.sample_rate == SAMPLE_RATE_HZ[name]
    assert samples.dtype == np.float32
    assert samples.shape == (PATCHES * SAMPLES_PER_PATCH[name],)
    assert np.isfinite(samples).all()
    assert np.abs(samples).max() <= 1
    assert 0.03 < level(samples) < 0.4


@each_architecture
def test_seeds_and_texts_differ_and_the_same_repeats_exactly(
    checkpoints: dict[str, Path], name: Architecture
) -> None:
    directory = checkpoints[name]
    samples = speak(directory, max_len=FEW)

    np.testing.assert_array_equal(speak(directory, max_len=FEW), samples)
    assert difference(samples, speak(directory, seed=1, max_len=FEW)) > 0.5
    other_text = speak(directory, "Hello world, this is a text.", max_len=FEW)
    assert difference(samples, other_text) > 0.1


@each_architecture
def test_a_checkpoint_that_stops_does_so_as_soon_as_the_library_looks(
    tmp_path: Path, checkpoints: dict[str, Path], name: Architecture
) -> None:
    directory = build_checkpoint(tmp_path, name, stops=True)

    samples = speak(directory)

    assert samples.shape == (4 * SAMPLES_PER_PATCH[name],)  # min_len + 2
    # The same voice otherwise: the stop head alone is another.
    np.testing.assert_array_equal(samples, speak(checkpoints[name], max_len=4))


@each_architecture
def test_prompts_are_heard_in_what_follows_them(
    checkpoints: dict[str, Path], name: Architecture
) -> None:
    directory = checkpoints[name]

    low, high = (
        speak_like(
            directory,
            {
                "prompt_text": "A prompt.",
                "audio_feat": latents(directory, hum(pitch_hz), pad_left=True),
                "mode": "continuation",
            },
        )
        for pitch_hz in (110, 240)
    )

    assert low.shape == (FEW * SAMPLES_PER_PATCH[name],)
    assert difference(low, high) > 0.2


def test_references_are_heard_in_what_is_said(checkpoints: dict[str, Path]) -> None:
    directory = checkpoints["voxcpm2"]

    low, high = (
        speak_like(
            directory,
            {
                "ref_audio_feat": latents(directory, hum(pitch_hz), pad_left=False),
                "mode": "reference",
            },
        )
        for pitch_hz in (110, 240)
    )

    assert difference(low, high) > 0.2
    assert difference(low, speak(directory, max_len=FEW)) > 0.2


def test_an_error_in_a_patch_does_not_grow(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lets two implementations be compared sample by sample over many patches."""
    directory = checkpoints["voxcpm2"]
    exact = speak(directory, max_len=20)
    decoder = library(directory).tts_model.feat_decoder
    forward = decoder.forward
    errors = torch.Generator().manual_seed(0)

    def inexact(**arguments: Any) -> torch.Tensor:
        patch = forward(**arguments)
        return patch + 1e-6 * torch.randn(patch.shape, generator=errors)

    monkeypatch.setattr(decoder, "forward", inexact)

    assert np.abs(speak(directory, max_len=20) - exact).max() < 1e-4


def test_a_seed_makes_the_same_tensors_and_leaves_the_callers_numbers_alone(
    tmp_path: Path, checkpoints: dict[str, Path]
) -> None:
    before = torch.get_rng_state()
    again = build_checkpoint(tmp_path / "again", "voxcpm2")
    other = build_checkpoint(tmp_path / "other", "voxcpm2", seed=1)
    assert torch.equal(torch.get_rng_state(), before)

    repeated = tensors_of(again)
    for key, tensor in tensors_of(checkpoints["voxcpm2"]).items():
        assert torch.equal(repeated[key], tensor), key
    theirs, ours = (speak(path, max_len=FEW) for path in (other, again))
    assert difference(theirs, ours) > 0.5


def test_the_language_model_is_written_in_the_dtype_asked_for(tmp_path: Path) -> None:
    directory = build_checkpoint(tmp_path, "voxcpm2", dtype="bfloat16")

    dtypes = {
        (key.startswith("audio_vae."), tensor.dtype)
        for key, tensor in tensors_of(directory).items()
        if tensor.is_floating_point()
    }

    assert dtypes == {(False, torch.bfloat16), (True, torch.float32)}
    assert 0.03 < level(speak(directory, max_len=FEW)) < 0.4


def test_the_room_for_text_and_speech_can_be_chosen(tmp_path: Path) -> None:
    directory = build_checkpoint(tmp_path, "voxcpm-0.5b", max_length=20)

    with pytest.raises(ValueError, match="KV cache is full"):
        speak(directory, "Hello", max_len=30)


@pytest.mark.parametrize(
    "text",
    [
        "Hello",
        "مرحبا بالعالم",
        "السَّلامُ عليكم",
        "今天天气很好",
        "日本語 ไทย",
        "🙂👩‍👩‍👧",
        "\0\t\n",
        pytest.param("a long text " * 100, id="a long text"),
    ],
)
def test_every_text_has_tokens_and_none_is_unknown(checkpoints: dict[str, Path], text: str) -> None:
    tokenizer = library(checkpoints["voxcpm-0.5b"]).tts_model.text_tokenizer

    tokens = tokenizer(text)

    assert len(text) / 8 <= len(tokens) <= 4 * len(text) + 1
    assert all(3 <= token < 600 for token in tokens)
    assert not {101, 102, 103, 104} & set(tokens)


def test_the_library_splits_chinese_tokens_of_several_characters(
    checkpoints: dict[str, Path],
) -> None:
    tokenizer = library(checkpoints["voxcpm2"]).tts_model.text_tokenizer

    assert tokenizer.tokenizer.tokenize("今天你好") == ["▁", "今天", "你好"]
    assert tokenizer.tokenize("今天你好") == ["▁", "今", "天", "你", "好"]
    assert tokenizer.tokenize("hello") == ["▁hello"]


def test_special_tokens_have_the_ids_that_the_library_was_written_with(
    checkpoints: dict[str, Path],
) -> None:
    tokenizer = library(checkpoints["voxcpm2"]).tts_model.text_tokenizer.tokenizer

    assert tokenizer.convert_tokens_to_ids(["<unk>", "<s>", "</s>"]) == [0, 1, 2]
    assert tokenizer.convert_ids_to_tokens([101, 102]) == ["<|audio_start|>", "<|audio_end|>"]


@pytest.mark.parametrize(
    ("name", "millions", "vae_millions"),
    [("voxcpm-0.5b", 652, 75), ("voxcpm-1.5", 802, 86), ("voxcpm2", 2_290, 94)],
)
def test_a_full_checkpoint_has_the_true_size(
    name: Architecture, millions: int, vae_millions: int
) -> None:
    model = vae = 0
    for tensor, shape in tensor_shapes(name, size="full").items():
        if tensor.startswith("audio_vae."):
            vae += math.prod(shape)
        else:
            model += math.prod(shape)

    assert round(model / 1e6) == millions
    assert round(vae / 1e6) == vae_millions


def test_only_a_tiny_half_billion_describes_its_audio_codec(checkpoints: dict[str, Path]) -> None:
    """The real one relies on the library's default, which is too large to be tiny."""
    tiny = json.loads((checkpoints["voxcpm-0.5b"] / "config.json").read_text())
    full = checkpoint_config("voxcpm-0.5b", size="full")

    assert tiny.keys() - full.keys() == {"audio_vae_config"}
    assert "architecture" not in tiny
    assert (tiny["dtype"], full["dtype"]) == ("float32", "bfloat16")
