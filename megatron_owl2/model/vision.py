"""CLIP ViT-L/14 as mPLUG-Owl2 uses it: all tokens of the last layer, after the last norm."""

import torch
from torch import nn
from torch.nn.functional import interpolate

from megatron_owl2.config.schema import ModelConfig
from megatron_owl2.mcore.linear import ColumnLinear, LinearSpec, RowLinear
from megatron_owl2.mcore.parallel import ParallelContext
from megatron_owl2.model.attention import attend
from megatron_owl2.model.kernels.elementwise import build_elementwise
from megatron_owl2.model.kernels.plain import quick_gelu
from megatron_owl2.model.layer_stack import ActivationCheckpoint, LayerStack

POSITION_EMBEDDING: str = "vision_model.position_embedding"  # its name in the whole model


class VisionModel(nn.Module):
    """Normalised pixels [n, 3, H, W] to features [1 + patches, n, h], the class token first.

    Differences to OpenAI's model: the last norm applies to every token, not to the class token
    alone (official behaviour). `frames` neighbours of the n images are a video each, which matters
    with `model.vision.temporal` alone.
    """

    def __init__(self, context: ParallelContext, model: ModelConfig):
        super().__init__()
        config = model.vision
        size, dtype = config.hidden_size, context.dtype
        tokens = config.grid_size**2 + 1
        self.cls_token = nn.Parameter(torch.randn(1, 1, size, dtype=dtype) * model.init_std)
        self.position_embedding = nn.Parameter(
            torch.randn(1, tokens, size, dtype=dtype) * config.position_init_std
        )
        self.patch_embed = nn.Conv2d(
            3, size, config.patch_size, config.patch_size, bias=False, dtype=dtype
        )
        self.pre_layernorm = nn.LayerNorm(size, config.norm_eps, dtype=dtype)
        self.layers = LayerStack(
            context, lambda number: VisionLayer(context, model), 0, config.num_layers
        )
        self.post_layernorm = nn.LayerNorm(size, config.norm_eps, dtype=dtype)

    def forward(self, pixels: torch.Tensor, frames: int = 1) -> torch.Tensor:
        patches = self.patch_embed(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(pixels), -1, -1), patches], dim=1)
        x = self.pre_layernorm(x + self.position_embedding).transpose(0, 1)
        for layer in self.layers:
            x = self.layers(layer, x, frames)
        return self.post_layernorm(x)


class VisionLayer(nn.Module):
    """Pre-norm transformer layer with biases and quick-GELU; [tokens, n, h] to the same."""

    def __init__(self, context: ParallelContext, model: ModelConfig):
        super().__init__()
        config = model.vision
        size = config.hidden_size
        self.head_size = size // config.num_heads
        self.activation_checkpoint = ActivationCheckpoint(context, "selective")
        self.elementwise = build_elementwise(context)
        self.temporal = TemporalAdapter(context, model) if config.temporal else None

        def spec(inputs: int, outputs: int, *, skip_bias: bool = False) -> LinearSpec:
            return LinearSpec(
                inputs=inputs,
                outputs=outputs,
                bias=True,
                init_std=model.init_std,
                skip_bias=skip_bias,
            )

        self.input_layernorm = nn.LayerNorm(size, config.norm_eps, dtype=context.dtype)
        # Rows grouped by head (its query, key, value), as the official checkpoint has them.
        self.linear_qkv = ColumnLinear(context, spec(size, 3 * size))
        self.linear_proj = RowLinear(context, spec(size, size))
        self.pre_mlp_layernorm = nn.LayerNorm(size, config.norm_eps, dtype=context.dtype)
        self.linear_fc1 = ColumnLinear(context, spec(size, config.ffn_size, skip_bias=True))
        self.linear_fc2 = RowLinear(context, spec(config.ffn_size, size))

    def forward(self, x: torch.Tensor, frames: int = 1) -> torch.Tensor:
        if self.temporal is not None and frames > 1:
            x = x + self.temporal(x, frames)
        qkv = self.linear_qkv(self.input_layernorm(x))
        query, key, value = qkv.unflatten(-1, (-1, 3, self.head_size)).unbind(3)
        x = x + self.linear_proj(self.activation_checkpoint(attend, query, key, value))
        wide = self.linear_fc1(self.pre_mlp_layernorm(x))
        bias = self.linear_fc1.bias
        gated = self.activation_checkpoint(self.elementwise.quick_gelu, wide, bias)
        return x + self.linear_fc2(gated)


class TemporalAdapter(nn.Module):
    """Adapter over the frames of a video: [tokens, videos * frames, h] to the same.

    A depthwise convolution of width 3 over a patch's frames, at half the width. The class token
    comes out as it went in, so that the layer doubles it (behaviour of mPLUG-Owl's video variant).
    """

    NORM_EPS = 1e-5  # whatever the ViT's is

    def __init__(self, context: ParallelContext, model: ModelConfig):
        super().__init__()
        size, dtype = model.vision.hidden_size, context.dtype
        self.norm = nn.LayerNorm(size, self.NORM_EPS, dtype=dtype)
        self.down = nn.Linear(size, size // 2, dtype=dtype)
        self.conv = nn.Conv1d(size // 2, size // 2, 3, padding=1, groups=size // 2, dtype=dtype)
        self.up = nn.Linear(size // 2, size, dtype=dtype)

    def forward(self, x: torch.Tensor, frames: int) -> torch.Tensor:
        narrow = self.down(self.norm(x[1:]))
        by_time = narrow.unflatten(1, (-1, frames)).transpose(2, 3)  # [patches, videos, h/2, t]
        mixed = self.conv(by_time.flatten(0, 1)).view_as(by_time).transpose(2, 3).flatten(1, 2)
        return torch.cat([x[:1], self.up(quick_gelu(mixed))])


def resize_positions(table: torch.Tensor, grid: int) -> torch.Tensor:
    """A ViT's position table [1, 1 + g^2, h] on another grid, [1, 1 + grid^2, h].

    The class token's row is kept; the others are resized bicubically (align_corners False), the
    usual way to take a CLIP to another resolution, in fp32; the result is rounded to the table's
    dtype.
    """
    stored = round((table.shape[1] - 1) ** 0.5)
    patches = table[:, 1:].float().unflatten(1, (stored, stored)).permute(0, 3, 1, 2)
    patches = interpolate(patches, size=(grid, grid), mode="bicubic", align_corners=False)
    patches = patches.permute(0, 2, 3, 1).flatten(1, 2).to(table.dtype)
    return torch.cat([table[:, :1], patches], dim=1)
