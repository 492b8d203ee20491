"""VoxCPM's audio autoencoder as a causal stream: latents to samples and samples to latents.

The arithmetic is that of the library's `AudioVAE` in both generations, in float32. Time runs along
rows, so that a convolution over channels is a matrix product; each convolution keeps the rows that
it still needs, so that sound comes out piece by piece and the same as in one go.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import ceil, prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from app.backends.base import BackendLoadError
from app.backends.tts.voxcpm.engine.linear import Linear, linear

Take = Callable[[str], Tensor]

_DILATIONS = (1, 3, 9)
# How much of a recording is encoded at once.
_ENCODER_CHUNK_SECONDS = 1.0


@dataclass(slots=True, eq=False)
class DecoderState:
    """Where one stream stands: for each convolution the rows (count, channels) it needs again."""

    rows: list[Tensor] = field(default_factory=list)


class AudioDecoder:
    """Latents of `features` numbers a frame to samples."""

    def __init__(self, config: Any, take: Take) -> None:
        """`config` is the library's AudioVAEConfig.

        Raises BackendLoadError for variants of it that no published model uses.
        """
        if not config.depthwise or config.use_noise_block:
            raise BackendLoadError("this server cannot run its kind of audio autoencoder")
        self.samples_per_frame = prod(config.decoder_rates)
        names = (f"decoder.model.{number}" for number in range(1_000))
        self._first = _Depthwise(take, next(names))
        self._widen = _pointwise(take, next(names))
        self._blocks: list[tuple[_Condition | None, _Upsampling]] = []
        for number, stride in enumerate(config.decoder_rates):
            condition = _condition(config, take, f"decoder.sr_cond_model.{number + 2}")
            self._blocks.append((condition, _Upsampling(take, next(names), stride)))
        if getattr(config, "sr_bin_boundaries", None):
            take("decoder.sr_bin_boundaries")
        self._last_snake = _Snake(take, next(names))
        self._last = _ToMono(take, next(names))

    def start(self) -> DecoderState:
        """The state of a stream of which nothing has been decoded."""
        return DecoderState()

    def decode(self, latents: Tensor, states: Sequence[DecoderState]) -> Tensor:
        """The next frames of several streams, float32 (streams, frames, features).

        Returns float32 (streams, frames * samples_per_frame) within [-1, 1], and takes each
        stream's state on.
        """
        past = _Past(states)
        x = self._widen(self._first(latents, past))
        for condition, block in self._blocks:
            if condition is not None:
                x = condition(x)
            x = block(x, past)
        return torch.tanh_(self._last(self._last_snake(x), past))


class AudioEncoder:
    """Samples to latents, the mean of the autoencoder's distribution."""

    def __init__(self, config: Any, take: Take) -> None:
        """`config` is the library's AudioVAEConfig."""
        # The generations differ in how far they pad where a stride is odd.
        second = hasattr(config, "out_sample_rate")
        self.samples_per_frame = prod(config.encoder_rates)
        seconds = config.sample_rate * _ENCODER_CHUNK_SECONDS
        self._chunk = ceil(seconds / self.samples_per_frame) * self.samples_per_frame
        self._first = _Windows(take, "encoder.block.0", stride=1, pad=6)
        self._blocks = [
            _Downsampling(
                take,
                f"encoder.block.{number}.block",
                stride,
                pad=2 * ceil(stride / 2) - (stride % 2 if second else 0),
            )
            for number, stride in enumerate(config.encoder_rates, 1)
        ]
        self._mean = _Windows(take, "encoder.fc_mu", stride=1, pad=2)
        for part in ("weight_g", "weight_v", "bias"):
            take(f"encoder.fc_logvar.{part}")

    def encode(self, samples: Tensor) -> Iterator[Tensor]:
        """Encode float32 (n,), n a multiple of `samples_per_frame`, a second at a time.

        Yields float32 (frames, features).
        """
        state = DecoderState()
        for chunk in torch.split(samples, self._chunk):
            past = _Past([state])
            x = self._first(chunk[None, :, None], past)
            for block in self._blocks:
                x = block(x, past)
            yield self._mean(x, past)[0]


class _Past:
    """Hands each convolution of a pass its past rows, in the order in which they are run."""

    def __init__(self, states: Sequence[DecoderState]) -> None:
        self._states = states
        self._number = 0

    def before(self, x: Tensor, count: int) -> Tensor:
        """Put the last `count` rows of each stream before `x`, and keep those of the next time."""
        number, self._number = self._number, self._number + 1
        nothing = x.new_zeros(count, x.shape[2])
        past = torch.stack(
            [state.rows[number] if number < len(state.rows) else nothing for state in self._states]
        )
        extended = torch.cat([past, x], 1)
        for state, rows in zip(self._states, extended[:, -count:], strict=True):
            state.rows[number : number + 1] = [rows.clone()]
        return extended


class _Snake:
    """x + sin(alpha * x) ** 2 / alpha, a periodic activation (arXiv 2006.08195)."""

    def __init__(self, take: Take, name: str) -> None:
        self._alpha = take(f"{name}.alpha").flatten().clone()
        self._inverse = (self._alpha + 1e-9).reciprocal()

    def __call__(self, x: Tensor) -> Tensor:
        wave = (x * self._alpha).sin_()
        return torch.addcmul(x, wave.mul_(wave), self._inverse)


