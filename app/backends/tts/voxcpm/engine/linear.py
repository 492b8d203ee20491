"""Matrix products with weights prepared once: prepacked for the CPU, int8, or as torch has them.

What a row gives must not depend on the rows beside it, or a request would sound different in
company. oneDNN chooses its kernel, and with it the order of its sums, by the number of rows. Up to
`_SAME_KERNEL_ROWS` rows bfloat16 gives the same bits (found by trial on CPUs with AMX; the tests
hold it), and float32 does from two rows on. So larger batches are cut, and a lone row is doubled.
"""

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

_SAME_KERNEL_ROWS = 32
# More rows than this are a prompt being read: unpacking int8 weights then costs less than int8's
# kernel, which reads them again for every four rows.
_MANY_ROWS = 32


def rows_at_once(dtype: torch.dtype) -> int:
    """How many rows may be computed together without a row's result depending on their number."""
    return _SAME_KERNEL_ROWS if dtype == torch.bfloat16 else 1 << 20


class Linear(Protocol):
    """x @ weight.T + bias (+ residual), over the last dimension.

    `alone` says that all rows belong to one request and come in the same number every time, so
    that they need not be cut.
    """

    def __call__(
        self, x: Tensor, *, residual: Tensor | None = None, alone: bool = False
    ) -> Tensor: ...


def linear(weight: Tensor, bias: Tensor | None = None, *, quantize: bool = False) -> Linear:
    """Prepare `weight` (N, K) and `bias` (N) for where they live; the result holds copies."""
    if quantize:
        return _Int8Linear(weight, bias)
    onednn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if weight.device.type == "cpu" and onednn:
        return _PackedLinear(weight, bias)
    return _PlainLinear(weight, bias)


class _PlainLinear:
    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight = weight.clone()
        self._bias = None if bias is None else bias.clone()

    def __call__(
        self,
        x: Tensor,
        *,
        residual: Tensor | None = None,
        alone: bool = False,  # noqa: ARG002 - makes no difference here
    ) -> Tensor:
        product = functional.linear(x, self._weight, self._bias)
        return product if residual is None else product + residual


class _PackedLinear:
    """Weights in the layout that oneDNN's kernels read, so that no call has to reorder them."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._size = weight.shape[0]
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 16)
        self._bias = None if bias is None else bias.clone()
        self._rows = rows_at_once(weight.dtype)

    def __call__(self, x: Tensor, *, residual: Tensor | None = None, alone: bool = False) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        others = None if residual is None else residual.reshape(-1, self._size)
        product = self._product(rows, others, alone=alone)
        return product.view(*x.shape[:-1], self._size)

    def _product(self, rows: Tensor, others: Tensor | None, *, alone: bool) -> Tensor:
        count = rows.shape[0]
        if count > self._rows and not alone:
            cuts = torch.split(rows, self._rows)
            if others is None:
                return torch.cat([self._kernel(one, None) for one in cuts])
            pairs = zip(cuts, torch.split(others, self._rows), strict=True)
            return torch.cat([self._kernel(one, other) for one, other in pairs])
        if count == 1 and rows.dtype == torch.float32:
            twice = None if others is None else others.expand(2, -1)
            return self._kernel(rows.expand(2, -1), twice)[:1]
        return self._kernel(rows, others)

    def _kernel(self, rows: Tensor, others: Tensor | None) -> Tensor:
        if others is None:
            product: Tensor = torch.ops.mkldnn._linear_pointwise(
                rows, self._weight, self._bias, "none", [], ""
            )
            return product
        fused: Tensor = torch.ops.mkldnn._linear_pointwise.binary(
            rows, others, self._weight, self._bias, "add"
        )
        return fused


class _Int8Linear:
    """Weights as int8 with a scale for each output: half the bytes to read, rounding errors."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        scale = weight.float().abs().amax(1).clamp_min(1e-8) / 127
        self._weight = (weight.float() / scale[:, None]).round().to(torch.int8)
        self._scale = scale.to(weight.dtype)
        self._bias = None if bias is None else bias.clone()

    def __call__(
        self,
        x: Tensor,
        *,
        residual: Tensor | None = None,
        alone: bool = False,  # noqa: ARG002 - makes no difference here
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if rows.shape[0] > _MANY_ROWS:
            product = functional.linear(rows, self._weight.to(x.dtype)) * self._scale
        else:
            product = torch._weight_int8pack_mm(rows.contiguous(), self._weight, self._scale)
        if self._bias is not None:
            product = product + self._bias
        product = product.view(*x.shape[:-1], -1)
        return product if residual is None else product + residual
