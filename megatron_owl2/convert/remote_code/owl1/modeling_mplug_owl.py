"""mPLUG-Owl, version 1, for transformers 5: ViT, visual abstractor and LLaMA.

Module names give the tensor names of the released checkpoints.
"""

import torch
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from .configuration_mplug_owl import MplugOwlConfig
from .vision_mplug_owl import MplugOwlVisionModel, MplugOwlVisualAbstractor
from .vision_mplug_owl2 import (
    MPLUGOwl2GenerationMixin,
    MPLUGOwl2VisionEmbeddings,
    check_images,
    visual_rows,
)

_LEAST_ID = -2  # of a row of a video; -1 is one of an image
_IGNORED = -100  # a label without a target


class MplugOwlForConditionalGeneration(PreTrainedModel, MPLUGOwl2GenerationMixin):
    """mPLUG-Owl with its language model.

    `input_ids` [b, s] are -1 at the rows of images and -2 at those of videos, as the processor
    makes them, or 0 there with `modality`, int64 [b, s], 1 and 2. `pixel_values` [images, 3, H, W]
    are the images in the order of their rows, row after row of the batch; a row without one takes
    none. `video_pixel_values` [videos, 3, T, H, W] are for the video variant. `labels` [b, s] are
    unshifted; those below 0 are ignored. Raises ValueError if rows and images differ in number.
    """

    config_class = MplugOwlConfig
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["LlamaDecoderLayer", "MplugOwlVisionModel", "MplugOwlVisualAbstractor"]
    _skip_keys_device_placement = ["past_key_values"]
    # A constant that the released code stores; here it is computed.
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq$"]
    visual_inputs = {"pixel_values": 1, "video_pixel_values": 2}

    def __init__(self, config: MplugOwlConfig):
        super().__init__(config)
        shape = 1, config.num_query_tokens, config.vision_config["hidden_size"]
        self.query_tokens = nn.Parameter(torch.empty(shape))
        if config.vision_config["temporal"]:
            self.temporal_query_tokens = nn.Parameter(torch.empty(shape))
        self.vision_model = MplugOwlVisionModel(config)
        self.abstractor = MplugOwlVisualAbstractor(config)
        self.language_model = LlamaForCausalLM(config.text_config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        own = (type(self), MPLUGOwl2VisionEmbeddings, MplugOwlVisualAbstractor)
        if isinstance(module, own):
            for parameter in module.parameters(recurse=False):
                nn.init.normal_(parameter, std=self.config.initializer_range)

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_output_embeddings(value)

    def get_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Normalised pixels [n, 3, H, W] to visual tokens [n, tokens per image, h]."""
        return self.abstractor(self.vision_model(pixel_values), self.query_tokens)

    def get_video_features(self, video_pixel_values: torch.Tensor) -> torch.Tensor:
        """Normalised pixels [n, 3, T, H, W] to visual tokens [n, tokens per image, h].

        Raises ValueError for a model that is not the video variant, and for a single frame.
        """
        if not self.config.vision_config["temporal"]:
            raise ValueError(
                "this model reads no videos: give their frames as images, or load the video "
                "variant, whose vision_config has temporal: true"
            )
        if video_pixel_values.dim() != 5 or video_pixel_values.shape[2] < 2:
            raise ValueError(
                f"video_pixel_values are {list(video_pixel_values.shape)}, but this model takes "
                "[videos, 3, frames, H, W] of at least 2 frames"
            )
        queries = torch.cat([self.query_tokens, self.temporal_query_tokens], dim=1)
        return self.abstractor(self.vision_model(video_pixel_values), queries)

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        pixel_values=None,
        video_pixel_values=None,
        modality=None,
        labels=None,
        use_cache=None,
        logits_to_keep=0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if input_ids is not None:
            input_ids, told = told_apart(input_ids)
            modality = told if modality is None else modality
        shape = (inputs_embeds if input_ids is None else input_ids).shape[:2]
        if modality is not None and modality.shape != shape:
            raise ValueError(
                f"modality is {list(modality.shape)}, the tokens are {list(shape)}; what is added "
                "to input_ids needs its modality, 0 for text"
            )
        x = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        modality = None if modality is None else modality.to(x.device)
        features = {"pixel_values": self.get_image_features}
        features["video_pixel_values"] = self.get_video_features
        visual = {"pixel_values": pixel_values, "video_pixel_values": video_pixel_values}
        for name, pixels in visual.items():
            rows = visual_rows(modality, self.visual_inputs[name])
            # With inputs_embeds alone the visual tokens are among them already.
            if pixels is not None or inputs_embeds is None:
                check_images(rows, pixels, self.config.tokens_per_image, name)
            if pixels is not None:
                tokens = features[name](pixels).flatten(0, 1).to(x.device, x.dtype)
                x = x.flatten(0, 1).index_copy(0, rows, tokens).view_as(x)
        if position_ids is None and attention_mask is not None and attention_mask.dim() == 2:
            # Padding on the left is not counted.
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -x.shape[1] :]
        return self.language_model(
            inputs_embeds=x,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            labels=None if labels is None else labels.masked_fill(labels < 0, _IGNORED),
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )

    def generate(self, inputs=None, *args, **kwargs):
        """transformers' own. Its ids are 0 at the rows of images, where no id is to be counted.

        Without `attention_mask` the id of padding, 0, tells it.
        """
        ids = kwargs.pop("input_ids", inputs)
        if ids is not None and kwargs.get("modality") is None and (ids < 0).any():
            if kwargs.get("attention_mask") is None:
                kwargs["attention_mask"] = (ids != 0).long()
            ids, kwargs["modality"] = told_apart(ids)
        return super().generate(ids, *args, **kwargs)


def told_apart(input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids with 0 at the rows of images and videos, and the modality, int64 [b, s] both.

    Raises ValueError for ids below -2.
    """
    if (input_ids < _LEAST_ID).any():
        raise ValueError(
            f"input_ids hold {input_ids.min().item()}; rows of an image are -1, of a video -2"
        )
    return input_ids.clamp(min=0), (-input_ids).clamp(min=0)
