"""Linears of a model that only answers: no gradients, no communication but the sum of row linears.

On a CPU their weights lie in the memory as they are read fastest: packed for oneDNN, and small
ones, for few rows, also column by column.
"""

import torch
from torch import nn
from torch.nn import functional as F

from megatron_owl2.mcore.linear import ColumnLinear, RowLinear
from megatron_owl2.mcore.parallel import ParallelContext

# A call of oneDNN costs 10 us, more than a small weight takes with few rows: measured on one core
# with AVX-512, 688 x 128 with one row takes 5 us by columns and 12 packed, with 32 rows 57 and 32.
_SMALLEST_PACKED_ALONE = 2**18  # elements
_MANY_ROWS = 16
_PACKED_FOR_ROWS = 8  # oneDNN chooses the order of a weight for so many rows
_FEWEST_ROWS = 4  # with fewer it takes another kernel, which is slower than with so many


class InferenceLinear(nn.Module):
    """y = x W^T + b on this rank's share of a linear; row linears are summed over the ranks."""

    def __init__(self, linear: ColumnLinear | RowLinear, context: ParallelContext):
        super().__init__()
        assert linear.weight is not None, "these linears have weights of their own"
        weight = linear.weight.detach()
        self.packed, self.weight = None, None
        if _packs(weight):
            self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, _PACKED_FOR_ROWS)
        if self.packed is None or weight.numel() < _SMALLEST_PACKED_ALONE:
            self.weight = weight.t().contiguous().t() if weight.device.type == "cpu" else weight
        self._few_rows = torch.zeros(_FEWEST_ROWS, weight.shape[1], dtype=weight.dtype)
        self.bias = None if linear.bias is None else linear.bias.detach()
        self.adds_bias = not linear.skip_bias_add  # else who reads the output adds it
        ranks = context.tensor_parallel_size
        self.group = context.groups.tp if isinstance(linear, RowLinear) and ranks > 1 else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = self.bias if self.adds_bias and self.group is None else None
        rows = x.numel() // x.shape[-1]
        if self.weight is not None and (self.packed is None or rows < _MANY_ROWS):
            y = F.linear(x, self.weight, bias)
        else:
            y = self._packed_product(x, rows, bias)
        if self.group is not None:
            torch.distributed.all_reduce(y, group=self.group)
            y = y + self.bias if self.adds_bias and self.bias is not None else y
        return y

    def _packed_product(self, x: torch.Tensor, rows: int, bias: torch.Tensor | None):
        enough = x
        if rows < _FEWEST_ROWS:
            enough = self._few_rows
            enough[:rows] = x.view(rows, -1)
        y = torch.ops.mkldnn._linear_pointwise(enough, self.packed, bias, "none", [], "")
        return y if enough is x else y[:rows].view(*x.shape[:-1], -1)


def _packs(weight: torch.Tensor) -> bool:
    """Whether oneDNN is there for a weight and computes in its type on this processor."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float32
