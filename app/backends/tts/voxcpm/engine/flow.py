"""The diffusion decoder: from two hidden states to one patch of latents, by flow matching.

Euler steps with classifier-free guidance and CFG-Zero* (arXiv 2503.18886), as the library's
`UnifiedCFM` and its local DiT do them, for a batch of requests at once. What does not change from
step to step (time embeddings, the projected condition) is computed once.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

from app.backends.tts.voxcpm.engine.linear import Linear, linear
from app.backends.tts.voxcpm.engine.transformer import Take, Transformer

# Of the first steps, whose velocity CFG-Zero* takes to be zero.
_ZERO_SHARE = 0.04
_SINUSOID_SCALE = 1_000


class FlowDecoder:
    """Turns noise into patches, (requests, patch size, features) each way."""

    def __init__(
        self,
        take: Take,
        decoder: Transformer,
        *,
        dtype: torch.dtype,
        device: torch.device,
        mean_mode: bool,
        batch_invariant: bool,
    ) -> None:
        def projection(name: str) -> tuple[Tensor, Tensor]:
            return take(f"{name}.weight"), take(f"{name}.bias")

        self._hidden = decoder.shape.hidden
        self._dtype, self._device = dtype, device
        self._in = linear(*projection("in_proj"))
        self._condition = linear(*projection("cond_proj"))
        self._out = linear(*projection("out_proj"))
        self._time = [linear(*projection(f"time_mlp.linear_{one}")) for one in (1, 2)]
        self._delta = [linear(*projection(f"delta_time_mlp.linear_{one}")) for one in (1, 2)]
        self._decoder = decoder
        self._mean_mode = mean_mode
        self._batch_invariant = batch_invariant
        self._tables: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def solve(
        self, mu: Tensor, condition: Tensor, noise: Tensor, guidance: Tensor, steps: int
    ) -> Tensor:
        """Make one patch for each request.

        `mu` is (requests, hidden) or, with two tokens, (requests, 2 * hidden); `condition` the
        patch before, `noise` the starting point, both (requests, patch size, features);
        `guidance` float32 (requests, 1, 1).
        """
        requests, positions, _ = noise.shape
        known = self._condition(condition)
        prefix = mu.view(requests, -1, self._hidden)
        # Guided in the first half, unguided in the second.
        head = torch.cat([prefix, torch.zeros_like(prefix)])
        known = torch.cat([known, known])
        x = noise
        for time, delta in self._table(steps):
            state = self._in(x)
            if prefix.shape[1] == 1:
                front = head + time
            else:
                front = torch.cat([head, time.expand(2 * requests, 1, -1)], 1)
            rows = torch.cat([front, known, torch.cat([state, state])], 1)
            velocity = self._out(
                self._decoder.local(rows, alone=not self._batch_invariant)[:, -positions:]
            )
            towards, without = velocity.chunk(2)
            x = x - delta * _guided(towards, without, guidance)
        return x

    def _table(self, steps: int) -> list[tuple[Tensor, Tensor]]:
        """Time embedding (hidden) and step width (scalar) of every step that moves."""
        if steps not in self._tables:
            self._tables[steps] = self._make_table(steps)
        return self._tables[steps]

    def _make_table(self, steps: int) -> list[tuple[Tensor, Tensor]]:
        # In the model's own dtype from end to end: it was trained with these roundings.
        span = torch.linspace(1, 0, steps + 1, device=self._device, dtype=self._dtype)
        span = span + (torch.cos(torch.pi / 2 * span) - 1 + span)
        time, delta = span[0], span[0] - span[1]
        still = max(1, int((steps + 1) * _ZERO_SHARE))
        table = []
        for step in range(1, steps + 1):
            if step > still:
                ahead = delta if self._mean_mode else torch.zeros_like(delta)
                embedded = self._embedded(time, self._time) + self._embedded(ahead, self._delta)
                table.append((embedded, delta))
            time = time - delta
            if step < steps:
                delta = time - span[step + 1]
        return table

    def _embedded(self, time: Tensor, layers: list[Linear]) -> Tensor:
        half = self._hidden // 2
        decay = torch.arange(half, dtype=time.dtype, device=time.device)
        frequencies = torch.exp(decay * -(math.log(10_000) / (half - 1)))
        angles = _SINUSOID_SCALE * time * frequencies
        x = torch.cat([angles.sin(), angles.cos()])[None]
        return layers[1](functional.silu(layers[0](x)))[0]


def _guided(towards: Tensor, without: Tensor, guidance: Tensor) -> Tensor:
    """Classifier-free guidance, the unguided velocity scaled to fit the guided one."""
    dot = (towards * without).sum((1, 2), keepdim=True)
    without = without * (dot / ((without**2).sum((1, 2), keepdim=True) + 1e-8))
    # The guidance is float32 whatever the model's dtype, as a Python number would be.
    return without + (guidance * (towards - without)).to(without.dtype)
