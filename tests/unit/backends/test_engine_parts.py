"""The engine's parts one by one: products, caches, tables, the voices on disk, loading."""

import json
import mmap
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from app.backends.base import BackendLoadError
from app.backends.tts.voxcpm.engine.linear import linear
from app.backends.tts.voxcpm.engine.loading import load_model
from app.backends.tts.voxcpm.engine.transformer import KVCache, Shape, rotary_table
from app.backends.tts.voxcpm.engine.voices import VoiceCache, voice_key
from app.backends.tts.voxcpm.engine.weights import Weights
from tests.checkpoints import ARCHITECTURES, Architecture
from tests.library import library
from tests.unit.backends.engine import clip, farthest, parts, single_thread

each_architecture = pytest.mark.parametrize("name", ARCHITECTURES)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    with single_thread():
        yield


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def drawn(*size: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=generator).to(dtype)


# --- Products ---

# Inputs and outputs: of query, key and value; of a way down; of a patch; of the stop head.
SIZES = [(1_024, 1_280), (4_096, 1_024), (64, 1_024), (1_024, 2)]
ROWS = [1, 2, 8, 31, 32, 33, 80, 160]


@pytest.mark.parametrize(("inputs", "outputs"), SIZES)
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_gives_the_same_whatever_is_beside_it(
    inputs: int, outputs: int, with_residual: bool, dtype: torch.dtype
) -> None:
    weight = drawn(outputs, inputs, seed=1) / inputs**0.5
    layer = linear(weight.to(dtype), drawn(outputs, seed=2).to(dtype))
    x, residual = drawn(160, inputs, dtype=dtype), drawn(160, outputs, seed=3, dtype=dtype)

    def product(rows: slice) -> Tensor:
        return layer(x[rows], residual=residual[rows] if with_residual else None)

    most = product(slice(None))

    for count in ROWS:
        assert torch.equal(product(slice(count)), most[:count]), count
        assert torch.equal(product(slice(160 - count, 160)), most[160 - count :]), count


@pytest.mark.parametrize(("inputs", "outputs"), SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_prepared_product_is_the_plain_one(inputs: int, outputs: int, dtype: torch.dtype) -> None:
    weight, bias = drawn(outputs, inputs, seed=1) / inputs**0.5, drawn(outputs, seed=2)
    weight, bias = weight.to(dtype), bias.to(dtype)
    x, residual = drawn(3, 15, inputs, dtype=dtype), drawn(3, 15, outputs, seed=3, dtype=dtype)
    exact = functional.linear(x.double(), weight.double(), bias.double())
    # A rounding or two to the eight bits of numbers as large as 8.
    allowed = 1e-5 if dtype == torch.float32 else 2**-4

    for alone in (False, True):
        layer = linear(weight, bias)
        made, added = layer(x, alone=alone), layer(x, residual=residual, alone=alone)
        assert made.dtype == added.dtype == dtype
        assert farthest(made, exact) < allowed
        assert farthest(added, exact + residual.double()) < allowed
        without_bias = linear(weight)(x, alone=alone)
        assert farthest(without_bias, exact - bias.double()) < allowed


def test_a_prepared_product_holds_copies() -> None:
    weight, bias, x = drawn(8, 16), drawn(8), drawn(4, 16)
    for quantize in (False, True):
        layer = linear(weight, bias, quantize=quantize)
        before = layer(x)
        after = weight.clone(), bias.clone()
        weight.zero_(), bias.zero_()
        assert torch.equal(layer(x), before)
        weight.copy_(after[0]), bias.copy_(after[1])


@pytest.mark.parametrize(("inputs", "outputs"), SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 5, 32, 64])
def test_an_int8_product_is_nearly_the_plain_one(
    inputs: int, outputs: int, dtype: torch.dtype, rows: int
) -> None:
    weight = (drawn(outputs, inputs, seed=1) / inputs**0.5).to(dtype)
    bias, x = drawn(outputs, seed=2).to(dtype), drawn(rows, inputs, dtype=dtype)
    residual = drawn(rows, outputs, seed=3, dtype=dtype)
    exact = functional.linear(x.double(), weight.double(), bias.double()) + residual.double()

    made = linear(weight, bias, quantize=True)(x, residual=residual).double()

    assert (made - exact).norm() / exact.norm() < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_int8_row_gives_the_same_whatever_is_beside_it(dtype: torch.dtype) -> None:
    layer = linear((drawn(1_280, 1_024) / 32).to(dtype), quantize=True)
    x = drawn(32, 1_024, seed=1, dtype=dtype)
    most = layer(x)
    for count in (1, 2, 3, 4, 5, 8, 16, 31):
        assert torch.equal(layer(x[:count]), most[:count]), count


