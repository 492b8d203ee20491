"""VoxCPM's networks put together: reading a prompt, and making the next patch of many sequences.

Two language models go one position at a time: the first sees text and audio, and what it says of
audio is quantized; the second adds detail. Their hidden states steer the flow decoder, which makes
a patch of latents, and the local encoder turns the patch into the next position. The first
generation (0.5B and 1.5) adds the two states up, the second joins them side by side.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from app.backends.tts.voxcpm.engine.flow import FlowDecoder
from app.backends.tts.voxcpm.engine.linear import Linear, linear
from app.backends.tts.voxcpm.engine.transformer import KVCache, Transformer, rotary_table
from app.backends.tts.voxcpm.engine.weights import Weights

# Positions of a prompt that are read at once. Always cut in the same places, so that what is read
# does not depend on how busy the engine is.
CHUNK_POSITIONS = 64


@dataclass(frozen=True, slots=True)
class Mark:
    """Where a sequence stood, so that another attempt can start there."""

    length: int
    base_hidden: Tensor
    residual_hidden: Tensor
    patch: Tensor


@dataclass(slots=True, eq=False)
class SequenceState:
    """What the networks remember of one sequence.

    The keys and values of both language models, their last hidden states (hidden,), and the last
    patch (patch size, features).
    """

    base: KVCache
    residual: KVCache
    base_hidden: Tensor
    residual_hidden: Tensor
    patch: Tensor

    def mark(self) -> Mark:
        """The place to rewind to."""
        return Mark(self.base.length, self.base_hidden, self.residual_hidden, self.patch)

    def rewind(self, mark: Mark) -> None:
        """Forget what came after `mark`."""
        self.base.length = self.residual.length = mark.length
        self.base_hidden, self.residual_hidden = mark.base_hidden, mark.residual_hidden
        self.patch = mark.patch


class Network:
    """The networks of a checkpoint without its audio autoencoder, for inference only."""

    def __init__(
        self,
        config: Any,
        weights: Weights,
        *,
        dtype: torch.dtype,
        device: torch.device,
        quantize: bool = False,
        batch_invariant: bool = True,
    ) -> None:
        """Take the weights of `config` (the library's VoxCPMConfig) from `weights`.

        With `batch_invariant` a sequence's results do not depend on those beside it, to the bit.
        """
        self._batch_invariant = batch_invariant
        self.dtype, self.device = dtype, device
        self.patch_size: int = config.patch_size
        self.features: int = config.feat_dim
        self._quantization_scale: int = config.scalar_quantization_scale
        # Only the second generation's configuration has it.
        self._side_by_side = hasattr(config, "residual_lm_no_rope")
        build = _Builder(config, weights, device=device)
        lm = config.lm_config
        residual_lm = {"num_hidden_layers": config.residual_lm_num_layers}
        self._text = weights.take("base_lm.embed_tokens.weight").clone()
        self._base = build.language_model("base_lm", {}, quantize=quantize)
        no_rope = getattr(config, "residual_lm_no_rope", False)
        self._residual = build.language_model(
            "residual_lm", residual_lm, quantize=quantize, rope=not no_rope
        )
        self._local = build.local("feat_encoder.encoder", config.encoder_config)
        self._flow = build.flow(dtype, batch_invariant=batch_invariant)
        self._local_in = build.projection("feat_encoder.in_proj")
        self._local_token = weights.take("feat_encoder.special_token").reshape(1, 1, -1).clone()
        self._text_scale: float = lm.scale_emb if lm.use_mup else 1.0
        self._quantize_in = build.projection("fsq_layer.in_proj")
        self._quantize_out = build.projection("fsq_layer.out_proj")
        self._local_to_lm = build.projection("enc_to_lm_proj")
        self._base_to_flow = build.projection("lm_to_dit_proj")
        self._residual_to_flow = build.projection("res_to_dit_proj")
        self._fusion = build.projection("fusion_concat_proj") if self._side_by_side else None
        self._stop_in = build.projection("stop_proj")
        self._stop_out = build.projection("stop_head", bias=False)

    def embed_text(self, tokens: Sequence[int]) -> Tensor:
        """Token ids as (positions, hidden)."""
        embedded = self._text[torch.tensor(tokens, dtype=torch.long, device=self.device)]
        return embedded * self._text_scale if self._text_scale != 1.0 else embedded

    def embed_patches(self, patches: Tensor) -> Tensor:
        """Patches of latents, (positions, patch size, features), as (positions, hidden).

        They must all be of one recording: how many there are may show in the last bits.
        """
        patches = patches.to(self.device, self.dtype)
        return torch.cat(
            [self._embedded(some, alone=True) for some in torch.split(patches, CHUNK_POSITIONS)]
        )

    def read(self, parts: Sequence[tuple[Tensor, bool]], patch: Tensor) -> "Reading":
        """Prepare to read a prompt: parts of (positions, hidden), each with whether it is audio.

        `patch` is the last patch of a prompt that ends with audio, (1, patch size, features), or
        none of them.
        """
        if not len(patch):
            patch = torch.zeros(1, self.patch_size, self.features)
        rows = torch.cat([part for part, _ in parts])
        audio = torch.cat(
            [torch.full((len(part), 1), heard, device=self.device) for part, heard in parts]
        )
        return Reading(self, rows, audio, patch[0].to(self.device, self.dtype))

    def make_patches(
        self,
        sequences: Sequence[SequenceState],
        noise: Tensor,
        guidance: Sequence[float],
        steps: Sequence[int],
    ) -> Tensor:
        """The next patch of each sequence: (sequences, patch size, features), from noise like it.

        Sequences with different numbers of steps are solved in groups.
        """
        mu = self._mu(sequences)
        condition = torch.stack([one.patch for one in sequences])
        scale = torch.tensor(guidance, device=self.device).view(-1, 1, 1)
        groups = sorted(set(steps))
        if len(groups) == 1:
            return self._flow.solve(mu, condition, noise, scale, groups[0])
        patches = torch.empty_like(noise)
        for count in groups:
            rows = [row for row, steps_of_row in enumerate(steps) if steps_of_row == count]
            patches[rows] = self._flow.solve(
                mu[rows], condition[rows], noise[rows], scale[rows], count
            )
        return patches

    def say_stop(self, sequences: Sequence[SequenceState]) -> list[bool]:
        """Whether each sequence holds that the patch being made is its last."""
        hidden = torch.stack([one.base_hidden for one in sequences])
        logits = self._stop_out(functional.silu(self._stop_in(hidden)))
        return [verdict == 1 for verdict in logits.argmax(-1).tolist()]

    def advance(self, sequences: Sequence[SequenceState], patches: Tensor) -> None:
        """Take each sequence one position further, behind the patch it has just made."""
        rows = self._embedded(patches, alone=not self._batch_invariant)
        base = self._quantized(self._base.step(rows, [one.base for one in sequences]))
        residual = self._residual.step(
            self._residual_input(base, rows), [one.residual for one in sequences]
        )
        for row, one in enumerate(sequences):
            one.base_hidden, one.residual_hidden, one.patch = base[row], residual[row], patches[row]

    def noise(self, generator: torch.Generator) -> Tensor:
        """Noise for one patch, (patch size, features): the numbers that the library would draw."""
        size = (1, self.features, self.patch_size)
        drawn = torch.randn(size, generator=generator, dtype=self.dtype, device=self.device)
        return drawn[0].T

    def _mu(self, sequences: Sequence[SequenceState]) -> Tensor:
        base = self._base_to_flow(torch.stack([one.base_hidden for one in sequences]))
        residual = self._residual_to_flow(torch.stack([one.residual_hidden for one in sequences]))
        return torch.cat([base, residual], -1) if self._side_by_side else base + residual

    def _embedded(self, patches: Tensor, *, alone: bool) -> Tensor:
        rows = self._local_in(patches, alone=alone)
        rows = torch.cat([self._local_token.expand(len(rows), 1, -1), rows], 1)
        return self._local_to_lm(self._local.local(rows, alone=alone)[:, 0], alone=alone)

    def _quantized(self, hidden: Tensor, *, alone: bool = False) -> Tensor:
        """Finite scalar quantization (arXiv 2309.15505)."""
        levels = torch.tanh(self._quantize_in(hidden, alone=alone))
        levels = torch.round(levels * self._quantization_scale) / self._quantization_scale
        return self._quantize_out(levels, alone=alone)

    def _residual_input(self, base: Tensor, rows: Tensor, *, alone: bool = False) -> Tensor:
        if self._fusion is None:
            return base + rows
        return self._fusion(torch.cat([base, rows], -1), alone=alone)

    def _read_chunk(self, state: SequenceState, rows: Tensor, audio: Tensor) -> None:
        base = self._base.read(rows, state.base)
        if audio.any():
            base = torch.where(audio, self._quantized(base, alone=True), base)
        residual = self._residual_input(base, rows * audio, alone=True)
        state.residual_hidden = self._residual.read(residual, state.residual)[-1]
        state.base_hidden = base[-1]


class Reading:
    """A prompt that is being read, a chunk at a time."""

    def __init__(self, network: Network, rows: Tensor, audio: Tensor, patch: Tensor) -> None:
        self._network = network
        self._rows = torch.split(rows, CHUNK_POSITIONS)
        self._audio = torch.split(audio, CHUNK_POSITIONS)
        nothing = rows.new_zeros(rows.shape[1])
        self.state = SequenceState(
            network._base.cache(), network._residual.cache(), nothing, nothing, patch
        )

    def chunks(self) -> Iterator[None]:
        """Read, giving way between chunks; `state` is ready once this ends."""
        for rows, audio in zip(self._rows, self._audio, strict=True):
            self._network._read_chunk(self.state, rows, audio)
            yield


class _Builder:
    """Builds the parts of a network from the weights of a checkpoint."""

    def __init__(self, config: Any, weights: Weights, *, device: torch.device) -> None:
        self._config = config
        self._weights = weights
        self._device = device

    def projection(self, name: str, *, bias: bool = True) -> Linear:
        take = self._weights.take
        return linear(take(f"{name}.weight"), take(f"{name}.bias") if bias else None)

    def language_model(
        self, prefix: str, changes: dict[str, Any], *, quantize: bool, rope: bool = True
    ) -> Transformer:
        config = self._config.lm_config.model_copy(update=changes)
        length = self._config.max_length
        rotary = rotary_table(config, length=length, device=self._device) if rope else None
        return self._transformer(prefix, config, rotary, quantize=quantize)

    def local(self, prefix: str, sizes: Any) -> Transformer:
        config = self._local_config(sizes)
        return self._transformer(prefix, config, self._local_rotary(config))

    def flow(self, dtype: torch.dtype, *, batch_invariant: bool) -> FlowDecoder:
        dit = self._config.dit_config
        config = self._local_config(dit)
        rotary = self._local_rotary(config)
        prefix = "feat_decoder.estimator"
        # The two generations' configurations keep it in different places.
        mean_mode = any(getattr(one, "dit_mean_mode", False) for one in (self._config, dit))
        decoder = self._transformer(f"{prefix}.decoder", config, rotary)
        return FlowDecoder(
            lambda name: self._weights.take(f"{prefix}.{name}"),
            decoder,
            dtype=dtype,
            device=self._device,
            mean_mode=mean_mode,
            batch_invariant=batch_invariant,
        )

    def _local_config(self, sizes: Any) -> Any:
        return self._config.lm_config.model_copy(
            update={
                "hidden_size": sizes.hidden_dim,
                "intermediate_size": sizes.ffn_dim,
                "num_attention_heads": sizes.num_heads,
                "num_hidden_layers": sizes.num_layers,
                "kv_channels": sizes.kv_channels,
            }
        )

    def _local_rotary(self, config: Any) -> Tensor:
        # A patch before, a patch, the local token or the time and at most two of the steering.
        return rotary_table(config, length=2 * self._config.patch_size + 3, device=self._device)

    def _transformer(
        self, prefix: str, config: Any, rotary: Tensor | None, *, quantize: bool = False
    ) -> Transformer:
        def take(name: str) -> Tensor:
            return self._weights.take(f"{prefix}.{name}")

        return Transformer(take, config, rotary=rotary, quantize=quantize)