class _Depthwise:
    """A causal convolution of seven taps within each channel."""

    def __init__(self, take: Take, name: str, dilation: int = 1) -> None:
        weight, self._bias = _folded(take, name)
        self._weight = weight[:, :, None]
        self._dilation = dilation
        self._pad = (weight.shape[2] - 1) * dilation

    def __call__(self, x: Tensor, past: _Past) -> Tensor:
        # As an image one pixel high, whose channels lie side by side: torch's quickest form.
        image = past.before(x, self._pad).transpose(1, 2)[:, :, None]
        result = functional.conv2d(
            image,
            self._weight,
            self._bias,
            dilation=(1, self._dilation),
            groups=self._weight.shape[0],
        )
        return result[:, :, 0].transpose(1, 2)


class _Windows:
    """A causal convolution over all channels, as one product with each window of rows."""

    def __init__(self, take: Take, name: str, *, stride: int, pad: int) -> None:
        weight, bias = _folded(take, name)
        self._size = weight.shape[2]
        self._linear = linear(weight.flatten(1), bias)
        self._stride = stride
        self._pad = pad

    def __call__(self, x: Tensor, past: _Past) -> Tensor:
        windows = past.before(x, self._pad).unfold(1, self._size, self._stride)
        return self._linear(windows.flatten(2))


class _ToMono:
    """A causal convolution of all channels to one."""

    def __init__(self, take: Take, name: str) -> None:
        weight, bias = _folded(take, name)
        self._taps = weight.shape[2]
        self._linear = linear(weight[0].T.contiguous())
        self._bias = bias

    def __call__(self, x: Tensor, past: _Past) -> Tensor:
        # Each tap's product with every row, and then a sum over the rows that the taps lie on.
        products = self._linear(past.before(x, self._taps - 1))
        length = x.shape[1]
        total = products[:, :length, 0] + self._bias
        for tap in range(1, self._taps):
            total += products[:, tap : tap + length, tap]
        return total


class _ResidualUnit:
    def __init__(self, take: Take, name: str, dilation: int) -> None:
        self._before = _Snake(take, f"{name}.block.0")
        self._along_time = _Depthwise(take, f"{name}.block.1", dilation)
        self._between = _Snake(take, f"{name}.block.2")
        self._across = _pointwise(take, f"{name}.block.3")

    def __call__(self, x: Tensor, past: _Past) -> Tensor:
        y = self._between(self._along_time(self._before(x), past))
        return self._across(y, residual=x)


class _Upsampling:
    """A transposed convolution of twice the stride's length, and residual units."""

    def __init__(self, take: Take, name: str, stride: int) -> None:
        self._snake = _Snake(take, f"{name}.block.0")
        weight, bias = _folded(take, f"{name}.block.1")
        self._channels = weight.shape[1]
        # Output j of a frame takes tap j of its own row and tap stride + j of the row before.
        now, before = weight[..., :stride], weight[..., stride:]
        product = torch.cat([before, now]).permute(2, 1, 0).flatten(0, 1)
        self._linear = linear(product.contiguous(), bias.repeat(stride))
        self._units = [
            _ResidualUnit(take, f"{name}.block.{number}", dilation)
            for number, dilation in enumerate(_DILATIONS, 2)
        ]

    def __call__(self, x: Tensor, past: _Past) -> Tensor:
        extended = past.before(self._snake(x), 1)
        x = self._linear(torch.cat([extended[:, :-1], extended[:, 1:]], 2))
        x = x.view(x.shape[0], -1, self._channels)
        for unit in self._units:
            x = unit(x, past)
        return x


class _Downsampling:
    def __init__(self, take: Take, name: str, stride: int, *, pad: int) -> None:
        self._units = [
            _ResidualUnit(take, f"{name}.{number}", dilation)
            for number, dilation in enumerate(_DILATIONS)
        ]
        self._snake = _Snake(take, f"{name}.3")
        self._windows = _Windows(take, f"{name}.4", stride=stride, pad=pad)

    def __call__(self, x: Tensor, past: _Past) -> Tensor:
        for unit in self._units:
            x = unit(x, past)
        return self._windows(self._snake(x), past)


class _Condition:
    """What the second generation does to tell the decoder the output rate: always the same."""

    def __init__(self, scale: Tensor, bias: Tensor) -> None:
        self._scale, self._bias = scale.clone(), bias.clone()

    def __call__(self, x: Tensor) -> Tensor:
        return torch.addcmul(self._bias, x, self._scale)


def _condition(config: Any, take: Take, name: str) -> _Condition | None:
    boundaries = getattr(config, "sr_bin_boundaries", None)
    if not boundaries:
        return None
    if not config.cond_type.startswith("scale_bias") or config.cond_out_layer:
        raise BackendLoadError("this server cannot run its kind of audio autoencoder")
    number = int(torch.bucketize(config.out_sample_rate, torch.tensor(boundaries)))
    scale, bias = (take(f"{name}.{part}_embed.weight")[number] for part in ("scale", "bias"))
    return _Condition(scale, bias)


def _pointwise(take: Take, name: str) -> Linear:
    weight, bias = _folded(take, name)
    return linear(weight[:, :, 0], bias)


def _folded(take: Take, name: str) -> tuple[Tensor, Tensor]:
    """The weight of a convolution with its norm multiplied in, and its bias."""
    weight = torch._weight_norm(take(f"{name}.weight_v"), take(f"{name}.weight_g"), 0)
    return weight, take(f"{name}.bias")