def test_an_int8_output_without_weights_is_its_bias() -> None:
    weight = drawn(4, 16)
    weight[2] = 0
    made = linear(weight, torch.tensor([0.0, 0.0, 5.0, 0.0]), quantize=True)(drawn(3, 16))
    assert torch.equal(made[:, 2], torch.full((3,), 5.0))


# --- Keys and values ---

SHAPE = Shape(hidden=16, heads=4, groups=2, head_size=4, layers=2, epsilon=1e-5, residual_scale=1.0)


def test_a_cache_grows_and_keeps_what_it_holds() -> None:
    cache = KVCache(SHAPE, dtype=torch.float32, device=torch.device("cpu"))
    pairs = drawn(2, 1_000, 2, 2, 4)  # layer, position, key or value, group, head size
    for count in (1, 254, 1, 1, 43, 700):
        cache.reserve(count)
        at = slice(cache.length, cache.length + count)
        for layer in range(2):
            keys, values = cache.write(layer, pairs[layer, at])
            for made, kind in ((keys, 0), (values, 1)):
                expected = pairs[layer, : at.stop, kind].transpose(0, 1)[None]
                assert torch.equal(made, expected)
        cache.length += count
    assert cache.length == 1_000


def test_a_cache_that_is_cut_back_forgets_only_what_came_after() -> None:
    cache = KVCache(SHAPE, dtype=torch.float32, device=torch.device("cpu"))
    first, second, other = (drawn(count, 2, 2, 4, seed=count) for count in (10, 300, 4))
    for pairs in (first, second):
        cache.reserve(len(pairs))
        cache.write(0, pairs)
        cache.length += len(pairs)

    cache.length = 10
    cache.reserve(4)
    keys, values = cache.write(0, other)

    expected = torch.cat([first, other])
    assert torch.equal(keys[0], expected[:, 0].transpose(0, 1))
    assert torch.equal(values[0], expected[:, 1].transpose(0, 1))


@each_architecture
def test_a_sequence_can_start_again_behind_its_prompt(
    checkpoints: dict[str, Path], name: Architecture
) -> None:
    network = parts(checkpoints[name]).network
    nothing = torch.zeros(0, network.patch_size, network.features)
    reading = network.read([(network.embed_text(list(range(5, 100))), False)], nothing)
    for _ in reading.chunks():
        pass
    state = reading.state

    def speak() -> Tensor:
        generator, made = torch.Generator().manual_seed(4), []
        for _ in range(3):
            noise = network.noise(generator)[None]
            made.append(network.make_patches([state], noise, [2.0], [4]))
            network.advance([state], made[-1])
        return torch.cat(made)

    start = state.mark()
    first = speak()
    state.rewind(start)
    assert torch.equal(speak(), first)
    assert not torch.equal(speak(), first)  # three patches later


# --- Tables ---


@each_architecture
@pytest.mark.parametrize("stretch", [1, 2])
def test_rotations_are_those_of_the_library(
    checkpoints: dict[str, Path], name: Architecture, stretch: int
) -> None:
    from voxcpm.modules.minicpm4.model import MiniCPMLongRoPE

    config = library(checkpoints[name]).tts_model.config.lm_config.model_copy(deep=True)
    original = config.rope_scaling.original_max_position_embeddings
    config.max_position_embeddings = original * stretch
    rope = MiniCPMLongRoPE(config)

    table = rotary_table(config, length=1_024, device=torch.device("cpu"))

    cosines, sines = rope(torch.arange(1_024))
    half = table.shape[1]
    assert cosines.shape[1] == 2 * half
    assert farthest(table.real, cosines[:, :half]) < 1e-6
    assert farthest(table.imag, sines[:, :half]) < 1e-6


