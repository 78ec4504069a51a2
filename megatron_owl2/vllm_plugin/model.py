"""mPLUG-Owl2 in vLLM: its LLaMA with norms, keys and values by modality, ViT and abstractor.

Which rows are an image's is a mask [n, 1] beside the n scheduled tokens, not their ids: it is made
of what vLLM says of each step, after chunks and the prefix cache have had their part. Both branches
are computed for every row and one is chosen, which compiles and is captured in CUDA graphs.
"""

# vLLM has an environment of its own.
# pyright: reportMissingImports=false

import copy
from collections.abc import Iterable

import torch
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group
from vllm.model_executor.layers.linear import QKVParallelLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.interfaces import SupportsMultiModal, SupportsPP
from vllm.model_executor.models.llama import LlamaAttention, LlamaDecoderLayer, LlamaModel
from vllm.model_executor.models.utils import (
    AutoWeightsLoader,
    PPMissingLayer,
    WeightsMapper,
    maybe_prefix,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.sequence import IntermediateTensors

from megatron_owl2.convert.remote_code.owl2.prompt_mplug_owl2 import IMAGE
from megatron_owl2.convert.remote_code.owl2.vision_mplug_owl2 import (
    MPLUGOwl2VisionModel,
    MPLUGOwl2VisualAbstractor,
)
from megatron_owl2.vllm_plugin.processing import (
    Owl2DummyInputsBuilder,
    Owl2MultiModalProcessor,
    Owl2ProcessingInfo,
)
from megatron_owl2.vllm_plugin.weights import WEIGHT_NAMES


class SplitNorm(nn.Module):
    """RMSNorm of the sum of x and residual [n, h], with the weight of each row's modality.

    Returns the normed sum and the sum. Statistics are in fp32, cast back before the weight.
    """

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.vision = (nn.Parameter(torch.ones(size)) for _ in range(2))
        self.eps = eps

    def forward(self, x, residual, is_vision):
        x = x if residual is None else x + residual
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return torch.where(is_vision, self.vision, self.weight) * normed.to(x.dtype), x


class Owl2Attention(LlamaAttention):
    """LLaMA's attention, in whose cache every token has the keys and values of its modality."""

    def __init__(self, *, config, hidden_size: int, quant_config=None, prefix: str = "", **kwargs):
        super().__init__(
            config=config,
            hidden_size=hidden_size,
            quant_config=quant_config,
            prefix=prefix,
            **kwargs,
        )
        self.kv_vision = QKVParallelLinear(
            hidden_size=hidden_size,
            head_size=self.head_dim,
            total_num_heads=0,  # no queries; keys and values are split, or replicated, as those are
            total_num_kv_heads=self.total_num_kv_heads,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.kv_vision",
        )

    def _init_rotary_emb(self, config, quant_config) -> None:
        # Exports have rope_theta alone, which vLLM must not look for under other keys.
        self.rotary_emb = get_rope(
            self.head_dim,
            max_position=self.max_position_embeddings,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        )

    def forward(self, positions, hidden_states, is_vision):
        qkv, _ = self.qkv_proj(hidden_states)
        kv_vision, _ = self.kv_vision(hidden_states)
        query, kv_text = qkv.split([self.q_size, 2 * self.kv_size], dim=-1)
        key, value = torch.where(is_vision, kv_vision, kv_text).split(self.kv_size, dim=-1)
        query, key = self.rotary_emb(positions, query, key)
        return self.o_proj(self.attn(query, key, value))[0]


class Owl2DecoderLayer(LlamaDecoderLayer):
    """LLaMA's layer with split norms and attention (paper, eq. 4 and 5)."""

    def __init__(self, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__(vllm_config, prefix, attn_layer_type=Owl2Attention)
        config = vllm_config.model_config.hf_config
        self.input_layernorm, self.post_attention_layernorm = (
            SplitNorm(config.hidden_size, config.rms_norm_eps) for _ in range(2)
        )

    def forward(self, positions, hidden_states, residual, is_vision):
        x, residual = self.input_layernorm(hidden_states, residual, is_vision)
        x = self.self_attn(positions=positions, hidden_states=x, is_vision=is_vision)
        x, residual = self.post_attention_layernorm(x, residual, is_vision)
        return self.mlp(x), residual


@support_torch_compile(
    dynamic_arg_dims={
        "input_ids": {0: "b"},
        "positions": {0: "b"},
        "intermediate_tensors": {0: "b"},
        "inputs_embeds": {0: "b"},
        "is_vision": {0: "b"},
    }
)
class Owl2LlamaModel(LlamaModel):
    """The decoder; the mask goes from one pipeline stage to the next with the hidden states."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=Owl2DecoderLayer)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None,
        inputs_embeds: torch.Tensor | None,
        is_vision: torch.Tensor,
    ):
        if intermediate_tensors is not None:
            is_vision = intermediate_tensors["is_vision"]
        out = super().forward(
            input_ids, positions, intermediate_tensors, inputs_embeds, is_vision=is_vision
        )
        if isinstance(out, IntermediateTensors):
            out.tensors["is_vision"] = is_vision
        return out


@MULTIMODAL_REGISTRY.register_processor(
    Owl2MultiModalProcessor, info=Owl2ProcessingInfo, dummy_inputs=Owl2DummyInputsBuilder
)
class Owl2ForCausalLM(nn.Module, SupportsMultiModal, SupportsPP):
    """mPLUG-Owl2 of an export. ViT and abstractor are the export's own and whole on every rank."""

    hf_to_vllm_mapper = WeightsMapper(**WEIGHT_NAMES)
    packed_modules_mapping = {
        "qkv_proj": ["q_proj", "k_proj.multiway.0", "v_proj.multiway.0"],
        "kv_vision": ["k_proj.multiway.1", "v_proj.multiway.1"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.config = config
        with self._mark_language_model(vllm_config):
            self.model = Owl2LlamaModel(
                vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model")
            )
        with self._mark_tower_model(vllm_config, "image"):
            towers = copy.deepcopy(config)
            towers._attn_implementation = "sdpa"
            self.vision_model = MPLUGOwl2VisionModel(towers)
            self.visual_abstractor = MPLUGOwl2VisualAbstractor(towers)
        if get_pp_group().is_last_rank:
            self.lm_head = ParallelLMHead(
                config.vocab_size,
                config.hidden_size,
                quant_config=vllm_config.quant_config,
                prefix=maybe_prefix(prefix, "lm_head"),
            )
        else:
            self.lm_head = PPMissingLayer()
        self.logits_processor = LogitsProcessor(config.vocab_size)
        # A graph is replayed on padded sizes, above the tokens of a step.
        size = vllm_config.scheduler_config.max_num_batched_tokens
        size += vllm_config.parallel_config.tensor_parallel_size
        self.register_buffer("is_vision", torch.zeros(size, 1, dtype=torch.bool), persistent=False)

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        return IMAGE if modality == "image" else None

    def embed_multimodal(
        self, pixel_values: torch.Tensor | None = None, **_
    ) -> torch.Tensor | list:
        """Visual tokens [n, tokens per image, h], vit_eos among them, of pixels [n, 3, H, W]."""
        return (
            [] if pixel_values is None else self.visual_abstractor(self.vision_model(pixel_values))
        )

    def embed_input_ids(self, input_ids, multimodal_embeddings=None, *, is_multimodal=None):
        """Embeddings [n, h] of a step, and the mask of its image rows, kept for `forward`."""
        self.is_vision.zero_()
        if is_multimodal is not None:
            self.is_vision[: len(is_multimodal), 0].copy_(is_multimodal)
        return super().embed_input_ids(
            input_ids, multimodal_embeddings, is_multimodal=is_multimodal
        )

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **_,
    ) -> torch.Tensor | IntermediateTensors:
        is_vision = self.is_vision[: positions.shape[0]]
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds, is_vision)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        return self.logits_processor(self.lm_head, hidden_states)

    def make_empty_intermediate_tensors(
        self, batch_size: int, dtype: torch.dtype, device: torch.device
    ) -> IntermediateTensors:
        """What a pipeline stage gets from the one before, without values."""
        states = {
            name: torch.zeros(batch_size, self.config.hidden_size, dtype=dtype, device=device)
            for name in ("hidden_states", "residual")
        }
        mask = torch.zeros(batch_size, 1, dtype=torch.bool, device=device)
        return IntermediateTensors({**states, "is_vision": mask})

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return AutoWeightsLoader(self).load_weights(weights, mapper=self.hf_to_vllm_mapper)
