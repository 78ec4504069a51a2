"""Tensor-parallel shards of whole parameters, and whole parameters of shards."""

from typing import Any

import torch

from megatron_owl2.mcore.parallel import ParallelContext


def shard(whole: torch.Tensor, parameter: torch.Tensor, context: ParallelContext) -> torch.Tensor:
    """This tensor-parallel rank's shard of `whole`, as megatron-core's attributes on the live
    `parameter` say.

    With a stride of 2 (gate and up) each half is split over the ranks by itself.
    """
    partition = _partition(parameter)
    if partition is None:
        return whole
    dim, stride = partition
    blocks = whole.unflatten(dim, (stride, context.tensor_parallel_size, -1))
    return blocks.select(dim + 1, context.groups.tp.rank()).flatten(dim, dim + 1)


def unshard(local: torch.Tensor, parameter: torch.Tensor, context: ParallelContext) -> torch.Tensor:
    """The whole tensor from the ranks' shards, each of the shape of `parameter`; the inverse of
    `shard`. Collective over the tensor-parallel ranks."""
    partition = _partition(parameter)
    if context.tensor_parallel_size == 1 or partition is None:
        return local
    dim, stride = partition
    local = local.contiguous()
    shards = [torch.empty_like(local) for _ in range(context.tensor_parallel_size)]
    torch.distributed.all_gather(shards, local, group=context.groups.tp)
    blocks = [each.unflatten(dim, (stride, -1)) for each in shards]
    return torch.stack(blocks, dim=dim + 1).flatten(dim, dim + 2)


def _partition(parameter: torch.Tensor) -> tuple[int, int] | None:
    """Dimension and stride of the split, or None if every rank has all of the parameter."""
    marked: Any = parameter  # megatron-core sets these attributes on it
    if not getattr(marked, "tensor_model_parallel", False):
        return None
    return marked.partition_dim, marked.partition_stride
