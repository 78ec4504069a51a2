"""Decode step: the decoder's layers for one new text token of every sequence.

The arithmetic is that of `model.decoder` for text without gradients. At a few rows calls cost more
than arithmetic, so it is written with as few as possible.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch.nn import functional as F

from megatron_owl2.inference.elementwise import rotated
from megatron_owl2.inference.kv_cache import DecodeLayer
from megatron_owl2.model.decoder import DecoderLayer, rotary_tables
from megatron_owl2.model.owl2 import Owl2


class TextDecoder:
    """The decoder of a loaded model for text: tokens and positions [b] to hidden states [b, h]."""

    def __init__(self, model: Owl2):
        decoder, self.model = model.model.decoder, model
        self.layers = [_TextLayer(cast(DecoderLayer, layer)) for layer in model.decoder.layers]
        positions = torch.arange(decoder.max_positions, device=model.context.device)
        cos, sin = rotary_tables(positions[None], decoder, model.context.dtype)
        self.cos, self.sin = cos.squeeze(2), sin[..., : sin.shape[-1] // 2].squeeze(2)  # [s, 1, d]

    def __call__(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        caches: Sequence[DecodeLayer],
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """tokens and positions int64 [b]; mask [b, 1, 1, all positions so far] is added to the
        scores, None if all sequences are equally long."""
        x = self.model.embedding(tokens)
        cos, sin = self.cos[positions].unsqueeze(1), self.sin[positions].unsqueeze(1)
        for layer, cache in zip(self.layers, caches, strict=True):
            x = layer(x, cos, sin, cache, mask)
        return x


class _TextLayer:
    """One layer, with what its modules hold within reach."""

    def __init__(self, layer: DecoderLayer):
        attention, mlp = layer.attention, layer.mlp
        self.groups, self.head_size = attention.qkv.groups, attention.qkv.head_size
        self.qkv, self.proj = attention.qkv.linear_qkv.forward, attention.linear_proj.forward
        self.fc1, self.fc2 = mlp.linear_fc1.forward, mlp.linear_fc2.forward
        self.rms_norm, self.eps = layer.input_norm.elementwise.rms_norm, layer.input_norm.eps
        self.swiglu = mlp.elementwise.swiglu
        self.input_norm = layer.input_norm.weight_text.detach()
        self.mlp_norm = layer.pre_mlp_norm.weight_text.detach()

    def __call__(self, x, cos, sin, cache: DecodeLayer, mask):
        b = len(x)
        qkv = self.qkv(self.rms_norm(x, self.eps, self.input_norm))
        qkv = qkv.view(b, self.groups, -1, self.head_size)
        turned = rotated(qkv[:, :, :-1], cos, sin)
        qkv[:, :, -2] = turned[:, :, -1]
        key, value = cache.extend(qkv[:, :, -2:])
        query = turned[:, :, :-1].reshape(b, -1, 1, self.head_size)
        several = query.shape[1] != key.shape[1]
        mixed = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, enable_gqa=several
        )
        x = self.proj(mixed.view(b, -1)).add_(x)
        gate_up = self.fc1(self.rms_norm(x, self.eps, self.mlp_norm))
        return self.fc2(self.swiglu(gate_up)).add_(x)
