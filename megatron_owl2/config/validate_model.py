"""Numbers that a model can have, and sizes that fit together."""

import dataclasses
import sys

from megatron_owl2.config.require import check_each, require
from megatron_owl2.config.schema import MODALITY_SPLIT, ModelConfig

# Beyond every model: more is a mistake, which otherwise shows after minutes or in lost memory.
_MOST, _MOST_LAYERS, _MOST_POSITIONS = 2**24, 1000, 2**28
_LARGEST = sys.float_info.max
# The least value and its words, where a number need not be above 0.
_LEAST = {"image_mean": (-_LARGEST, "finite")} | dict.fromkeys(
    ("init_std", "position_init_std", "attention_init_std"), (0, "finite and not below 0")
)


def validate_model(model: ModelConfig) -> None:
    """Refuse numbers that no model has and sizes that do not fit together; raises ConfigError."""
    check_each(model, misfit, "model.")
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
    require(
        vision.hidden_size % 4 == 0,
        f"model.vision.hidden_size ({vision.hidden_size}) must be a multiple of 4 for the "
        "two-dimensional position table of the abstractor",
    )
    positions = (vision.grid_size**2 + 1 + model.abstractor.num_queries) * vision.hidden_size
    require(
        positions <= _MOST_POSITIONS,
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
    split = decoder.modality_split
    require(
        set(split) <= set(MODALITY_SPLIT) and len(set(split)) == len(split),
        f"model.decoder.modality_split ({split}) may hold each of {', '.join(MODALITY_SPLIT)} "
        "at most once",
    )


def misfit(field: dataclasses.Field, value: object) -> str | None:
    """What a field of ModelConfig or its sections must be if `value` is not that, else None."""
    if field.type is int:
        most = _MOST_LAYERS if field.name == "num_layers" else _MOST
        fits = type(value) is int and 1 <= value <= most
        return None if fits else f"a number, whole and from 1 to {most}"
    three = field.type == list[float]
    if field.type is not float and not three:
        return None
    least, words = _LEAST.get(field.name, (sys.float_info.min, "finite and above 0"))
    numbers = value if three else [value]
    fits = isinstance(numbers, list) and len(numbers) == (3 if three else 1)
    if fits and all(type(n) in (int, float) and least <= n <= _LARGEST for n in numbers):
        return None
    return f"{'three numbers' if three else 'a number'}, {words}"
