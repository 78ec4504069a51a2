"""`config.json` and its companions of Hugging Face directories, to and from our ModelConfig."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from megatron_owl2.config.schema import AbstractorConfig, DecoderConfig, ModelConfig, VisionConfig
from megatron_owl2.config.templates import OWL2, TEMPLATES
from megatron_owl2.convert.config_fields import (
    ABSTRACTOR,
    DECODER,
    FIXED_DECODER,
    FIXED_VISION,
    VISION,
    export,
    read_decoder,
)
from megatron_owl2.convert.config_owl1 import (
    TEMPORAL,
    owl1_config,
    owl1_processor,
    read_owl1,
)
from megatron_owl2.convert.json_settings import Settings
from megatron_owl2.convert.layouts import MODEL_TYPES
from megatron_owl2.convert.peft_models import refuse_peft_model
from megatron_owl2.convert.safetensors_io import ADAPTER_SETTINGS, TensorReader
from megatron_owl2.errors import ConversionError

_FIXED_OFFICIAL_VISION = {"use_cls_token": True, "use_post_layernorm": True}
_FIXED_ABSTRACTOR = {"add_v2t_pos_emb": False, "use_cls_token": True}
_OWL2_ABSTRACTOR = {"num_queries": "num_learnable_queries", **ABSTRACTOR}
_CLIP_DEFAULTS = {  # CLIPVisionConfig's own; a CLIPModel's config leaves out what equals them
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
    "layer_norm_eps": 1e-5,
}
_IMAGES = "image_mean", "image_std", "image_mode"  # of ModelConfig, and of an image processor
_OFFICIAL_GRID = 32  # the released abstractor's, when grid_size is null
_PROCESSORS = {"owl2": "MPLUGOwl2Processor", "owl1": "MplugOwlProcessor"}  # by layout


def read_model(directory: str | Path, layout: str | None = None) -> ModelConfig:
    """Sizes, norms, image statistics, template and tokenization of a directory with a whole model,
    of layout `layout` if it is given.

    Raises ConversionError naming every setting that this model does not have.
    """
    settings = _read(directory, *(t for t, name in MODEL_TYPES.items() if layout in (None, name)))
    model = _READERS[MODEL_TYPES[settings.tree["model_type"]]](settings)
    return dataclasses.replace(model, **read_image_settings(directory))


def find_layout(directory: str | Path) -> str:
    """The layout of a directory with a whole model; raises ConversionError for any other."""
    return MODEL_TYPES[_read(directory, *MODEL_TYPES).tree["model_type"]]


def _read_owl2(outer: Settings) -> ModelConfig:
    both = "an object; it must hold visual_model and visual_abstractor"
    vision = outer.section("visual_config", both).section("visual_model")
    abstractor = outer.section("visual_config").section("visual_abstractor")
    abstractor = abstractor.filled(
        {"attention_probs_dropout_prob": AbstractorConfig.attention_dropout}
    )
    spread = outer.filled({"initializer_range": ModelConfig.init_std})
    model = spread.pick(ModelConfig, {"init_std": "initializer_range"})
    model.vision = vision.pick(VisionConfig, VISION)
    model.abstractor = abstractor.pick(AbstractorConfig, _OWL2_ABSTRACTOR)
    model.decoder = read_decoder(outer)
    model.template = outer.tree.get("template", OWL2.name)  # released directories name none
    model.tokenization = outer.tree.get("tokenization", ModelConfig.tokenization)
    outer.check(model)
    width, grid = model.vision.hidden_size, model.vision.grid_size
    vision.hold(FIXED_VISION | _FIXED_OFFICIAL_VISION)
    abstractor.hold(_FIXED_ABSTRACTOR | {"hidden_size": width, "encoder_hidden_size": width})
    abstractor.filled({"grid_size": _OFFICIAL_GRID}).hold({"grid_size": grid})
    return model


def _read_owl1(settings: Settings) -> ModelConfig:
    names = TensorReader(settings.file.parent).names()
    return read_owl1(settings, temporal=any(TEMPORAL in name for name in names))


_READERS = {"owl2": _read_owl2, "owl1": _read_owl1}


def read_llama(directory: str | Path) -> DecoderConfig:
    """Sizes of a LlamaForCausalLM directory; raises ConversionError for what Owl2 has not."""
    settings = _read(directory, "llama")
    decoder = read_decoder(settings)
    settings.check(ModelConfig(decoder=decoder))
    return decoder


def read_clip(directory: str | Path) -> VisionConfig:
    """Sizes of the ViT of a CLIPVisionModel or CLIPModel directory.

    Raises ConversionError for what Owl2 has not, such as another activation than quick_gelu.
    """
    settings = _read(directory, "clip_vision_model", "clip")
    if "vision_config" in settings.tree:
        settings = settings.section("vision_config")
    settings.hold(FIXED_VISION)
    vision = settings.replaced(_CLIP_DEFAULTS | settings.tree).pick(VisionConfig, VISION)
    abstractor = AbstractorConfig(num_heads=vision.num_heads)  # one that fits any ViT
    settings.check(ModelConfig(vision=vision, abstractor=abstractor))
    return vision


def read_image_settings(directory: str | Path) -> dict[str, Any]:
    """`image_mean`, `image_std` and `image_mode` of a ModelConfig.

    They are in preprocessor_config.json, or under "image_processor" of the processor_config.json
    that a whole processor saves (transformers 5). What a directory does not say are the defaults:
    CLIP's statistics and, as in the released model's, the mode "stretch". Raises ConversionError
    for anything but finite numbers and a mode that there is, and if the files disagree.
    """
    alone, whole = (Path(directory) / f"{n}_config.json" for n in ("preprocessor", "processor"))
    found = [Settings.read(alone)] if alone.exists() else []
    if whole.exists() and "image_processor" in (settings := Settings.read(whole)).tree:
        found.append(settings.section("image_processor"))
    default = ModelConfig()
    defaults, names = _of_images(default), {name: name for name in _IMAGES}
    picked = [settings.filled(defaults).pick(ModelConfig, names) for settings in found] or [default]
    values, others = _of_images(picked[0]), _of_images(picked[-1])
    if values != others:
        differing = [name for name in _IMAGES if values[name] != others[name]]
        here, there = (", ".join(f"{n} {v[n]}" for n in differing) for v in (values, others))
        raise ConversionError(
            f"{alone} has {here}, but {whole} {there}; keep what the model was trained with"
        )
    return {n: list(map(float, v)) if isinstance(v, list) else v for n, v in values.items()}


def _of_images(model: ModelConfig) -> dict[str, Any]:
    return {name: getattr(model, name) for name in _IMAGES}


def write(directory: Path, layout: str, model: ModelConfig, dtype: torch.dtype) -> None:
    """config.json of a model in `directory`, and the files for generation and images beside it.

    `layout` is "owl2", "owl1", "llama" or "clip".
    """
    name = str(dtype).removeprefix("torch.")
    trees = {"config.json": _CONFIGS[layout](model) | {"torch_dtype": name}}
    if layout != "clip":
        special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
        trees["generation_config.json"] = special | {"do_sample": False}
    if layout != "llama":
        size = model.vision.image_size
        trees["preprocessor_config.json"] = {
            "image_processor_type": "CLIPImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"shortest_edge": size},
            "resample": 3,  # bicubic
            "do_center_crop": True,
            "crop_size": {"height": size, "width": size},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(model.image_mean),
            "image_std": list(model.image_std),
            "image_mode": model.image_mode,  # not of CLIP's processor
        }
    if layout in _PROCESSORS:
        trees["processor_config.json"] = {
            "processor_class": _PROCESSORS[layout],
            "tokens_per_image": model.tokens_per_image,
            **(_template_texts(model) if layout == "owl2" else owl1_processor(model)),
        }
    for file, tree in trees.items():
        _write_json(directory / file, tree)


def write_tokenizer(directory: Path, model: ModelConfig) -> None:
    """tokenizer_config.json, which makes LLaMA's tokenizer of a tokenizer.model."""
    tree = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<unk>",  # the released training code pads with unk
        "legacy": True,
        "clean_up_tokenization_spaces": False,
        "model_max_length": model.decoder.max_positions,
    }
    _write_json(directory / "tokenizer_config.json", tree)


