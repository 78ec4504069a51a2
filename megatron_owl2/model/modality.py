"""Modality-Adaptive Module (paper, section 3.2): layer norms, keys and values per modality.

Each token is either vision or text. The norms and the key and value projections have weights per
modality, as far as `model.decoder.modality_split` says so; everything else is shared. With
phi(X, M, m) = X where the modality indicator M is m, else 0, the paper computes

    H~  = LN_V(phi(H, M, 0)) + LN_T(phi(H, M, 1))                                   (eq. 4)
    H_Q = H~ W_Q
    H_K = phi(H~, M, 0) W_K0 + phi(H~, M, 1) W_K1
    H_V = phi(H~, M, 0) W_V0 + phi(H~, M, 1) W_V1                                   (eq. 5)

ModalityNorm is eq. 4, ModalityQKV eq. 5. The paper's equations mark vision with 0; the released
code marks it with 1, text and padding with 0, and so does this one.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from megatron_owl2.config.schema import DecoderConfig
from megatron_owl2.mcore.linear import LinearSpec
from megatron_owl2.mcore.parallel import ParallelContext
from megatron_owl2.model.kernels import Kernels
from megatron_owl2.model.kernels.elementwise import Rotary, build_elementwise
from megatron_owl2.model.lora import Adapters


@dataclass(frozen=True)
class Modality:
    """Modality indicator M of one micro-batch; an argument of every layer, never a state.

    With several micro-batches in flight and recomputation, a remembered indicator would be the
    wrong one in the backward pass.
    is_vision: bool [s, b, 1], or [s/tp, b, 1] of this rank under sequence parallelism.
    vision_token_index: int64 [n], the vision rows of the hidden states flattened to [s * b, h].
    token_keys: int32 [s, b, 1] for the dropout of adapters (`lora.token_keys`); None: no dropout.
    Under context parallelism s is this rank's share of the sequence.
    """

    is_vision: torch.Tensor
    vision_token_index: torch.Tensor
    token_keys: torch.Tensor | None = None

    @classmethod
    def of(
        cls,
        modality: torch.Tensor,
        vision_token_index: torch.Tensor,
        context: ParallelContext,
        token_keys: torch.Tensor | None = None,
    ) -> "Modality":
        """From a batch's `modality` [b, s] and `vision_token_index` [n]."""
        is_vision = modality.bool().t().contiguous().unsqueeze(-1)
        return cls(context.sequence_slice(is_vision), vision_token_index, token_keys)


class ModalityNorm(nn.Module):
    """RMSNorm with one weight [h] per modality (eq. 4): x / rms(x) * (g_V where M else g_T).

    The token is normalised once and scaled by the weight of its own modality, which is eq. 4: the
    norm of a zeroed row is zero.

    Without `split` the text weight serves all tokens. Statistics in fp32, cast back before the
    scale, as LLaMA does.
    """

    def __init__(self, context: ParallelContext, hidden_size: int, eps: float, *, split: bool):
        super().__init__()
        self.elementwise = build_elementwise(context)
        self.eps = eps
        self.weight_text = nn.Parameter(torch.ones(hidden_size, dtype=context.dtype))
        self.weight_vision = nn.Parameter(torch.ones_like(self.weight_text)) if split else None
        context.mark_sequence_parallel(*self.parameters())

    def forward(self, x: torch.Tensor, modality: Modality) -> torch.Tensor:
        return self.elementwise.modality_norm(
            x, modality.is_vision, self.eps, self.weight_text, self.weight_vision
        )


class ModalityQKV(nn.Module):
    """Shared query, modality-split key and value (eq. 5): H~ [s/tp, b, h] to q, k, v.

    W_Q, W_K1 and W_V1 (text) are `linear_qkv`, W_K0 and W_V0 (vision) are `linear_kv_vision`.

    Queries of all tokens and text keys and values come from one GEMM over all rows; the vision
    projection runs on the vision rows only and replaces theirs. So every weight takes part in
    every backward pass, shapes follow from the batch alone, and nothing waits for the device.

    Rows of `linear_qkv` are grouped by key/value head: the queries that share it, its key, its
    value; rows of `linear_kv_vision`: its key, its value. A split over ranks is a split by groups.
    Without "key_value" in `modality_split` there is no `linear_kv_vision`. Adapters (`stage.lora`)
    are those of decoder layer `number`.
    """

    def __init__(
        self,
        context: ParallelContext,
        kernels: Kernels,
        config: DecoderConfig,
        init_std: float,
        number: int,
    ):
        super().__init__()
        self.context = context
        self.elementwise = build_elementwise(context)
        self.gemm_row_alignment = kernels.gemm_row_alignment
        self.head_size = config.hidden_size // config.num_heads
        self.groups = config.num_kv_heads // context.tensor_parallel_size
        kv_size = config.num_kv_heads * self.head_size
        size = config.hidden_size
        options = {"inputs": size, "init_std": init_std, "share_input": True}
        qkv = LinearSpec(outputs=size + 2 * kv_size, **options)
        self.linear_qkv = kernels.ColumnLinear(context, qkv)
        self.linear_kv_vision = (
            kernels.ColumnLinear(context, LinearSpec(outputs=2 * kv_size, **options))
            if "key_value" in config.modality_split
            else None
        )
        linears = {"query": size, "key_text": kv_size, "value_text": kv_size}
        if self.linear_kv_vision is not None:
            linears |= {"key_vision": kv_size, "value_vision": kv_size}
        self.adapters = Adapters(
            context,
            f"decoder.layers.{number}.attention",
            {piece: (size, outputs, "outputs") for piece, outputs in linears.items()},
        )

    def forward(
        self, x: torch.Tensor, modality: Modality, rotary: Rotary
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns q [s, b, heads/tp, d] and k, v [s, b, kv_heads/tp, d], q and k turned by the
        `rotary` tables (`decoder.rotary_tables`)."""
        low_rank = self.adapters.column_inputs(x, modality.token_keys, *self.adapters)
        x = self.context.copy_to_tensor_parallel(x)
        s, b, _ = x.shape
        qkv = self.linear_qkv(x).view(s * b, self.groups, -1, self.head_size)
        sizes = {"query": qkv.shape[2] - 2, "key_text": 1, "value_text": 1}
        qkv = self.adapters.add_columns(qkv, low_rank, sizes)
        rows = modality.vision_token_index
        kv_vision = None
        if self.linear_kv_vision is not None:
            kv_vision = self._project_vision(
                self.linear_kv_vision, x.flatten(0, 1).index_select(0, rows)
            )
            sizes = {"key_vision": 1, "value_vision": 1}
            low_rank = {
                p: low_rank[p].flatten(0, 1).index_select(0, rows) for p in low_rank if p in sizes
            }
            kv_vision = self.adapters.add_columns(kv_vision, low_rank, sizes)
        return self.elementwise.split_qkv(qkv, kv_vision, rows, rotary)

    def _project_vision(self, linear: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """Vision rows [n, h] to their keys and values [n, groups, 2, d].

        FP8 GEMMs take rows in multiples, and not every library a GEMM of no rows, as a micro-batch
        of text has; rows of zeros fill up and leave no gradient.
        """
        missing = -len(x) % self.gemm_row_alignment if len(x) else self.gemm_row_alignment
        padded = F.pad(x, (0, 0, 0, missing)) if missing else x
        projected = linear(padded)[: len(x)]
        return projected.view(len(x), self.groups, 2, self.head_size)
