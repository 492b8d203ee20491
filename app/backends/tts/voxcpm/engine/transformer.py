"""MiniCPM layers, of which all of VoxCPM's networks are made: step by step, in one go, locally.

The arithmetic is that of the library's `minicpm4`, with fewer and larger operations: one product
for query, key and value and one for gate and up, rotary embedding as one complex multiplication.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from app.backends.tts.voxcpm.engine.linear import Linear, linear, rows_at_once

Take = Callable[[str], Tensor]

_CACHE_BLOCK = 256


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a transformer. `groups` heads of keys and values serve `heads` heads of queries."""

    hidden: int
    heads: int
    groups: int
    head_size: int
    layers: int
    epsilon: float
    residual_scale: float

    @classmethod
    def of(cls, config: Any) -> "Shape":
        """From the library's MiniCPM4Config."""
        return cls(
            hidden=config.hidden_size,
            heads=config.num_attention_heads,
            groups=config.num_key_value_heads,
            head_size=config.kv_channels or config.hidden_size // config.num_attention_heads,
            layers=config.num_hidden_layers,
            epsilon=config.rms_norm_eps,
            residual_scale=(
                config.scale_depth / math.sqrt(config.num_hidden_layers) if config.use_mup else 1.0
            ),
        )


class KVCache:
    """Keys and values of one sequence in all layers: (layers, 2, groups, capacity, head size).

    It grows in blocks, so that a short request takes little memory, and can be cut back, so that
    an attempt can start again behind the same prompt.
    """

    def __init__(self, shape: Shape, *, dtype: torch.dtype, device: torch.device) -> None:
        self.length = 0
        size = (shape.layers, 2, shape.groups, 0, shape.head_size)
        self._tensor = torch.empty(size, dtype=dtype, device=device)
        self._layers: list[Tensor] = []

    def reserve(self, count: int) -> None:
        """Make room for `count` more positions."""
        needed = self.length + count
        if needed <= self._tensor.shape[3]:
            return
        blocks = -(-max(needed, self._tensor.shape[3] * 3 // 2) // _CACHE_BLOCK)
        size = list(self._tensor.shape)
        size[3] = blocks * _CACHE_BLOCK
        larger = self._tensor.new_empty(size)
        larger[:, :, :, : self.length] = self._tensor[:, :, :, : self.length]
        self._tensor = larger
        self._layers = list(larger.unbind())

    def write(self, layer: int, pairs: Tensor) -> tuple[Tensor, Tensor]:
        """Put (count, 2, groups, head size) behind what is there; return all keys and values.

        They are views of shape (1, groups, length + count, head size).
        """
        end = self.length + pairs.shape[0]
        tensor = self._layers[layer]
        tensor[:, :, self.length : end] = pairs.permute(1, 2, 0, 3)
        both = tensor[:, None, :, :end]
        return both[0], both[1]


class _Layer:
    def __init__(self, take: Take, shape: Shape, *, quantize: bool) -> None:
        self.attention_norm = take("input_layernorm.weight")
        self.mlp_norm = take("post_attention_layernorm.weight")
        query, key, value = (take(f"self_attn.{name}_proj.weight") for name in "qkv")
        paired = [_pairs_together(one, shape.head_size) for one in (query, key)]
        self.qkv = linear(torch.cat([*paired, value]), quantize=quantize)
        del query, key, value, paired
        self.output = linear(take("self_attn.o_proj.weight"), quantize=quantize)
        gate_up = torch.cat([take("mlp.gate_proj.weight"), take("mlp.up_proj.weight")])
        self.gate_up = linear(gate_up, quantize=quantize)
        self.down = linear(take("mlp.down_proj.weight"), quantize=quantize)


class Transformer:
    """A stack of layers with its last norm, over (rows, hidden) or (items, rows, hidden)."""

    def __init__(
        self,
        take: Take,
        config: Any,
        *,
        rotary: Tensor | None,
        quantize: bool,
    ) -> None:
        """Take a MiniCPM's weights by their names in it."""
        self.shape = Shape.of(config)
        self._rotary = rotary
        self._layers = [
            _Layer(_under(take, f"layers.{number}."), self.shape, quantize=quantize)
            for number in range(self.shape.layers)
        ]
        self._norm = take("norm.weight")

    def cache(self) -> KVCache:
        """An empty cache for one sequence."""
        return KVCache(self.shape, dtype=self._norm.dtype, device=self._norm.device)

    def step(self, x: Tensor, caches: Sequence[KVCache]) -> Tensor:
        """One position of each of several sequences: x is (sequences, hidden), and so the result.

        Each attends to its own past only, in an operation of its own: padding them to one length
        would make the sums, and so the sound, depend on the neighbours.
        """
        for cache in caches:
            cache.reserve(1)
        angles = self._angles([cache.length for cache in caches])

        def attend(layer: int, query: Tensor, pairs: Tensor) -> Tensor:
            parts = [
                self._attention(query[row : row + 1], *cache.write(layer, pairs[row : row + 1]))
                for row, cache in enumerate(caches)
            ]
            return _joined(parts)

        x = self._run(x, angles, attend)
        for cache in caches:
            cache.length += 1
        return x

    def read(self, x: Tensor, cache: KVCache) -> Tensor:
        """The next positions of one sequence, x (positions, hidden), all at once."""
        count, start = x.shape[0], cache.length
        cache.reserve(count)
        angles = self._angles(range(start, start + count))
        mask = None
        if start and count > 1:
            mask = torch.ones(count, start + count, dtype=torch.bool, device=x.device).tril(start)

        def attend(layer: int, query: Tensor, pairs: Tensor) -> Tensor:
            keys, values = cache.write(layer, pairs)
            attended = functional.scaled_dot_product_attention(
                query.transpose(0, 1)[None],
                keys,
                values,
                attn_mask=mask,
                is_causal=mask is None and count > 1,
                enable_gqa=True,
            )
            return attended[0].transpose(0, 1)

        x = self._run(x, angles, attend, alone=True)
        cache.length += count
        return x

    def local(self, x: Tensor, *, alone: bool = False) -> Tensor:
        """Short sequences whose positions all see one another: x is (items, positions, hidden)."""
        items, positions, _ = x.shape
        angles = self._angles(range(positions))

        def attend(_: int, query: Tensor, pairs: Tensor) -> Tensor:
            heads = query.view(items, positions, self.shape.heads, self.shape.head_size)
            keys, values = pairs.view(items, positions, *pairs.shape[1:]).unbind(2)
            attended = functional.scaled_dot_product_attention(
                heads.transpose(1, 2),
                keys.transpose(1, 2),
                values.transpose(1, 2),
                enable_gqa=True,
            )
            return attended.transpose(1, 2)

        if angles is not None:
            angles = angles.repeat(items, 1, 1)
        rows = self._run(x.reshape(items * positions, -1), angles, attend, alone=alone)
        return rows.view(items, positions, -1)

    def _angles(self, positions: Sequence[int]) -> Tensor | None:
        """Rotations of shape (rows, 1, head size / 2), complex."""
        if self._rotary is None:
            return None
        if isinstance(positions, range):
            return self._rotary[positions.start : positions.stop, None]
        return self._rotary[torch.tensor(positions, device=self._rotary.device), None]

    def _run(
        self,
        x: Tensor,
        angles: Tensor | None,
        attend: Callable[[int, Tensor, Tensor], Tensor],
        *,
        alone: bool = False,
    ) -> Tensor:
        shape, rows = self.shape, x.shape[0]
        rotated = shape.heads + shape.groups
        # Whatever has a row of its own is done a few rows at a time: see `linear`.
        cuts = [x] if alone else list(torch.split(x, rows_at_once(x.dtype)))
        for number, layer in enumerate(self._layers):
            heads = _joined(
                [layer.qkv(self._normal(cut, layer.attention_norm), alone=alone) for cut in cuts]
            )
            heads = heads.view(rows, -1, shape.head_size)
            query_key, value = heads[:, :rotated], heads[:, rotated:]
            if angles is not None:
                query_key = _rotated(query_key, angles)
            pairs = torch.stack([query_key[:, shape.heads :], value], 1)
            attended = attend(number, query_key[:, : shape.heads], pairs).reshape(rows, -1)
            parts = torch.split(attended, [len(cut) for cut in cuts])
            cuts = [
                self._plus(cut, layer.output, part, alone=alone)
                for cut, part in zip(cuts, parts, strict=True)
            ]
            # One matrix after the other, so that the cuts of the batch find it in the CPU's cache.
            wide = [layer.gate_up(self._normal(cut, layer.mlp_norm), alone=alone) for cut in cuts]
            cuts = [
                self._plus(cut, layer.down, _gated(part), alone=alone)
                for cut, part in zip(cuts, wide, strict=True)
            ]
        return self._normal(_joined(cuts), self._norm)

    def _normal(self, x: Tensor, weight: Tensor) -> Tensor:
        return functional.rms_norm(x, (x.shape[-1],), weight, self.shape.epsilon)

    def _plus(self, x: Tensor, layer: Linear, y: Tensor, *, alone: bool) -> Tensor:
        if self.shape.residual_scale == 1.0:
            return layer(y, residual=x, alone=alone)
        return x + layer(y, alone=alone) * self.shape.residual_scale

    def _attention(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """One query row, (1, heads, head size): the heads of a group become its query positions."""
        shape = self.shape
        grouped = query.reshape(1, shape.groups, shape.heads // shape.groups, shape.head_size)
        return functional.scaled_dot_product_attention(grouped, keys, values)


def rotary_table(config: Any, *, length: int, device: torch.device) -> Tensor:
    """Rotations for positions 0 to length - 1: complex64 (length, head size / 2).

    As the library's MiniCPMLongRoPE computes them (LongRoPE, arXiv 2402.13753).
    """
    size = config.kv_channels or config.hidden_size // config.num_attention_heads
    scaling = config.rope_scaling
    original = scaling.original_max_position_embeddings
    longer = config.max_position_embeddings > original
    factors = torch.tensor(scaling.long_factor if longer else scaling.short_factor)
    stretch = config.max_position_embeddings / original
    magnitude = math.sqrt(1 + math.log(stretch) / math.log(original))
    inverse = 1.0 / (config.rope_theta ** (torch.arange(0, size, 2).float() / size))
    angles = torch.outer(torch.arange(length, dtype=torch.float32), 1.0 / factors) * inverse
    return torch.complex(angles.cos() * magnitude, angles.sin() * magnitude).to(device)


def _pairs_together(weight: Tensor, head_size: int) -> Tensor:
    """Reorder a projection's rows so that what is rotated together lies side by side.

    The library rotates feature i with i + head_size / 2. Queries and keys are reordered alike, so
    their products stay the same.
    """
    heads = weight.view(-1, 2, head_size // 2, weight.shape[1])
    return heads.transpose(1, 2).reshape(weight.shape)


def _rotated(heads: Tensor, angles: Tensor) -> Tensor:
    pairs = heads.float().reshape(*heads.shape[:-1], -1, 2)
    turned = torch.view_as_real(torch.view_as_complex(pairs) * angles)
    return turned.flatten(-2).to(heads.dtype)


def _gated(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return functional.silu(gate).mul_(up)


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _under(take: Take, prefix: str) -> Take:
    return lambda name: take(prefix + name)
