"""Visual abstractor (paper, section 3.1): learnable queries that read the ViT's tokens.

With visual features I and queries V^i, layer i computes

    C^i     = Attn(V^i, [I; V^i], [I; V^i])
    V^(i+1) = SwiGLU(C^i W_1) W_2                                                   (eq. 2)

The released code adds to it: norms of queries and image, positions on queries and keys, both
residuals, a third weight in the SwiGLU, w2(ffn_ln(silu(w1 n) * w3 n)), and a norm inside. That of
version 1 has no positions, and drops attention probabilities in training.
"""

from functools import partial

import torch
from torch import nn

from megatron_owl2.config.schema import ModelConfig
from megatron_owl2.mcore.linear import ColumnLinear, LinearSpec, RowLinear
from megatron_owl2.mcore.parallel import ParallelContext, mark_tensor_parallel
from megatron_owl2.model.attention import attend, attend_dropping
from megatron_owl2.model.dropout import keep_probabilities
from megatron_owl2.model.kernels.plain import swiglu
from megatron_owl2.model.layer_stack import ActivationCheckpoint, LayerStack
from megatron_owl2.model.position_tables import image_positions, query_positions

OUTER_NORM_EPS = 1e-5  # of norm1, normk and norm2 in the released code, whatever its config says


class Abstractor(nn.Module):
    """ViT features [t, n, h] to visual tokens [n, queries + 1, decoder width], vit_eos last.

    With `model.vision.temporal`, videos of `frames` features one after the other, [t, videos *
    frames, h], become the visual tokens of one image each: temporal queries read beside the others,
    and the two projections are added (mPLUG-Owl's video variant, not in its paper).
    """

    def __init__(self, context: ParallelContext, model: ModelConfig):
        super().__init__()
        config, size, dtype = model.abstractor, model.vision.hidden_size, context.dtype
        width = model.decoder.hidden_size
        self.query_embeds = nn.Parameter(torch.randn(1, config.num_queries, size, dtype=dtype))
        self.vit_eos = nn.Parameter(torch.randn(1, 1, width, dtype=dtype) * model.init_std)
        self.layers = LayerStack(
            context, lambda number: AbstractorLayer(context, model, number), 0, config.num_layers
        )
        self.visual_fc = nn.Linear(size, width, dtype=dtype)
        self.positions = config.positions
        self.query_positions: torch.Tensor
        self.image_positions: torch.Tensor
        if self.positions == "sincos":
            # In fp32 whatever the model computes in, as the released model stores them.
            self.register_buffer("query_positions", query_positions(config.num_queries, size))
            self.register_buffer("image_positions", image_positions(model.vision.grid_size, size))
        if model.vision.temporal:
            self.temporal_query_embeds = nn.Parameter(torch.randn_like(self.query_embeds))
            self.temporal_fc = nn.Linear(size, width, dtype=dtype)

    def forward(
        self, features: torch.Tensor, frames: int = 1, image_keys: torch.Tensor | None = None
    ) -> torch.Tensor:
        """image_keys int32 [n] are what attention dropout follows (`dropout.image_keys`); without
        them there is none."""
        queries, positions = self.query_embeds, None
        if frames > 1:
            features = features.unflatten(1, (-1, frames)).transpose(1, 2).flatten(0, 1)
            queries = torch.cat([queries, self.temporal_query_embeds], dim=1)
        queries = queries.transpose(0, 1).expand(-1, features.shape[1], -1)
        if self.positions == "sincos":
            # [queries + t, 1, h], the queries' own first, as the keys are ordered.
            positions = torch.cat([self.query_positions, self.image_positions]).to(features.dtype)
            positions = positions.unsqueeze(1)
        for layer in self.layers:
            queries = self.layers(layer, queries, features, positions, image_keys)
        spatial, *temporal = queries.split(self.query_embeds.shape[1])
        tokens = self.visual_fc(spatial)
        for part in temporal:
            tokens = tokens + self.temporal_fc(part)
        tokens = tokens.transpose(0, 1)
        return torch.cat([tokens, self.vit_eos.expand(len(tokens), -1, -1)], dim=1)


