"""Optimizer step: micro-batches through the pipeline schedule, gradients, clipping, update."""

import itertools
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_owl2.config.schema import RunConfig
from megatron_owl2.data.batch import Batch
from megatron_owl2.mcore import setup

SUMS = ("loss", "targets", "image_loss", "image_targets")  # added up over micro-batches and ranks


def forward_backward(
    config: RunConfig,
    chunks: Sequence[DistributedDataParallel],
    batches: Iterator[Batch],
    micro_batches: int,
) -> torch.Tensor:
    """Forward and backward passes of the micro-batches of one step.

    Leaves the gradients of the mean loss over all targets of the global batch in the buffers.
    Returns this rank's SUMS, fp64 [4] (zeros before the last pipeline stage).
    """
    return _run_schedule(config, chunks, batches, micro_batches, forward_only=False)


@torch.no_grad()
def evaluate(
    config: RunConfig,
    chunks: Sequence[DistributedDataParallel],
    batches: Iterator[Batch],
    micro_batches: int,
) -> torch.Tensor:
    """Forward passes of micro-batches; returns this rank's SUMS as `forward_backward` does."""
    return _run_schedule(config, chunks, batches, micro_batches, forward_only=True)


def _run_schedule(
    config: RunConfig,
    chunks: Sequence[DistributedDataParallel],
    batches: Iterator[Batch],
    micro_batches: int,
    *,
    forward_only: bool,
) -> torch.Tensor:
    first = next(batches)  # under pipeline parallelism all are as long, as the schedules ask
    batches = itertools.chain([first], batches)
    # Every chunk of a virtual pipeline asks for every micro-batch.
    iterators = list(itertools.tee(batches, len(chunks))) if len(chunks) > 1 else batches
    results = get_forward_backward_func()(
        forward_step_func=_forward,
        data_iterator=iterators,
        model=list(chunks),
        num_microbatches=micro_batches,
        seq_length=first.length,
        micro_batch_size=config.train.micro_batch_size,
        forward_only=forward_only,
    )
    sums = torch.zeros(len(SUMS), dtype=torch.float64, device=setup.device())
    for result in results:
        sums += result["sums"]
    return sums


def gradient_norm(optimizer: ChainedOptimizer) -> float:
    """The norm of all gradients, before the clipping; all ranks together.

    It is the one value of a step that the host waits for. `gradient_norm` and `update` are the
    halves of ChainedOptimizer.step (megatron-core, optimizer/optimizer.py), which always updates.
    """
    optimizer.prepare_grads()
    return float(optimizer.get_grad_norm())


def update(optimizer: ChainedOptimizer, norm: float) -> None:
    """Clipping of the gradients, whose norm is `norm`, and the update of the parameters."""
    for part in optimizer.chained_optimizers:
        if getattr(part, "is_stub_optimizer", False):  # nothing trains on this rank
            continue
        parameters: list[torch.Tensor] = [*part.get_parameters()]
        if parameters and part.config.clip_grad > 0.0:
            clip_grad_by_total_norm_fp32(parameters, part.config.clip_grad, norm)
    optimizer.step_with_ready_grads()


def _forward(batches: Iterator[Batch], model: DistributedDataParallel):
    batch = next(batches)
    output = model(
        batch.tokens,
        batch.image,
        batch.vision_token_index,
        batch.modality,
        batch.position_ids,
        batch.labels,
        batch.target_index,
        batch.local_vision_token_index,
        batch.sample_indices,
        batch.packed,
    )
    return output, partial(_summed_loss, batch)


def _summed_loss(batch: Batch, losses: torch.Tensor):
    """Sum of the losses [n] of target_index; megatron-core divides the gradients once by the global
    number of targets."""
    mask = batch.loss_mask.t().flatten().index_select(0, batch.target_index)
    masked = losses * mask
    with_image = batch.has_image.t().flatten().index_select(0, batch.target_index)
    targets = mask.sum()
    sums = torch.stack(
        [
            masked.sum(),
            targets,
            (masked * with_image).sum(),
            (mask * with_image).sum(),
        ]
    )
    return masked.sum(), targets.int(), {"sums": sums.detach().double()}
