"""Gradient buffers, distributed AdamW and learning-rate schedule of megatron-core."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import (
    ChainedOptimizer,
    OptimizerConfig,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_owl2.config.schema import RunConfig
from megatron_owl2.mcore import gradients
from megatron_owl2.model.owl2 import Owl2
from megatron_owl2.training.checkpoint import optimizer_state


def wrap_ddp(chunks: Sequence[Owl2], *, overlap: bool) -> list[DistributedDataParallel]:
    """Put the trained parameters' gradients into contiguous fp32 buffers, reduced over data ranks.

    With `overlap` the reduction runs beside the backward pass of the last micro-batch, and updated
    parameters are gathered while the next forward pass runs. Parameters must have been frozen
    before; call once per process.
    """
    transformer = chunks[0].context.transformer
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=overlap,
        overlap_param_gather=overlap,
        use_distributed_optimizer=True,
    )
    wrapped = [
        # The gradients of all chunks but the first are reduced early enough in one piece each.
        DistributedDataParallel(transformer, settings, chunk, disable_bucketing=number > 0)
        for number, chunk in enumerate(chunks)
    ]
    transformer.finalize_model_grads_func = partial(gradients.finalize, chunks[0].context.groups)
    no_sync = [chunk.no_sync for chunk in wrapped]
    # A list where there are several chunks, which the annotation does not know.
    transformer.no_sync_func = no_sync if len(wrapped) > 1 else no_sync[0]  # pyright: ignore[reportAttributeAccessIssue]
    return wrapped


def sync_params(wrapped: Sequence[DistributedDataParallel]) -> None:
    """Wait until the updated parameters of all data-parallel ranks have been gathered; all ranks
    call it before parameters are read outside of a forward pass."""
    for chunk in wrapped:
        if chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)


def build_optimizer(
    config: RunConfig, wrapped: Sequence[DistributedDataParallel]
) -> tuple[ChainedOptimizer, OptimizerParamScheduler]:
    """The optimizer over the trained parameters and its schedule, at step 0.

    Step n of the run uses the rate after n calls of `scheduler.step(1)`: `lr` is reached at
    warmup_steps, `min_lr` at the last step. Biases and one-dimensional weights do not decay.
    """
    optimizer_state.install()
    gradients.install_norm()
    chosen, bf16 = config.optimizer, config.train.precision == "bf16"
    settings = OptimizerConfig(
        optimizer="adam",
        lr=chosen.lr,
        min_lr=chosen.min_lr,
        weight_decay=chosen.weight_decay,
        adam_beta1=chosen.beta1,
        adam_beta2=chosen.beta2,
        adam_eps=chosen.eps,
        clip_grad=chosen.clip_grad,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=True,
        overlap_param_gather=config.parallel.overlap,
    )
    overrides = get_standard_config_overrides(settings)
    for factor in sorted({_rate_factor(p) for c in wrapped for p in c.parameters()} - {1.0}):
        # megatron-core reads max_lr and min_lr, but tells groups apart in checkpoints by lr_mult.
        override: Any = {  # the annotation of megatron-core lacks lr_mult
            "max_lr": chosen.lr * factor,
            "min_lr": chosen.min_lr * factor,
            "lr_mult": factor,
        }
        overrides[_parameters_with_factor(factor)] = override
    optimizer = get_megatron_optimizer(settings, list(wrapped), config_overrides=overrides)
    assert isinstance(optimizer, ChainedOptimizer)
    wrapped[0].config.grad_scale_func = optimizer.scale_loss
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=chosen.lr,
        min_lr=chosen.min_lr,
        lr_warmup_steps=chosen.warmup_steps,
        lr_decay_steps=config.train.steps,
        lr_decay_style="cosine",
        start_wd=chosen.weight_decay,
        end_wd=chosen.weight_decay,
        wd_incr_steps=config.train.steps,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,  # a resumed run follows its configuration
    )
    return optimizer, scheduler


def _parameters_with_factor(factor: float) -> ParamKey:
    return ParamKey(
        predicate=ParamPredicate(f"rate x {factor}", lambda p: _rate_factor(p) == factor)
    )


def _rate_factor(parameter: torch.nn.Parameter) -> float:
    """The factor that `parameter_groups.freeze` has put on the parameter."""
    return vars(parameter)["rate_factor"]
