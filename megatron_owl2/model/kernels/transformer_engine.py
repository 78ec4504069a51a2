"""Transformer Engine's kernels: linears in bf16 or FP8, fused attention, context parallelism."""

import copy
import os
from contextlib import nullcontext

import torch
import transformer_engine.pytorch as te  # pyright: ignore[reportMissingImports]
from megatron.core.extensions.transformer_engine import (
    TEColumnParallelLinear,
    TEDotProductAttention,
    TERowParallelLinear,
)
from megatron.core.fp8_utils import get_fp8_context
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from megatron_owl2.mcore.linear import LinearSpec, normal_init
from megatron_owl2.mcore.packed_sequences import PackedSequences
from megatron_owl2.mcore.parallel import ParallelContext
from megatron_owl2.model.attention import AttentionMask


class TransformerEngineKernels:
    """Transformer Engine through megatron-core's wrappers (extensions/transformer_engine.py)."""

    def __init__(self, context: ParallelContext):
        # Where neither cuDNN nor flash-attention can help, the last resort would write out all
        # scores and be slow without a word; without it the first step ends with an error.
        os.environ.setdefault("NVTE_UNFUSED_ATTN", "0")
        self._config = context.transformer
        self.ColumnLinear = ColumnLinear
        self.RowLinear = RowLinear
        recipe = context.fp8_recipe
        self.gemm_row_alignment = recipe.gemm_row_alignment if recipe else 1

    def attention(self, context: ParallelContext, number: int) -> nn.Module:
        return Attention(context, number)

    def fp8_context(self):
        """Delayed scaling gathers its maxima when the outermost FP8 context is left.

        Checkpoints are the same for all kernels and hold no maxima: after a resume, as in a new
        run, the first micro-batch is scaled by one.
        """
        delayed = self._config.fp8 and self._config.fp8_recipe == "delayed"
        return get_fp8_context(self._config) if delayed else nullcontext()

    def layer_fp8_context(self, number: int):
        """The other recipes scale by what a layer sees."""
        other = self._config.fp8 and self._config.fp8_recipe != "delayed"
        return get_fp8_context(self._config, number) if other else nullcontext()

    def checkpoint(self, function, *inputs, use_reentrant=False):
        """function(*inputs) again in the backward pass, with the scales of the first time.

        Every layer that is computed again leaves an FP8 context of its own, so delayed scaling
        gathers the maxima of all layers with each, as in megatron-core (transformer_block.py).
        What that adds to the histories are zeros, which move no scale, but so the 1,024 maxima
        reach back 1,024 / (layers of the rank + 1) micro-batches.
        """
        return te.checkpoint(function, *inputs, use_reentrant=use_reentrant)


def _config(context: ParallelContext, spec: LinearSpec) -> TransformerConfig:
    """Settings that megatron-core's wrappers read. These GEMMs add weight gradients to the
    optimizer's buffers by themselves; only local linears need apex's kernel for it."""
    config = copy.copy(context.transformer if spec.sequence_parallel else context.replicated)
    config.gradient_accumulation_fusion = context.fuses_gradients
    # Values are drawn on the CPU; without any, weights are made on the GPU.
    config.use_cpu_initialization = config.perform_initialization
    if spec.user_buffer is None:
        config.tp_comm_overlap = False
    return config


class ColumnLinear(TEColumnParallelLinear):
    """`mcore.linear.ColumnLinear` by Transformer Engine."""

    def __init__(self, context: ParallelContext, spec: LinearSpec):
        super().__init__(
            spec.inputs,
            spec.outputs,
            config=_config(context, spec),
            init_method=normal_init(spec.init_std),
            gather_output=False,
            bias=spec.bias,
            skip_bias_add=False,
            is_expert=False,
            tp_comm_buffer_name=spec.user_buffer,
            tp_group=context.groups.tp,
            stride=spec.stride,
        )
        if spec.share_input:
            # ParallelContext.copy_to_tensor_parallel sums the gradients of all readers, once. The
            # weight is split and marked by now; from here on the mode decides on communication
            # alone (module/linear.py).
            self.parallel_mode = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)[0]


class RowLinear(TERowParallelLinear):
    """`mcore.linear.RowLinear` by Transformer Engine."""

    def __init__(self, context: ParallelContext, spec: LinearSpec):
        super().__init__(
            spec.inputs,
            spec.outputs,
            config=_config(context, spec),
            init_method=normal_init(spec.init_std),
            bias=spec.bias,
            input_is_parallel=True,
            skip_bias_add=False,
            is_expert=False,
            tp_comm_buffer_name=spec.user_buffer,
            tp_group=context.groups.tp,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)[0]


class Attention(TEDotProductAttention):
    """`local.Attention` by Transformer Engine: fused, and a ring under context parallelism."""

    def __init__(self, context: ParallelContext, number: int):
        super().__init__(
            context.transformer,
            layer_number=number + 1,
            attn_mask_type=AttnMaskType.causal,
            attention_type="self",
            cp_comm_type="p2p",
            pg_collection=context.groups,
        )

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: AttentionMask | None = None,
    ) -> torch.Tensor:
        if isinstance(mask, PackedSequences):
            return self._packed(query, key, value, mask)
        if mask is not None:
            raise ValueError("attention masks need kernels.backend=local")
        return super().forward(query, key, value, None, AttnMaskType.causal)

    def _packed(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        packed: PackedSequences,
    ) -> torch.Tensor:
        """Attention in the format thd: rows one after the other [b * s, heads, d]."""
        s, b = query.shape[:2]
        query, key, value = (
            x.transpose(0, 1).reshape(b * s, *x.shape[2:]) for x in (query, key, value)
        )
        mask, parameters = AttnMaskType.padding_causal, packed.parameters()
        mixed = super().forward(query, key, value, None, mask, packed_seq_params=parameters)
        return mixed.view(b, s, -1).transpose(0, 1).contiguous()
