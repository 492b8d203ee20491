"""Random-weight VoxCPM checkpoints on disk, in the layout that the official library loads.

The names and shapes of the tensors are asked of the library itself, by building its modules; the
values are ours, and are scaled so that a network that was never trained still behaves like a
voice: bounded, audible, and different for every text, seed and prompt.
"""

import contextlib
import io
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, get_args

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

Architecture = Literal["voxcpm-0.5b", "voxcpm-1.5", "voxcpm2"]
Size = Literal["tiny", "full"]

ARCHITECTURES: tuple[Architecture, ...] = get_args(Architecture)

# Ids 101 to 104 are written into the library's source; ids 0 to 2 are those of every Llama.
_LLAMA_TOKENS = ("<unk>", "<s>", "</s>")
_AUDIO_TOKENS = (
    "<|audio_start|>",
    "<|audio_end|>",
    "<|audio_prompt_start|>",
    "<|audio_prompt_end|>",
)
_FIRST_AUDIO_TOKEN_ID = 101
_SPACE = "\u2581"  # what SentencePiece writes for a space
_ASCII = "".join(chr(code) for code in range(0x21, 0x7F))
_ARABIC = "".join(chr(code) for code in [*range(0x621, 0x63B), *range(0x641, 0x653)])
_LATIN = "àâçèéêëîïôùûüñöäß"
_CHINESE = "你好世界今天气很我们是中国人的一不了在有大这来上个到说"
_PUNCTUATION = "，。、！？؟،؛«»"
# Tokens of several characters. The library splits those that are all Chinese back into
# characters, with or without the mark of a space in front; the rest must stay whole.
_WORDS = (
    *("你好", "世界", "今天", "天气", "我们", "中国", "中国人", _SPACE + "你好"),
    *(_SPACE + word for word in ("the", "and", "is", "you", "hello", "world", "speech", "voice")),
    *("ing", "er", "tion", "th", "on", "en", "es", "or", "at"),
    *("ال", "ية", "ات", _SPACE + "ال", _SPACE + "مرحبا", "لام"),
)

# Random numbers are drawn once and reused by tensors that lie at different offsets: drawing the
# two billion of VoxCPM2 would take most of a minute. A prime never lines up with rows or tensors.
_NOISE_POOL_SIZE = 16_777_213

# A matrix is drawn so that unit input gives unit output, except these. In the language models
# sharp attention keeps a long text from averaging out, and a strong projection makes the audio
# follow text and prompt. Elsewhere sharp attention would let rounding errors grow from patch to
# patch until no two implementations of the same arithmetic agree; with these figures an error of
# 1e-6 in each patch is still below 1e-4 after 20 of them.
_LANGUAGE_MODEL_GAINS = {"q_proj": 2.0, "k_proj": 2.0}
_LANGUAGE_MODEL_TO_AUDIO_GAIN = 2.0

# Of the audio codec, tried out: samples at the level of speech become latents of the size of the
# diffusion's noise, and those become samples of which a root mean square is about 0.12 of full
# scale. (Its activation adds a square of a sine, so that ones everywhere would end at 0.5.)
_SAMPLES_GAIN = 5.0
_RESIDUAL_GAIN = 0.3
_UPSAMPLING_GAIN = 0.75
_OUTPUT_GAIN = 0.1


@dataclass(frozen=True, kw_only=True)
class _Widths:
    """Layer widths (in channels) and counts; those of `tiny` unless given.

    The language model and the local layers differ in width, so that no one mixes them up.
    """

    hidden: int = 64
    ffn: int = 96
    heads: int = 8
    head_dim: int = 8
    names_head_dim: bool = False
    layers: int = 3
    residual_layers: int = 2
    local_hidden: int = 32
    local_ffn: int = 64
    local_heads: int = 4
    local_layers: int = 2
    quantized: int = 24
    vae_encoder: int = 4
    vae_decoder: int
    max_length: int = 1_024
    vocabulary: int = 600


