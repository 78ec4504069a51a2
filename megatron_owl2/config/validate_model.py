"""Sizes of a model that fit together."""

import dataclasses

from megatron_owl2.config.fields import check_section, number_misfit
from megatron_owl2.config.require import require
from megatron_owl2.config.schema import ModelConfig
from megatron_owl2.config.templates import template_of

# Beyond every model: more is a mistake, which otherwise shows after minutes or in lost memory.
_MOST_POSITIONS = 2**28


def validate_model(model: ModelConfig) -> None:
    """Refuse numbers that no model has and sizes that do not fit together; raises ConfigError."""
    check_section(model, "model.", misfit)
    template_of(model.template, model.tokenization)  # refuses rules that do not fit
    vision, decoder = model.vision, model.decoder
    require(
        vision.image_size % vision.patch_size == 0,
        f"model.vision.image_size ({vision.image_size}) is not divisible by "
        f"model.vision.patch_size ({vision.patch_size}); use a multiple of the patch",
    )
    for name, width, heads in (
        ("model.vision", vision.hidden_size, vision.num_heads),
        ("model.abstractor", vision.hidden_size, model.abstractor.num_heads),
        ("model.decoder", decoder.hidden_size, decoder.num_heads),
    ):
        require(
            width % heads == 0, f"{name}.num_heads ({heads}) does not divide the width ({width})"
        )
    tables = model.abstractor.positions == "sincos"
    require(
        not tables or vision.hidden_size % 4 == 0,
        f"model.vision.hidden_size ({vision.hidden_size}) must be a multiple of 4 for the "
        "two-dimensional position table of the abstractor",
    )
    require(
        not (vision.temporal and tables),
        "model.vision.temporal needs model.abstractor.positions=none: the abstractor's tables have "
        "places for one image, not for the frames of a video",
    )
    require(
        not vision.temporal or vision.hidden_size % 2 == 0,
        f"model.vision.hidden_size ({vision.hidden_size}) must be even for model.vision.temporal",
    )
    require(
        model.abstractor.attention_dropout < 1,
        f"model.abstractor.attention_dropout ({model.abstractor.attention_dropout:g}) must be "
        "below 1, or queries would see nothing",
    )
    positions = (vision.grid_size**2 + 1 + model.abstractor.num_queries) * vision.hidden_size
    require(
        not tables or positions <= _MOST_POSITIONS,
        f"the abstractor needs position tables of {positions} numbers, at most {_MOST_POSITIONS} "
        "can be; lower model.vision.image_size or model.abstractor.num_queries",
    )
    require(
        decoder.num_heads % decoder.num_kv_heads == 0,
        f"model.decoder.num_heads ({decoder.num_heads}) is not a multiple of "
        f"num_kv_heads ({decoder.num_kv_heads})",
    )
    require(
        (decoder.hidden_size // decoder.num_heads) % 2 == 0,
        "the decoder's head size must be even for rotary positions; change "
        "model.decoder.num_heads or hidden_size",
    )


def misfit(entry: dataclasses.Field, value: object) -> str | None:
    """Range of a field of ModelConfig or its sections, in words, if `value` is outside of it."""
    wanted = number_misfit(entry, value)
    noun = "a number" if entry.type in (int, float) else "three numbers"
    return wanted and f"{noun}, {wanted}"