class AbstractorLayer(nn.Module):
    """Cross-attention of queries [q, n, h] over themselves and the image, then a gated MLP
    (eq. 2).

    The residual of the attention starts from the normed queries; positions are added to queries
    and keys after the norms, never to values (official behaviour, not visible in the paper).
    """

    def __init__(self, context: ParallelContext, model: ModelConfig, number: int):
        super().__init__()
        config, size = model.abstractor, model.vision.hidden_size
        self.dropout, self.name = config.attention_dropout, f"abstractor.{number}"
        self.first_head = (
            config.num_heads // context.tensor_parallel_size * context.groups.tp.rank()
        )
        self.head_size = size // config.num_heads
        self.activation_checkpoint = ActivationCheckpoint(context, "selective")
        narrow, wide = model.init_std, config.attention_init_std

        def spec(inputs: int, outputs: int, init_std: float) -> LinearSpec:
            return LinearSpec(inputs=inputs, outputs=outputs, bias=True, init_std=init_std)

        self.norm1 = nn.LayerNorm(size, OUTER_NORM_EPS, dtype=context.dtype)
        self.normk = nn.LayerNorm(size, OUTER_NORM_EPS, dtype=context.dtype)
        self.query = ColumnLinear(context, spec(size, size, wide))
        self.key = ColumnLinear(context, spec(size, size, wide))
        self.value = ColumnLinear(context, spec(size, size, narrow))
        self.out_proj = RowLinear(context, spec(size, size, narrow))
        self.norm2 = nn.LayerNorm(size, OUTER_NORM_EPS, dtype=context.dtype)
        self.w1 = ColumnLinear(context, spec(size, config.ffn_size, narrow))
        self.w3 = ColumnLinear(context, spec(size, config.ffn_size, narrow))
        self.ffn_ln = SplitLayerNorm(context, config.ffn_size, config.norm_eps)
        self.w2 = RowLinear(context, spec(config.ffn_size, size, narrow))

    def forward(
        self,
        queries: torch.Tensor,
        features: torch.Tensor,
        positions: torch.Tensor | None,
        image_keys: torch.Tensor | None,
    ) -> torch.Tensor:
        normed = self.norm1(queries)
        attended_to = torch.cat([normed, self.normk(features)])  # queries first, then the image
        asking, placed = normed, attended_to
        if positions is not None:
            asking, placed = normed + positions[: len(queries)], attended_to + positions
        query, key, value = self.query(asking), self.key(placed), self.value(attended_to)
        heads = (-1, self.head_size)
        attended = self.activation_checkpoint(
            self._attend, *(x.unflatten(-1, heads) for x in (query, key, value)), image_keys
        )
        x = normed + self.out_proj(attended)
        normed = self.norm2(x)
        gated = self.activation_checkpoint(swiglu, self.w1(normed), self.w3(normed))
        return x + self.w2(self.ffn_ln(gated))

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        image_keys: torch.Tensor | None,
    ) -> torch.Tensor:
        if image_keys is None:
            return attend(query, key, value)
        keep = partial(
            keep_probabilities,
            image_keys,
            first_head=self.first_head,
            name=self.name,
            dropout=self.dropout,
        )
        return attend_dropping(query, key, value, keep, self.dropout)


class SplitLayerNorm(nn.Module):
    """LayerNorm over a last dimension of `size` that is split over the tensor-parallel ranks."""

    def __init__(self, context: ParallelContext, size: int, eps: float):
        super().__init__()
        self.context, self.size, self.eps = context, size, eps
        local = size // context.tensor_parallel_size
        self.weight = nn.Parameter(torch.ones(local, dtype=context.dtype))
        self.bias = nn.Parameter(torch.zeros(local, dtype=context.dtype))
        for parameter in (self.weight, self.bias):
            mark_tensor_parallel(parameter, dim=0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        mean = self.context.sum_over_tensor_ranks(wide.sum(-1, keepdim=True)) / self.size
        centred = wide - mean
        variance = self.context.sum_over_tensor_ranks(centred.square().sum(-1, keepdim=True))
        normed = centred * torch.rsqrt(variance / self.size + self.eps)
        return (normed * self.weight + self.bias).to(x.dtype)
