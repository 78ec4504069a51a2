"""Differences between the settings of two models, by dotted names."""

import dataclasses
from typing import Any

from megatron_owl2.config.schema import ModelConfig

# What leaves the outputs of given weights as they are, and so is each run's own.
RUN_ONLY = frozenset(
    {
        "model.init_std",
        "model.vision.position_init_std",
        "model.abstractor.attention_init_std",
        "model.abstractor.attention_dropout",
        "model.decoder.max_positions",
        "model.decoder.vocab_multiple",
    }
)


def model_differences(ours: ModelConfig, theirs: ModelConfig) -> dict[str, tuple[Any, Any]]:
    """Our value and theirs of every setting that differs, such as `model.decoder.norm_eps`."""
    return _differences(ours, theirs, "model")


def _differences(ours: Any, theirs: Any, name: str) -> dict[str, tuple[Any, Any]]:
    if not dataclasses.is_dataclass(ours):
        return {} if ours == theirs else {name: (ours, theirs)}
    found = {}
    for field in dataclasses.fields(ours):
        pair = getattr(ours, field.name), getattr(theirs, field.name)
        found |= _differences(*pair, f"{name}.{field.name}")
    return found