_FULL = _Widths(
    hidden=1_024,
    ffn=4_096,
    heads=16,
    head_dim=64,
    layers=24,
    residual_layers=6,
    local_hidden=1_024,
    local_ffn=4_096,
    local_heads=16,
    local_layers=4,
    quantized=256,
    vae_encoder=128,
    vae_decoder=1_536,
    max_length=4_096,
    vocabulary=73_448,
)
_WIDTHS: dict[tuple[Architecture, Size], _Widths] = {
    ("voxcpm-0.5b", "tiny"): _Widths(vae_decoder=64),
    ("voxcpm-1.5", "tiny"): _Widths(vae_decoder=128, residual_layers=3),
    # As in the real one, the heads of the local layers together are wider than their input.
    ("voxcpm2", "tiny"): _Widths(vae_decoder=256, heads=4, head_dim=16, names_head_dim=True),
    ("voxcpm-0.5b", "full"): _FULL,
    ("voxcpm-1.5", "full"): replace(
        _FULL, residual_layers=8, local_layers=8, vae_encoder=64, vae_decoder=2_048
    ),
    ("voxcpm2", "full"): replace(
        _FULL,
        hidden=2_048,
        ffn=6_144,
        head_dim=128,
        names_head_dim=True,
        layers=28,
        residual_layers=8,
        local_layers=12,
        quantized=512,
        vae_decoder=2_048,
        max_length=8_192,
    ),
}

_VAE_RATES: dict[Architecture, dict[str, Any]] = {
    "voxcpm-0.5b": {
        "encoder_rates": [2, 5, 8, 8],
        "decoder_rates": [8, 8, 5, 2],
        "sample_rate": 16_000,
    },
    "voxcpm-1.5": {
        "encoder_rates": [2, 3, 6, 7, 7],
        "decoder_rates": [7, 7, 6, 3, 2],
        "sample_rate": 44_100,
    },
    "voxcpm2": {
        "encoder_rates": [2, 5, 8, 8],
        "decoder_rates": [8, 6, 5, 2, 2, 2],
        "sample_rate": 16_000,
        "out_sample_rate": 48_000,
        "sr_bin_boundaries": [20_000, 30_000, 40_000],
        "cond_type": "scale_bias",
        "cond_dim": 128,
        "cond_out_layer": False,
    },
}


