"""One optimizer step: micro-batches through the pipeline schedule, gradients, update."""

from collections.abc import Iterator
from functools import partial

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_owl2.config import RunConfig
from megatron_owl2.data.batch import Batch

SUMS = ("loss", "targets", "image_loss", "image_targets")  # added up over micro-batches and ranks


def forward_backward(
    config: RunConfig,
    model: DistributedDataParallel,
    batches: Iterator[Batch],
    micro_batches: int,
    *,
    forward_only: bool = False,
) -> torch.Tensor:
    """Run the micro-batches of one step.

    Leaves the gradients of the mean loss over all targets of the global batch in the buffers.
    Returns this rank's SUMS, fp64 [4] (zeros before the last pipeline stage).
    """
    results = get_forward_backward_func()(
        forward_step_func=_forward,
        data_iterator=batches,
        model=[model],
        num_microbatches=micro_batches,
        seq_length=config.data.sequence_length,
        micro_batch_size=config.train.micro_batch_size,
        forward_only=forward_only,
    )
    sums = torch.zeros(len(SUMS), dtype=torch.float64, device=model.module.image_mean.device)
    for result in results:
        sums += result["sums"]
    return sums


def _forward(batches: Iterator[Batch], model: DistributedDataParallel):
    batch = next(batches)
    output = model(
        batch.tokens,
        batch.image,
        batch.vision_rows,
        batch.modality,
        batch.position_ids,
        batch.labels,
    )
    return output, partial(_summed_loss, batch)


def _summed_loss(batch: Batch, losses: torch.Tensor):
    """Sum over the targets; megatron-core divides the gradients once by the global number."""
    masked = losses * batch.loss_mask
    with_image = batch.modality.any(dim=1, keepdim=True)
    targets = batch.loss_mask.sum()
    sums = torch.stack(
        [
            masked.sum(),
            targets,
            (masked * with_image).sum(),
            (batch.loss_mask * with_image).sum(),
        ]
    )
    return masked.sum(), targets.int(), {"sums": sums.detach().double()}
