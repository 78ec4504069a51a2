"""The LLaMA-2 decoder with modality-adaptive layers (paper, section 3.2)."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import nn

from megatron_owl2.config.schema import DecoderConfig, ModelConfig
from megatron_owl2.mcore.linear import LinearSpec
from megatron_owl2.mcore.parallel import ParallelContext
from megatron_owl2.model.attention import AttentionMask
from megatron_owl2.model.kernels import Kernels, build_kernels
from megatron_owl2.model.kernels.elementwise import build_elementwise
from megatron_owl2.model.layer_stack import ActivationCheckpoint, LayerStack
from megatron_owl2.model.lora import Adapters
from megatron_owl2.model.modality import Modality, ModalityNorm, ModalityQKV


class LayerCache(Protocol):
    """Interface of the key/value cache of one attention layer during one pass."""

    def extend(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep the new keys and values [s, b, kv_heads/tp, d]; returns those to attend to."""
        ...


class Decoder(nn.Module):
    """Layers `first` to `last - 1` of the decoder; their names carry the global layer number.

    hidden states [s, b, h] ([s/tp, b, h] under sequence parallelism) to the same.
    """

    def __init__(self, context: ParallelContext, model: ModelConfig, first: int, last: int):
        super().__init__()
        self.config = model.decoder
        self.kernels = build_kernels(context)
        self.layers = LayerStack(
            context,
            lambda number: DecoderLayer(context, self.kernels, model, number),
            first,
            last,
            self.kernels.checkpoint,
        )

    def forward(
        self,
        x: torch.Tensor,
        modality: Modality,
        position_ids: torch.Tensor,
        *,
        attention_mask: AttentionMask | None = None,
        caches: Sequence[LayerCache] | None = None,
    ) -> torch.Tensor:
        """position_ids [b, s]; attention is causal unless `attention_mask` (bool [b, 1, s, s'],
        True where allowed) says more, and stays within the sequences of packed rows; `caches`, one
        for each layer of the model, extend the context."""
        rotary = rotary_tables(position_ids, self.config, x.dtype)
        with self.kernels.fp8_context():
            for number, layer in zip(self.layers.numbers(), self.layers, strict=True):
                cache = caches[number] if caches is not None else None
                with self.kernels.layer_fp8_context(number):
                    x = self.layers(layer, x, modality, rotary, attention_mask, cache)
        return x


class DecoderLayer(nn.Module):
    """Pre-norm layer: split norms, split key and value; shared query, output and MLP (fig. 3)."""

    def __init__(self, context: ParallelContext, kernels: Kernels, model: ModelConfig, number: int):
        super().__init__()
        size, eps = model.decoder.hidden_size, model.decoder.norm_eps
        split = model.decoder.modality_split
        self.input_norm = ModalityNorm(context, size, eps, split="input_norm" in split)
        self.attention = ModalityAttention(context, kernels, model, number)
        self.pre_mlp_norm = ModalityNorm(context, size, eps, split="mlp_norm" in split)
        self.mlp = GatedMLP(context, kernels, model, number)

    def forward(self, x, modality, rotary, attention_mask, cache):
        normed = self.input_norm(x, modality)
        x = x + self.attention(normed, modality, rotary, attention_mask, cache)
        return x + self.mlp(self.pre_mlp_norm(x, modality), modality.token_keys)


class ModalityAttention(nn.Module):
    """Causal self-attention over text and vision alike: softmax(H_Q H_K^T / sqrt(d)) H_V, keys
    and values split by modality."""

    def __init__(self, context: ParallelContext, kernels: Kernels, model: ModelConfig, number: int):
        super().__init__()
        size = model.decoder.hidden_size
        self.activation_checkpoint = ActivationCheckpoint(context, "selective")
        self.qkv = ModalityQKV(context, kernels, model.decoder, model.init_std, number)
        self.core = kernels.attention(context, number)
        spec = LinearSpec(
            inputs=size,
            outputs=size,
            init_std=model.init_std,
            sequence_parallel=True,
            user_buffer="proj",
        )
        self.linear_proj = kernels.RowLinear(context, spec)
        self.adapters = Adapters(
            context, f"decoder.layers.{number}.attention", {"output": (size, size, "inputs")}
        )

    def forward(self, x, modality, rotary, attention_mask, cache):
        query, key, value = self.qkv(x, modality, rotary)
        if cache is not None:
            key, value = cache.extend(key, value)
        mixed = self.activation_checkpoint(self.core, query, key, value, attention_mask)
        return self.adapters.add_row(self.linear_proj(mixed), "output", mixed, modality.token_keys)


class GatedMLP(nn.Module):
    """Gated MLP: down(silu(gate x) * up x); gate and up are one weight [2 * ffn, h].

    Adapters (`stage.lora`) are those of decoder layer `number`; their dropout follows `token_keys`.
    """

    def __init__(self, context: ParallelContext, kernels: Kernels, model: ModelConfig, number: int):
        super().__init__()
        self.activation_checkpoint = ActivationCheckpoint(context, "selective")
        self.elementwise = build_elementwise(context)
        size, ffn = model.decoder.hidden_size, model.decoder.ffn_size
        options = {"init_std": model.init_std, "sequence_parallel": True}
        gate_up = LinearSpec(inputs=size, outputs=2 * ffn, stride=2, user_buffer="fc1", **options)
        self.linear_fc1 = kernels.ColumnLinear(context, gate_up)
        down = LinearSpec(inputs=ffn, outputs=size, user_buffer="fc2", **options)
        self.linear_fc2 = kernels.RowLinear(context, down)
        self.adapters = Adapters(
            context,
            f"decoder.layers.{number}.mlp",
            {
                "gate": (size, ffn, "outputs"),
                "up": (size, ffn, "outputs"),
                "down": (ffn, size, "inputs"),
            },
        )

    def forward(self, x: torch.Tensor, token_keys: torch.Tensor | None = None) -> torch.Tensor:
        low_rank = self.adapters.column_inputs(x, token_keys, "gate", "up")
        gate_up = self.linear_fc1(x).unflatten(-1, (2, -1))
        gate_up = self.adapters.add_columns(gate_up, low_rank, {"gate": 1, "up": 1}).flatten(-2)
        gated = self.activation_checkpoint(self.elementwise.swiglu, gate_up)
        return self.adapters.add_row(self.linear_fc2(gated), "down", gated, token_keys)


def rotary_tables(
    position_ids: torch.Tensor, config: DecoderConfig, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [s, b, 1, d] of the rotary positions, in the rotate-half order of LLaMA."""
    size = config.hidden_size // config.num_heads
    exponents = torch.arange(0, size, 2, device=position_ids.device).float() / size
    angles = position_ids.t().unsqueeze(-1).float() / config.rope_theta**exponents
    angles = torch.cat([angles, angles], dim=-1).unsqueeze(2)
    angles = angles.contiguous()
    return angles.cos().to(dtype), angles.sin().to(dtype)