@each_architecture
@pytest.mark.parametrize(
    ("steps", "moving"), [(2, 1), (7, 6), (10, 9), (48, 47), (49, 47), (60, 58), (100, 96)]
)
def test_the_first_steps_of_the_flow_do_not_move(
    checkpoints: dict[str, Path], name: Architecture, steps: int, moving: int
) -> None:
    """CFG-Zero* holds the first 4 % still; the patch is that of the library all the same."""
    network = parts(checkpoints[name]).network
    model = library(checkpoints[name]).tts_model
    estimates = []
    hook = model.feat_decoder.estimator.register_forward_hook(lambda *_: estimates.append(1))
    width = network._flow._hidden * (2 if name == "voxcpm2" else 1)
    mu, condition = drawn(1, width), drawn(1, network.patch_size, network.features, seed=1)

    try:
        torch.manual_seed(9)
        expected = model.feat_decoder(
            mu=mu,
            patch_size=network.patch_size,
            cond=condition.transpose(1, 2).contiguous(),
            n_timesteps=steps,
            cfg_value=2.0,
        )
    finally:
        hook.remove()
    noise = network.noise(torch.Generator().manual_seed(9))[None]
    made = network._flow.solve(mu, condition, noise, torch.full((1, 1, 1), 2.0), steps)

    assert len(network._flow._table(steps)) == len(estimates) == moving
    assert farthest(made, expected.transpose(1, 2)) < 1e-4


# --- Voices ---


def kilobyte(number: int) -> Tensor:
    return torch.full((256,), float(number))


