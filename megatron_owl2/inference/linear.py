"""Linears of a model that only answers: no gradients, no communication but the sum of row linears.

On a CPU their weights, which are kept once, lie in the memory as they are read fastest: large ones
packed for oneDNN, small ones column by column.
"""

import torch
from torch import nn
from torch.nn import functional as F

from megatron_owl2.mcore.linear import ColumnLinear, RowLinear
from megatron_owl2.mcore.parallel import ParallelContext

# Below this number of elements a call costs more than packing saves: measured on one core with
# AVX-512, 128 x 344 with one row takes 6 us, packed 18; 2304 x 768 with 8 rows 473 us, packed 300.
_SMALLEST_PACKED = 2**18
_PACKED_FOR_ROWS = 8  # oneDNN chooses the order of a weight for so many rows
_FEWEST_ROWS = 4  # with fewer it takes another kernel, which is slower than with so many


class InferenceLinear(nn.Module):
    """y = x W^T + b on this rank's share of a linear; row linears are summed over the ranks."""

    def __init__(self, linear: ColumnLinear | RowLinear, context: ParallelContext):
        super().__init__()
        weight = linear.weight
        assert weight is not None, "these linears have weights of their own"
        self.weight = _packed(weight.detach())
        self._few_rows = torch.zeros(_FEWEST_ROWS, weight.shape[1], dtype=weight.dtype)
        self.bias = None if linear.bias is None else linear.bias.detach()
        self.adds_bias = not linear.skip_bias_add  # else who reads the output adds it
        ranks = context.tensor_parallel_size
        self.group = context.groups.tp if isinstance(linear, RowLinear) and ranks > 1 else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = self.bias if self.adds_bias and self.group is None else None
        if self.weight.is_mkldnn:
            y = self._packed_product(x, bias)
        else:
            y = F.linear(x, self.weight, bias)
        if self.group is not None:
            torch.distributed.all_reduce(y, group=self.group)
            y = y + self.bias if self.adds_bias and self.bias is not None else y
        return y

    def _packed_product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        rows = x.numel() // x.shape[-1]
        enough = x
        if rows < _FEWEST_ROWS:
            enough = self._few_rows
            enough[:rows] = x.view(rows, -1)
        y = torch.ops.mkldnn._linear_pointwise(enough, self.weight, bias, "none", [], "")
        return y if enough is x else y[:rows].view(*x.shape[:-1], -1)


def _packed(weight: torch.Tensor) -> torch.Tensor:
    """A weight [out, in] in the order in which a CPU reads it fastest."""
    if weight.device.type != "cpu":
        return weight
    if weight.numel() < _SMALLEST_PACKED or not _packs(weight.dtype):
        return weight.t().contiguous().t()
    return torch.ops.mkldnn._reorder_linear_weight(weight, _PACKED_FOR_ROWS)


def _packs(dtype: torch.dtype) -> bool:
    """Whether oneDNN is there and computes in this type on this processor."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float32
