"""Gradients of a step: megatron-core's reduction and norm, without the host waiting for the device.

megatron-core asks the device whether there were targets, and without the kernels of Transformer
Engine or apex for every single norm (distributed/finalize_model_grads.py, utils.py).
"""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.optimizer import clip_grads
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import local_multi_tensor_l2_norm


def finalize(
    groups: ProcessGroupCollection,
    chunks: Sequence[DistributedDataParallel],
    targets: torch.Tensor,
    **options: Any,
) -> None:
    """The reduction over all ranks, then the division by the number of targets of all of them.

    `targets` int [] is that of this rank's micro-batches, on the last pipeline rank. For the
    schedules of megatron-core (`finalize_model_grads_func`), whose `options` it passes on.
    """
    finalize_model_grads(list(chunks), None, **options)
    torch.distributed.broadcast(targets, group_src=groups.pp.size() - 1, group=groups.pp)
    torch.distributed.all_reduce(targets, group=groups.dp_cp)
    factor = 1.0 / targets.clamp(min=1)  # without any target all gradients are zero
    for chunk in chunks:
        # A number by the annotation; the buffers are multiplied by it, wherever it is.
        chunk.scale_gradients(factor)  # pyright: ignore[reportArgumentType]


def install_norm() -> None:
    """Put `_norm` in place of megatron-core's own way, where no better kernel is found."""
    if clip_grads.l2_norm_impl is local_multi_tensor_l2_norm:
        clip_grads.l2_norm_impl = _norm


def _norm(chunk_size, overflow, tensor_lists, per_tensor, *_):
    """The norm of all tensors, fp32 [1], as apex's multi_tensor_l2norm returns it."""
    tensors = [tensor for tensors in tensor_lists for tensor in tensors]
    norms = torch._foreach_norm(tensors)  # pyright: ignore[reportPrivateImportUsage]
    return torch.stack(norms).norm().float().view(1), None