def _owl2_config(model: ModelConfig) -> dict:
    width = model.vision.hidden_size
    named = {} if model.template == OWL2.name else {"template": model.template}
    return _llama_config(model) | {
        **named,
        "architectures": ["MPLUGOwl2LlamaForCausalLM"],
        "model_type": "mplug_owl2",
        "visual_config": {
            "visual_model": {
                "model_type": "mplug_owl_vision_model",
                **export(model.vision, VISION),
                **FIXED_VISION,
                **_FIXED_OFFICIAL_VISION,
                "use_flash_attn": False,
                "initializer_range": model.init_std,
            },
            "visual_abstractor": {
                "model_type": "mplug_owl_visual_abstract",
                **export(model.abstractor, _OWL2_ABSTRACTOR),
                **_FIXED_ABSTRACTOR,
                "hidden_size": width,
                "encoder_hidden_size": width,
                "grid_size": model.vision.grid_size,
                "initializer_range": model.init_std,
            },
        },
    }


def _template_texts(model: ModelConfig) -> dict[str, str]:
    """What the model's template has and that of official inference, which the processor has by
    itself, has not."""
    template = TEMPLATES[model.template]
    texts = {"system": template.system, "after_image": template.after_image}
    return {name: text for name, text in texts.items() if text}


def _llama_config(model: ModelConfig) -> dict:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **export(model.decoder, DECODER),
        **FIXED_DECODER,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": model.init_std,
        "use_cache": True,
    }


def _clip_config(model: ModelConfig) -> dict:
    return {
        "architectures": ["CLIPVisionModel"],
        "model_type": "clip_vision_model",
        **export(model.vision, VISION),
        **FIXED_VISION,
        "initializer_range": model.init_std,
    }


_CONFIGS = {"owl2": _owl2_config, "owl1": owl1_config, "llama": _llama_config, "clip": _clip_config}


def _read(directory: str | Path, *model_types: str) -> Settings:
    if not Path(directory).is_dir():
        raise ConversionError(f"{directory} is not a directory")
    if (Path(directory) / ADAPTER_SETTINGS).exists():
        raise ConversionError(
            f"{directory} holds an adapter: merge it into its model with peft, and save that, or "
            "give it to owl2 convert-from-hf --adapter"
        )
    refuse_peft_model(directory)
    settings = Settings.read(Path(directory) / "config.json")
    kind = settings.tree.get("model_type")
    if kind not in model_types:
        wanted = " or ".join(map(repr, model_types))
        known = MODEL_TYPES.get(kind) if isinstance(kind, str) else None
        fix = f"; owl2 convert-from-hf --{known} reads it" if known else ""
        raise ConversionError(f"{settings.file}: model_type is {kind!r}, wanted {wanted}{fix}")
    return settings


def _write_json(path: Path, tree: dict) -> None:
    path.write_text(json.dumps(tree, indent=2) + "\n")