def build_checkpoint(
    directory: Path,
    architecture: Architecture,
    *,
    size: Size = "tiny",
    seed: int = 0,
    dtype: str | None = None,
    stops: bool = False,
    max_length: int | None = None,
) -> Path:
    """Write a checkpoint into `directory` (created if missing) and return the directory.

    `tiny` keeps the true sample rates, patch and feature sizes and special ids, with small
    layers; `full` has the true sizes too. The same arguments give the same tensors, and the
    caller's random state is left alone. `dtype` is that of the language model (the decoder of
    audio is always float32): float32 for `tiny` and bfloat16 for `full` unless given. Speech
    never ends by itself, or, with `stops`, ends as soon as the library looks: after
    `min_len + 2` patches. `max_length` is the room for text, prompt and speech together, in
    tokens and patches: 1,024 for `tiny` and the real figure for `full` unless given.
    """
    directory.mkdir(parents=True, exist_ok=True)
    config = checkpoint_config(architecture, size=size, dtype=dtype, max_length=max_length)
    shapes = tensor_shapes(architecture, size=size)
    noise = _Noise(seed, sum(math.prod(shape) for shape in shapes.values()))
    model_dtype: torch.dtype = getattr(torch, config["dtype"])
    model: dict[str, torch.Tensor] = {}
    vae: dict[str, torch.Tensor] = {}
    for name, shape in shapes.items():
        if name.startswith("audio_vae."):
            vae[name.removeprefix("audio_vae.")] = _vae_tensor(name, shapes, noise, config)
        else:
            model[name] = _model_tensor(name, shape, noise, stops=stops).to(model_dtype)

    (directory / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    _write_tokenizer(directory)
    if architecture == "voxcpm-0.5b":
        torch.save(model, directory / "pytorch_model.bin")
    else:
        save_file(model, directory / "model.safetensors", metadata={"format": "pt"})
    torch.save({"state_dict": vae}, directory / "audiovae.pth")
    return directory


def checkpoint_config(
    architecture: Architecture,
    *,
    size: Size = "tiny",
    dtype: str | None = None,
    max_length: int | None = None,
) -> dict[str, Any]:
    """Return what `config.json` holds. Lengths are in tokens or patches, rates in hertz."""
    widths = _WIDTHS[architecture, size]
    config: dict[str, Any] = {
        "architecture": "voxcpm2" if architecture == "voxcpm2" else "voxcpm",
        "lm_config": _lm_config(widths),
        "patch_size": 2 if architecture == "voxcpm-0.5b" else 4,
        "feat_dim": 64,
        "residual_lm_num_layers": widths.residual_layers,
        "scalar_quantization_latent_dim": widths.quantized,
        "scalar_quantization_scale": 9,
        "encoder_config": _local_config(widths),
        "dit_config": _local_config(widths)
        | {
            "cfm_config": {
                "sigma_min": 1e-06,
                "solver": "euler",
                "t_scheduler": "log-norm",
                "inference_cfg_rate": 2.0,
            }
        },
        "audio_vae_config": _VAE_RATES[architecture]
        | {
            "encoder_dim": widths.vae_encoder,
            "decoder_dim": widths.vae_decoder,
            "latent_dim": 64,
            "depthwise": True,
            "use_noise_block": False,
        },
        "max_length": max_length or widths.max_length,
        "device": "cuda",
        "dtype": dtype or ("float32" if size == "tiny" else "bfloat16"),
    }
    if architecture == "voxcpm-0.5b":
        del config["architecture"]
        # The real 0.5B has no audio_vae_config: the library then builds its default, 75 million
        # parameters, 300 MB to write and half a second to run. Nothing but this key makes it
        # smaller, so `tiny` has it, with the default's rates, and only the widths differ.
        if size == "full":
            del config["audio_vae_config"]
    if architecture == "voxcpm2":
        config["residual_lm_no_rope"] = True
        # The published key, which the library does not read (it looks for dit_mean_mode).
        config["dit_config"]["mean_mode"] = False
    return config


def tensor_shapes(architecture: Architecture, *, size: Size = "tiny") -> dict[str, tuple[int, ...]]:
    """Name and shape of each tensor of the library's model, those of its `audio_vae` included."""
    from voxcpm.model.voxcpm import VoxCPMConfig, VoxCPMModel
    from voxcpm.model.voxcpm2 import VoxCPM2Model
    from voxcpm.model.voxcpm2 import VoxCPMConfig as VoxCPM2Config
    from voxcpm.modules.audiovae import AudioVAE, AudioVAEV2

    # A cache of one position, because the library allocates it on the real device.
    values = checkpoint_config(architecture, size=size, max_length=1)
    no_tokens: Any = SimpleNamespace(vocab={})
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        stack.enter_context(torch.random.fork_rng(devices=[]))
        if size == "full":
            # No memory and no numbers to draw; its first use in a process costs two seconds.
            stack.enter_context(torch.device("meta"))
        model: torch.nn.Module
        if architecture == "voxcpm2":
            config2 = VoxCPM2Config.model_validate(values)
            vae2 = AudioVAEV2(config2.audio_vae_config)
            model = VoxCPM2Model(config2, no_tokens, vae2, device="cpu")
        else:
            config = VoxCPMConfig.model_validate(values)
            model = VoxCPMModel(config, no_tokens, AudioVAE(config.audio_vae_config), device="cpu")
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _lm_config(widths: _Widths) -> dict[str, Any]:
    factors = _rope_factors(widths.head_dim // 2)
    return {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_size": widths.hidden,
        "intermediate_size": widths.ffn,
        "max_position_embeddings": 32_768,
        "num_attention_heads": widths.heads,
        "num_hidden_layers": widths.layers,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10_000.0,
        "rope_scaling": {
            "type": "longrope",
            "long_factor": factors,
            "short_factor": factors,
            "original_max_position_embeddings": 32_768,
        },
        "vocab_size": widths.vocabulary,
        "use_mup": False,
        "scale_emb": 12,
        "dim_model_base": 256,
        "scale_depth": 1.4,
    } | ({"kv_channels": widths.head_dim} if widths.names_head_dim else {})


def _local_config(widths: _Widths) -> dict[str, Any]:
    return {
        "hidden_dim": widths.local_hidden,
        "ffn_dim": widths.local_ffn,
        "num_heads": widths.local_heads,
        "num_layers": widths.local_layers,
    } | ({"kv_channels": widths.head_dim} if widths.names_head_dim else {})


def _rope_factors(count: int) -> list[float]:
    """A rise from 1 to 31 in the shape of an S, close to the published factors."""
    middle = (count - 1) / 2
    return [1 + 30 / (1 + math.exp((middle - i) * 12 / count)) for i in range(count)]


class _Noise:
    """Numbers of unit variance, read from end to end over and over."""

    def __init__(self, seed: int, needed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        size = min(needed, _NOISE_POOL_SIZE)
        self._pool = torch.randn(size, generator=generator)
        self._position = 0

    def take(self, shape: tuple[int, ...]) -> torch.Tensor:
        count = math.prod(shape)
        start, size = self._position, self._pool.numel()
        self._position = (start + count) % size
        if start + count <= size:
            return self._pool[start : start + count].reshape(shape).clone()
        repeats = (start + count) // size
        pieces = [self._pool[start:], *[self._pool] * (repeats - 1), self._pool[: self._position]]
        return torch.cat(pieces).reshape(shape)


def _model_tensor(name: str, shape: tuple[int, ...], noise: _Noise, *, stops: bool) -> torch.Tensor:
    module, kind = name.split(".")[-2:]
    if module.startswith("stop_"):
        return _stop_tensor(f"{module}.{kind}", shape, stops=stops)
    values = noise.take(shape)
    if module.endswith("norm"):
        return 1 + 0.1 * values
    if kind == "bias":
        return 0.1 * values
    if kind == "weight" and module != "embed_tokens":
        return values * (_gain(name, module) / math.sqrt(shape[1]))
    return values


def _gain(name: str, module: str) -> float:
    if name.startswith(("base_lm.", "residual_lm.")):
        return _LANGUAGE_MODEL_GAINS.get(module, 1.0)
    return _LANGUAGE_MODEL_TO_AUDIO_GAIN if module == "lm_to_dit_proj" else 1.0


def _stop_tensor(name: str, shape: tuple[int, ...], *, stops: bool) -> torch.Tensor:
    """A verdict that no input can change.

    The head has no bias, so the layer before it is given one: with its weights at zero it hands
    on the same positive numbers always, and the head's two rows count them for and against.
    """
    if name == "stop_proj.weight":
        return torch.zeros(shape)
    if name == "stop_proj.bias":
        return torch.ones(shape)
    against, favour = -torch.ones(shape[1]), torch.ones(shape[1])
    return torch.stack([against, favour] if stops else [favour, against])


def _vae_tensor(
    name: str, shapes: Mapping[str, tuple[int, ...]], noise: _Noise, config: Mapping[str, Any]
) -> torch.Tensor:
    if name.endswith("sr_bin_boundaries"):
        return torch.tensor(config["audio_vae_config"]["sr_bin_boundaries"], dtype=torch.int32)
    values = noise.take(shapes[name])
    if name.endswith("weight_v"):
        # Taps that sum to zero in the last layer, so that the output is not a constant.
        is_last = shapes[name][0] == 1
        return values - values.mean(dim=-1, keepdim=True) if is_last else values
    if name.endswith("weight_g"):
        return _vae_gain(name, shapes) * (1 + 0.1 * values)
    if name.endswith(("alpha", "scale_embed.weight")):
        return 1 + 0.1 * values
    return 0.02 * values


def _vae_gain(name: str, shapes: Mapping[str, tuple[int, ...]]) -> float:
    """The norm of a kernel (weight normalisation keeps it apart from the kernel's direction)."""
    if name == "audio_vae.encoder.block.0.weight_g":
        return _SAMPLES_GAIN
    if name.endswith("block.3.weight_g"):  # where a residual branch ends
        return _RESIDUAL_GAIN
    inputs, outputs, taps = shapes[name.removesuffix("g") + "v"]  # or outputs, inputs, taps
    if re.search(r"decoder\.model\.\d+\.block\.1\.weight_g$", name):
        # A transposed convolution: kernels are per input, and two taps of each reach an output.
        return _UPSAMPLING_GAIN * math.sqrt(outputs * taps / (2 * inputs))
    return _OUTPUT_GAIN if inputs == 1 else 1.0


def _write_tokenizer(directory: Path) -> None:
    """A byte-fallback BPE in the style of Llama's: every text has tokens, no text fails."""
    vocabulary: dict[str, int] = {}
    merges: list[tuple[str, str]] = []

    def add(*tokens: str) -> None:
        for token in tokens:
            vocabulary.setdefault(token, len(vocabulary))

    add(*_LLAMA_TOKENS, _SPACE, *_ASCII)
    add(*(f"<|reserved_{i}|>" for i in range(_FIRST_AUDIO_TOKEN_ID - len(vocabulary))))
    add(*_AUDIO_TOKENS)
    add(*(f"<0x{byte:02X}>" for byte in range(256)))
    add(*_ARABIC, *_LATIN, *_CHINESE, *_PUNCTUATION)
    for word in _WORDS:
        for end in range(1, len(word)):
            merge = (word[:end], word[end])
            if merge not in merges:
                merges.append(merge)
            add(word[: end + 1])
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(_SPACE, prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(_SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    special = [*_LLAMA_TOKENS, *_AUDIO_TOKENS]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    tokenizer.save(str(directory / "tokenizer.json"))

    unknown, begin, finish = _LLAMA_TOKENS
    names = {"unk_token": unknown, "bos_token": begin, "eos_token": finish}
    settings = names | {
        "tokenizer_class": "LlamaTokenizerFast",
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1_000_000_000,
    }
    for file, content in {
        "tokenizer_config.json": settings,
        "special_tokens_map.json": names | {"additional_special_tokens": list(_AUDIO_TOKENS)},
    }.items():
        (directory / file).write_text(json.dumps(content, indent=2), encoding="utf-8")
