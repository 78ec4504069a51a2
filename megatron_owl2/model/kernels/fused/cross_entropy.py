"""Cross entropy over logits whose vocabulary is split over the tensor-parallel ranks.

Logits are read once in each pass, as they are; the gradient takes their place. Every rank finds
the logarithm of its share of the sum and the label's logit if it is its own, two numbers per row,
which the ranks exchange in one collective.
"""

from typing import Any

import torch
from torch.distributed import ProcessGroup
from torch.library import custom_op


@custom_op("megatron_owl2::cross_entropy", mutates_args=())
def cross_entropy(logits: torch.Tensor, labels: torch.Tensor, first: int) -> torch.Tensor:
    """fp32 [2, rows]: log(sum(exp(logits))) of every row of logits [rows, vocab], and the logit of
    its label, of which the first is `first`; zero where the label has none here."""
    from megatron_owl2.model.kernels.fused import cross_entropy_kernels

    found = logits.new_empty((2, len(logits)), dtype=torch.float32)
    cross_entropy_kernels.forward(logits, labels, found, first)
    return found


@cross_entropy.register_fake
def _(logits, labels, first):
    return logits.new_empty((2, len(logits)), dtype=torch.float32)


@custom_op("megatron_owl2::cross_entropy_backward", mutates_args=("logits",))
def cross_entropy_backward(
    grad: torch.Tensor,
    logits: torch.Tensor,
    labels: torch.Tensor,
    log_sum: torch.Tensor,
    first: int,
) -> None:
    """Replace logits [rows, vocab] by their gradient; grad and log_sum are fp32 [rows]."""
    from megatron_owl2.model.kernels.fused import cross_entropy_kernels

    cross_entropy_kernels.backward(grad, logits, labels, log_sum, first)


@cross_entropy_backward.register_fake
def _(grad, logits, labels, log_sum, first):
    return None


class CrossEntropy(torch.autograd.Function):
    """The loss fp32 [...] of labels [...] under logits [..., vocab/tp], with its gradient, which
    takes the place of the logits in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, labels: torch.Tensor, group: ProcessGroup
    ) -> torch.Tensor:
        rows, wanted = logits.flatten(0, -2).contiguous(), labels.flatten().contiguous()
        ctx.first = group.rank() * rows.shape[-1]
        found = cross_entropy(rows, wanted, ctx.first)
        if group.size() > 1:
            of_all = found.new_empty((group.size() * 2, found.shape[1]))
            torch.distributed.all_gather_into_tensor(of_all, found, group=group)
            log_sum, logit = torch.logsumexp(of_all[::2], 0), of_all[1::2].sum(0)
        else:
            log_sum, logit = found
        ctx.shape = logits.shape
        ctx.save_for_backward(rows, wanted, log_sum)
        return (log_sum - logit).view(labels.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, labels, log_sum = ctx.saved_tensors
        gradient = rows.detach()
        cross_entropy_backward(
            grads[0].flatten().contiguous(), gradient, labels, log_sum, ctx.first
        )
        return gradient.view(ctx.shape), None, None
