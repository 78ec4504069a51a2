"""mPLUG-Owl2 for transformers 5: ViT, visual abstractor and modality-adaptive LLaMA decoder.

Module names give the tensor names of the released checkpoint. Position tables and rotary
frequencies are computed where they are used, in float32, so no dtype, device map or way of
loading can change them.
"""

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_mplug_owl2 import MPLUGOwl2Config
from .decoder_mplug_owl2 import (
    MPLUGOwl2Attention,
    MPLUGOwl2DecoderLayer,
    MPLUGOwl2RMSNorm,
    rotary_tables,
)
from .vision_mplug_owl2 import (
    MPLUGOwl2GenerationMixin,
    MPLUGOwl2VisionEmbeddings,
    MPLUGOwl2VisionModel,
    MPLUGOwl2VisualAbstractor,
    check_images,
    visual_rows,
)


class MPLUGOwl2PreTrainedModel(PreTrainedModel):
    """Base class of the model's parts, as transformers wants it."""

    config_class = MPLUGOwl2Config
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = [
        "MPLUGOwl2DecoderLayer",
        "MPLUGOwl2VisionModel",
        "MPLUGOwl2VisualAbstractor",
    ]
    _skip_keys_device_placement = ["past_key_values"]
    # Constants that the released code may store; here they are computed.
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq$", r"\.[qk]_pos_embed$"]
    _can_record_outputs = {"hidden_states": MPLUGOwl2DecoderLayer, "attentions": MPLUGOwl2Attention}

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, (MPLUGOwl2VisionEmbeddings, MPLUGOwl2VisualAbstractor)):
            for parameter in module.parameters(recurse=False):
                nn.init.normal_(parameter, std=self.config.initializer_range)


class MPLUGOwl2LlamaModel(MPLUGOwl2PreTrainedModel):
    """Token ids and images to hidden states [b, s, h] after the final norm."""

    def __init__(self, config: MPLUGOwl2Config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            MPLUGOwl2DecoderLayer(config, i) for i in range(config.num_hidden_layers)
        )
        self.norm = MPLUGOwl2RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.vision_model = MPLUGOwl2VisionModel(config)
        self.visual_abstractor = MPLUGOwl2VisualAbstractor(config)
        self.post_init()

    def get_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Normalised pixels [n, 3, H, W] to visual tokens [n, tokens per image, h]."""
        return self.visual_abstractor(self.vision_model(pixel_values))

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        pixel_values=None,
        modality=None,
        use_cache=None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        vision_token_index = None
        if modality is not None:
            if modality.shape != x.shape[:2]:
                raise ValueError(
                    f"modality is {list(modality.shape)}, the tokens are {list(x.shape[:2])}; "
                    "what is added to input_ids needs its modality, 0 for text"
                )
            vision_token_index = visual_rows(modality.to(x.device), 1)
        # With inputs_embeds alone the visual tokens are among them already.
        if pixel_values is not None or inputs_embeds is None:
            size = self.config.tokens_per_image
            check_images(vision_token_index, pixel_values, size, "pixel_values")
        if pixel_values is not None:
            visual = self.get_image_features(pixel_values).flatten(0, 1).to(x.device, x.dtype)
            x = x.flatten(0, 1).index_copy(0, vision_token_index, visual).view_as(x)

        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            position_ids = self._positions(x, attention_mask, past_key_values)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=x,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        rotary = rotary_tables(position_ids, self.config, x.dtype)
        for layer in self.layers:
            x = layer(
                x, vision_token_index, rotary, mask, past_key_values=past_key_values, **kwargs
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(x), past_key_values=past_key_values
        )

    def _positions(self, x, attention_mask, past_key_values) -> torch.Tensor:
        """Positions [b, s] that count from the first token of a row that is not padding."""
        if attention_mask is not None and attention_mask.dim() == 2:
            positions = attention_mask.long().cumsum(-1) - 1
            return positions.clamp(min=0)[:, -x.shape[1] :]
        seen = past_key_values.get_seq_length() if past_key_values is not None else 0
        return torch.arange(seen, seen + x.shape[1], device=x.device).expand(x.shape[0], -1)


class MPLUGOwl2LlamaForCausalLM(MPLUGOwl2PreTrainedModel, MPLUGOwl2GenerationMixin):
    """mPLUG-Owl2 with its language-model head.

    `modality`, int64 [b, s] as the processor makes it, is 1 at image rows and 0 elsewhere.
    `pixel_values` [images, 3, H, W] are the images in the order of their rows, row after row of
    the batch. `labels` [b, s] are unshifted, -100 is ignored. Positions do not count left padding
    (`attention_mask` 0). Raises ValueError if image rows and images differ in number.
    """

    def __init__(self, config: MPLUGOwl2Config):
        super().__init__(config)
        self.model = MPLUGOwl2LlamaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        pixel_values=None,
        modality=None,
        labels=None,
        use_cache=None,
        logits_to_keep=0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            pixel_values=pixel_values,
            modality=modality,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
