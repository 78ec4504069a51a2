"""The LLaMA decoder of mPLUG-Owl2, whose norms, keys and values differ by modality."""

from functools import partial

import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_mplug_owl2 import MPLUGOwl2Config
from .vision_mplug_owl2 import eager_attention


class MPLUGOwl2RMSNorm(nn.Module):
    """LLaMA's norm: statistics in float32, cast back before the weight."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


class Multiway(nn.Module):
    """Two modules of one kind: number 1 for the image rows of [b, s, h], number 0 for the rest.

    `vision_token_index`, int64 [n], are the image rows of the flattened [b * s, h]; None for none.
    """

    def __init__(self, make):
        super().__init__()
        self.multiway = nn.ModuleList([make(), make()])

    def extra_repr(self) -> str:
        return "multiway.0: text, multiway.1: images"

    def forward(self, x: torch.Tensor, vision_token_index: torch.Tensor | None) -> torch.Tensor:
        text, vision = self.multiway
        out = text(x)
        if vision_token_index is None:
            return out
        rows = vision(x.flatten(0, 1).index_select(0, vision_token_index))
        return out.flatten(0, 1).index_copy(0, vision_token_index, rows).view_as(out)


class MPLUGOwl2Attention(nn.Module):
    """Causal attention over text and images alike; keys and values are projected by modality."""

    def __init__(self, config: MPLUGOwl2Config, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx, self.is_causal = config, layer_idx, True
        size, heads = config.hidden_size, config.num_attention_heads
        self.head_dim = size // heads
        self.num_key_value_groups = heads // config.num_key_value_heads
        kv_size = config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(size, size, bias=False)
        self.k_proj = Multiway(partial(nn.Linear, size, kv_size, bias=False))
        self.v_proj = Multiway(partial(nn.Linear, size, kv_size, bias=False))
        self.o_proj = nn.Linear(size, size, bias=False)

    def forward(self, x, vision_token_index, rotary, attention_mask, past_key_values, **kwargs):
        heads = (-1, self.head_dim)
        query = rotate(self.q_proj(x).unflatten(-1, heads).transpose(1, 2), rotary)
        key = rotate(
            self.k_proj(x, vision_token_index).unflatten(-1, heads).transpose(1, 2), rotary
        )
        value = self.v_proj(x, vision_token_index).unflatten(-1, heads).transpose(1, 2)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention
        )
        scaling = self.head_dim**-0.5
        out, weights = attention(self, query, key, value, attention_mask, scaling=scaling, **kwargs)
        return self.o_proj(out.flatten(2)), weights


class MPLUGOwl2MLP(nn.Module):
    """down(silu(gate x) * up x), shared by both modalities."""

    def __init__(self, config: MPLUGOwl2Config):
        super().__init__()
        size, ffn = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(size, ffn, bias=False)
        self.up_proj = nn.Linear(size, ffn, bias=False)
        self.down_proj = nn.Linear(ffn, size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class MPLUGOwl2DecoderLayer(GradientCheckpointingLayer):
    """Pre-norm layer with split norms, keys and values (paper, eq. 4 and 5); [b, s, h] to it."""

    def __init__(self, config: MPLUGOwl2Config, layer_idx: int):
        super().__init__()
        norm = partial(MPLUGOwl2RMSNorm, config.hidden_size, config.rms_norm_eps)
        self.input_layernorm = Multiway(norm)
        self.self_attn = MPLUGOwl2Attention(config, layer_idx)
        self.post_attention_layernorm = Multiway(norm)
        self.mlp = MPLUGOwl2MLP(config)

    def forward(
        self, x, vision_token_index, rotary, attention_mask, past_key_values=None, **kwargs
    ):
        normed = self.input_layernorm(x, vision_token_index)
        context = (vision_token_index, rotary, attention_mask, past_key_values)
        attended, _ = self.self_attn(normed, *context, **kwargs)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x, vision_token_index))


def rotary_tables(
    position_ids: torch.Tensor, config: MPLUGOwl2Config, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [b, 1, s, d] of positions [b, s], in LLaMA's rotate-half order."""
    size = config.hidden_size // config.num_attention_heads
    exponents = torch.arange(0, size, 2, device=position_ids.device).float() / size
    angles = position_ids.unsqueeze(-1).float() / config.rope_theta**exponents
    angles = torch.cat([angles, angles], dim=-1).unsqueeze(1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Turn queries or keys [b, heads, s, d] by their positions."""
    cos, sin = rotary
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-high, low], dim=-1) * sin
