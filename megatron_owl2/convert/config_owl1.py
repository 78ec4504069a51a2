"""`config.json` of the released mPLUG-Owl (version 1), to and from our ModelConfig.

Sections vision_config, visual_abstractor_config and text_config, a LLaMA; the released video
variant has the same settings and is told by its weights.
"""

from typing import Any

from megatron_owl2.config.schema import AbstractorConfig, ModelConfig, VisionConfig
from megatron_owl2.convert.config_fields import (
    ABSTRACTOR,
    DECODER,
    FIXED_DECODER,
    FIXED_VISION,
    VISION,
    export,
    read_decoder,
)
from megatron_owl2.convert.json_settings import Settings
from megatron_owl2.convert.layouts import RELEASED_FFN_SIZE

TEMPLATE, TOKENIZATION = "owl1", "official_inference"  # of a directory that names none
FRAMES = 4  # of a video that the released processor takes
TEMPORAL = "temporal"  # in the names of weights that only the video variant has
_FFN_MULTIPLE = 256  # of the MLP in the abstractor, in the video variant
# What the released classes have where a directory says nothing.
_VISION_DEFAULTS = export(VisionConfig(), VISION)
_ABSTRACTOR_DEFAULTS = export(AbstractorConfig(), ABSTRACTOR) | {
    "intermediate_size": 4096,
    "attention_probs_dropout_prob": 0.1,
}


def read_owl1(settings: Settings, *, temporal: bool) -> ModelConfig:
    """Sizes, norms, dropout, template and tokenization, without image statistics; raises
    ConversionError naming every setting that this model does not have.

    `temporal`: the directory's weights are those of the video variant.
    """
    settings.hold({"use_decoder_only_language_model": True})
    vision = settings.section("vision_config").filled(_VISION_DEFAULTS)
    abstractor = settings.section("visual_abstractor_config").filled(_ABSTRACTOR_DEFAULTS)
    text = settings.section("text_config")
    text.hold({"model_type": "llama"})
    model = ModelConfig(decoder=read_decoder(text))
    model.decoder.modality_split = []
    model.vision = vision.pick(VisionConfig, VISION)
    model.vision.temporal = temporal
    model.abstractor = abstractor.pick(AbstractorConfig, ABSTRACTOR)
    model.abstractor.positions = "none"
    queries = settings.filled({"num_query_tokens": 64})
    counted = queries.pick(AbstractorConfig, {"num_queries": "num_query_tokens"})
    model.abstractor.num_queries = counted.num_queries
    if temporal:
        model.abstractor.ffn_size = _ffn_size_with_frames(model.abstractor.ffn_size)
    spread = vision.filled({"initializer_range": ModelConfig.init_std})
    model.init_std = spread.pick(ModelConfig, {"init_std": "initializer_range"}).init_std
    model.template = settings.tree.get("template", TEMPLATE)
    model.tokenization = settings.tree.get("tokenization", TOKENIZATION)
    settings.check(model)
    vision.hold(FIXED_VISION)
    width = model.vision.hidden_size
    abstractor.hold({"hidden_size": width, "encoder_hidden_size": width})
    return model


def owl1_config(model: ModelConfig) -> dict[str, Any]:
    """The settings of a model that fits the layout "owl1"."""
    named = {"template": model.template, "tokenization": model.tokenization}
    defaults = {"template": TEMPLATE, "tokenization": TOKENIZATION}
    width, ffn_size = model.vision.hidden_size, model.abstractor.ffn_size
    if model.vision.temporal and ffn_size != RELEASED_FFN_SIZE:
        ffn_size = ffn_size * 3 // 2
    return {name: value for name, value in named.items() if value != defaults[name]} | {
        "architectures": ["MplugOwlForConditionalGeneration"],
        "model_type": "mplug-owl",
        "num_query_tokens": model.abstractor.num_queries,
        "use_decoder_only_language_model": True,
        "tie_word_embeddings": False,
        "vision_config": {
            "model_type": "mplug_owl_vision_model",
            **export(model.vision, VISION),
            **FIXED_VISION,
            **({"temporal": True} if model.vision.temporal else {}),
            "use_flash_attn": False,
            "initializer_range": model.init_std,
        },
        "visual_abstractor_config": {
            "model_type": "mplug_owl_visual_abstract",
            **export(model.abstractor, ABSTRACTOR),
            "intermediate_size": ffn_size,
            "hidden_size": width,
            "encoder_hidden_size": width,
            "initializer_range": model.init_std,
        },
        "text_config": {
            "model_type": "llama",
            **export(model.decoder, DECODER),
            **FIXED_DECODER,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            "initializer_range": model.init_std,
            "use_cache": True,
        },
    }


def owl1_processor(model: ModelConfig) -> dict[str, Any]:
    """What the processor of a directory has to know of its model, beside the size of an image."""
    frames = {"frames_per_video": FRAMES} if model.vision.temporal else {}
    return {"tokenization": model.tokenization, **frames}


def _ffn_size_with_frames(size: int) -> int:
    """Width of the MLP that the video variant makes of the setting."""
    if size == RELEASED_FFN_SIZE:
        return size
    return -(-int(2 * size / 3) // _FFN_MULTIPLE) * _FFN_MULTIPLE
