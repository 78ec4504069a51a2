"""Whole tensors to a tensor-parallel rank's share of a parameter, and back."""

import torch

from megatron_owl2.mcore.parallel import ParallelContext


def share(
    whole: torch.Tensor, parameter: torch.nn.Parameter, context: ParallelContext
) -> torch.Tensor:
    """This rank's part of the whole parameter, as megatron-core's attributes on it say.

    With partition_stride 2 (gate and up) each half is split over the ranks by itself.
    """
    if not getattr(parameter, "tensor_model_parallel", False):
        return whole
    dim, rank = parameter.partition_dim, context.groups.tp.rank()
    blocks = whole.unflatten(dim, (parameter.partition_stride, context.tensor_parallel_size, -1))
    return blocks.select(dim + 1, rank).flatten(dim, dim + 1)


def gather(
    part: torch.Tensor, parameter: torch.nn.Parameter, context: ParallelContext
) -> torch.Tensor:
    """Inverse of `share` for a tensor shaped like the parameter; on all tensor-parallel ranks."""
    if context.tensor_parallel_size == 1 or not getattr(parameter, "tensor_model_parallel", False):
        return part
    part = part.contiguous()
    parts = [torch.empty_like(part) for _ in range(context.tensor_parallel_size)]
    torch.distributed.all_gather(parts, part, group=context.groups.tp)
    dim, stride = parameter.partition_dim, parameter.partition_stride
    blocks = [p.unflatten(dim, (stride, -1)) for p in parts]
    return torch.stack(blocks, dim=dim + 1).flatten(dim, dim + 2)