def files_of(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def test_the_least_recently_used_voice_goes_first() -> None:
    voices = VoiceCache(3 * 1_024)
    for number in range(3):
        voices.put(str(number), kilobyte(number))
    assert voices.get("0") is not None  # used again
    voices.put("3", kilobyte(3))

    assert voices.get("1") is None
    for number in (0, 2, 3):
        kept = voices.get(str(number))
        assert kept is not None
        assert torch.equal(kept, kilobyte(number))
    assert voices.bytes_in_memory == 3 * 1_024


def test_a_voice_put_twice_counts_once() -> None:
    voices = VoiceCache(3 * 1_024)
    for _ in range(5):
        voices.put("same", kilobyte(1))
    assert voices.bytes_in_memory == 1_024
    voices.put("same", torch.zeros(512))
    assert voices.bytes_in_memory == 2_048


def test_a_voice_too_large_to_keep_pushes_nobody_out() -> None:
    voices = VoiceCache(2 * 1_024)
    voices.put("small", kilobyte(1))
    voices.put("large", torch.zeros(1_000))
    assert voices.get("large") is None
    assert voices.get("small") is not None
    assert voices.bytes_in_memory == 1_024


def test_what_is_kept_does_not_change_with_its_source() -> None:
    voices = VoiceCache(1 << 20)
    source = kilobyte(1)
    voices.put("one", source)
    source.zero_()
    kept = voices.get("one")
    assert kept is not None
    assert torch.equal(kept, kilobyte(1))


@pytest.mark.parametrize("in_memory", [1 << 20, 0])
def test_voices_on_disk_are_found_by_the_next_process(tmp_path: Path, in_memory: int) -> None:
    directory = tmp_path / "not" / "there yet"
    first = VoiceCache(in_memory, directory, 1 << 20)
    first.put("latents", drawn(4, 2, 64))
    first.put("positions", drawn(4, 64), on_disk=False)

    second = VoiceCache(in_memory, directory, 1 << 20)

    found = second.get("latents")
    assert found is not None
    assert torch.equal(found, drawn(4, 2, 64))
    assert second.get("positions") is None
    assert len(files_of(directory)) == 1
    assert second.bytes_in_memory == (found.nbytes if in_memory else 0)


def test_the_disk_keeps_what_was_used_last(tmp_path: Path) -> None:
    VoiceCache(0, tmp_path, 1 << 20).put("size", kilobyte(0))
    (file,) = files_of(tmp_path)
    size = file.stat().st_size
    file.unlink()
    voices = VoiceCache(0, tmp_path, 3 * size)
    for number in range(3):
        voices.put(str(number), kilobyte(number))
    for age, file in enumerate(files_of(tmp_path)):
        os.utime(file, (1_000 + age, 1_000 + age))  # an hour ago, one after the other
    assert voices.get("0") is not None  # used again, so the newest now

    voices.put("3", kilobyte(3))

    assert len(files_of(tmp_path)) == 3
    assert sum(file.stat().st_size for file in files_of(tmp_path)) <= 3 * size
    assert voices.get("1") is None
    for number in (0, 2, 3):
        assert voices.get(str(number)) is not None, number


@pytest.mark.parametrize("damage", [b"", b"x", b"\xff" * 100, None])
def test_a_damaged_file_is_no_voice(tmp_path: Path, damage: bytes | None) -> None:
    VoiceCache(0, tmp_path, 1 << 20).put("one", kilobyte(1))
    (file,) = files_of(tmp_path)
    file.write_bytes(file.read_bytes()[:-7] if damage is None else damage)

    voices = VoiceCache(1 << 20, tmp_path, 1 << 20)

    assert voices.get("one") is None
    voices.put("one", kilobyte(2))
    again = VoiceCache(0, tmp_path, 1 << 20).get("one")
    assert again is not None
    assert torch.equal(again, kilobyte(2))


def test_a_file_in_the_place_of_the_directory_is_only_a_pity(tmp_path: Path) -> None:
    in_its_place = tmp_path / "voices"
    in_its_place.write_text("not a directory")
    voices = VoiceCache(1 << 20, in_its_place, 1 << 20)

    voices.put("one", kilobyte(1))

    assert voices.get("one") is not None
    assert voices.get("another") is None


def test_a_voice_goes_by_its_sound_its_rate_its_role_and_the_model() -> None:
    key = voice_key(clip(0.1), model="a", role="prompt")
    assert key == voice_key(clip(0.1), model="a", role="prompt")
    others = [
        voice_key(clip(0.1, pitch=0.9), model="a", role="prompt"),
        voice_key(clip(0.1), model="b", role="prompt"),
        voice_key(clip(0.1), model="a", role="reference"),
    ]
    assert len({key, *others}) == 4


# --- Loading ---


@pytest.fixture
def copied(tmp_path: Path, checkpoints: dict[str, Path]) -> Callable[[str], Path]:
    """A copy of a checkpoint that may be damaged."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(checkpoints[name], tmp_path / name))

    return copy


def change(directory: Path, changed: Callable[[dict[str, Tensor]], object]) -> None:
    """Rewrite a checkpoint's weights; names of the audio codec start with `audio_vae.`."""
    safe = directory / "model.safetensors"
    plain = directory / "pytorch_model.bin"
    model = load_file(safe) if safe.exists() else torch.load(plain, weights_only=True)
    vae = torch.load(directory / "audiovae.pth", weights_only=True)["state_dict"]
    tensors = model | {f"audio_vae.{name}": tensor for name, tensor in vae.items()}
    changed(tensors)
    parted: tuple[dict[str, Tensor], dict[str, Tensor]] = {}, {}
    for name, tensor in tensors.items():
        audio = name.startswith("audio_vae.")
        parted[audio][name.removeprefix("audio_vae.")] = tensor.contiguous()
    if safe.exists():
        save_file(parted[False], safe, metadata={"format": "pt"})
    else:
        torch.save(parted[False], plain)
    torch.save({"state_dict": parted[True]}, directory / "audiovae.pth")


def refusal(directory: Path, *, quantize: bool = False) -> str:
    with pytest.raises(BackendLoadError) as refused:
        load_model(directory, device="cpu", dtype="float32", quantize=quantize)
    assert str(directory) not in refused.value.reason
    return refused.value.reason


MISSING = [
    "base_lm.layers.1.self_attn.k_proj.weight",
    "residual_lm.norm.weight",
    "feat_decoder.estimator.delta_time_mlp.linear_2.bias",
    "stop_head.weight",
    "audio_vae.decoder.model.0.bias",
    "audio_vae.encoder.fc_logvar.weight_g",
]


@each_architecture
@pytest.mark.parametrize("tensor", MISSING)
def test_a_checkpoint_without_one_of_its_tensors_is_refused(
    copied: Callable[[str], Path], name: Architecture, tensor: str
) -> None:
    directory = copied(name)
    change(directory, lambda tensors: tensors.pop(tensor))
    assert "not complete" in refusal(directory)


@each_architecture
@pytest.mark.parametrize("tensor", ["base_lm.layers.3.mlp.up_proj.weight", "audio_vae.extra"])
def test_a_checkpoint_with_a_tensor_too_many_is_refused(
    copied: Callable[[str], Path], name: Architecture, tensor: str
) -> None:
    directory = copied(name)
    change(directory, lambda tensors: tensors.update({tensor: torch.zeros(8, 8)}))
    assert "1 are not used" in refusal(directory)


@each_architecture
@pytest.mark.parametrize("file", ["model", "audio"])
@pytest.mark.parametrize("kept", [0, 100, -1])
def test_a_checkpoint_with_a_damaged_file_is_refused(
    copied: Callable[[str], Path], name: Architecture, file: str, kept: int
) -> None:
    directory = copied(name)
    model = "pytorch_model.bin" if name == "voxcpm-0.5b" else "model.safetensors"
    path = directory / (model if file == "model" else "audiovae.pth")
    content = path.read_bytes()
    path.write_bytes(content[: kept if kept >= 0 else len(content) // 2])
    assert "damaged" in refusal(directory)


def narrower(tensor: Tensor) -> Tensor:
    return tensor[..., :-1]


def shorter(tensor: Tensor) -> Tensor:
    return tensor[:-1]


WRONG = [
    ("base_lm.embed_tokens.weight", narrower),
    ("base_lm.layers.0.self_attn.q_proj.weight", shorter),
    ("base_lm.layers.0.self_attn.o_proj.weight", shorter),
    ("base_lm.layers.2.mlp.down_proj.weight", narrower),
    ("base_lm.norm.weight", shorter),
    ("residual_lm.layers.0.input_layernorm.weight", shorter),
    ("fsq_layer.in_proj.bias", shorter),
    ("lm_to_dit_proj.weight", shorter),
    ("feat_decoder.estimator.out_proj.weight", shorter),
    ("feat_encoder.special_token", narrower),
    ("stop_proj.bias", shorter),
    ("audio_vae.decoder.model.0.weight_v", shorter),
    ("audio_vae.decoder.model.1.bias", shorter),
    ("audio_vae.encoder.block.0.weight_v", shorter),
    ("audio_vae.encoder.fc_mu.bias", shorter),
]


@each_architecture
@pytest.mark.parametrize(("tensor", "damage"), WRONG, ids=lambda one: getattr(one, "__name__", one))
def test_a_checkpoint_with_a_tensor_of_another_shape_is_refused(
    copied: Callable[[str], Path],
    name: Architecture,
    tensor: str,
    damage: Callable[[Tensor], Tensor],
) -> None:
    directory = copied(name)

    def damaged(tensors: dict[str, Tensor]) -> None:
        tensors[tensor] = damage(tensors[tensor]).clone()

    change(directory, damaged)
    assert refusal(directory)


@each_architecture
def test_a_checkpoint_of_other_sizes_than_its_configuration_is_refused(
    copied: Callable[[str], Path], name: Architecture
) -> None:
    directory = copied(name)
    config: dict[str, Any] = json.loads((directory / "config.json").read_text())
    config["lm_config"]["num_hidden_layers"] += 1
    (directory / "config.json").write_text(json.dumps(config))
    assert "not complete" in refusal(directory)
    config["lm_config"]["num_hidden_layers"] -= 2
    (directory / "config.json").write_text(json.dumps(config))
    assert "not used" in refusal(directory)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="Linux tells what is in memory")
def test_little_of_the_file_is_in_memory_while_it_is_read_and_none_after(tmp_path: Path) -> None:
    count, megabytes = 9, 16
    tensors = {str(number): torch.full((megabytes << 8, 1_024), number) for number in range(count)}
    file = tmp_path / "model.safetensors"
    save_file({name: tensor.float() for name, tensor in tensors.items()}, file)
    save_file({"audio": torch.ones(2, 2)}, tmp_path / "audiovae.safetensors")
    del tensors
    weights = Weights(tmp_path, dtype=torch.float32, device=torch.device("cpu"))

    most = 0
    for number in range(count):
        taken = weights.take(str(number))
        assert taken.min() == taken.max() == number  # reads every page
        most = max(most, resident_bytes(file))
    assert torch.equal(weights.take_audio("audio"), torch.ones(2, 2))
    weights.finish()

    # Read it was, or this would show nothing.
    assert megabytes << 20 <= most <= (64 + 2 * megabytes) << 20
    # Only the pages that two tensors share may stay.
    assert resident_bytes(file) <= (count + 2) * mmap.PAGESIZE
    assert weights.taken_bytes == (count * megabytes << 20) + 16
    with pytest.raises(BackendLoadError):
        weights.take("0")


def resident_bytes(file: Path) -> int:
    """How much of a mapped file this process holds in memory."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = line.endswith(str(file))
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1_024
    return total
