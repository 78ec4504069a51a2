"""Settings of a run's model, held against those of the checkpoint that its weights come from."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_owl2.config.schema import RunConfig
from megatron_owl2.data.tokenizer import Tokenizer
from megatron_owl2.errors import ConfigError
from megatron_owl2.training.checkpoint import directories
from megatron_owl2.training.from_rank_0 import from_rank_0

# What leaves the outputs of given weights as they are.
_FREE = {
    "model.init_std",
    "model.vision.position_init_std",
    "model.abstractor.attention_init_std",
    "model.abstractor.attention_dropout",
    "model.decoder.max_positions",
    "model.decoder.vocab_multiple",
}
# What a new stage may choose: resolution, texts, the way of pixels, longer rotary waves.
_OF_THE_STAGE = {
    "model.vision.image_size",
    "model.decoder.rope_theta",
    "model.template",
    "model.tokenization",
    "model.image_mean",
    "model.image_std",
    "model.image_mode",
}


def check_resumed(config: RunConfig, tokenizer: Tokenizer, directory: Path) -> None:
    """Refusal of a run that would go on with another model or tokenizer; all ranks together.

    Shapes alone do not tell: another rotary base, epsilon, template or vocabulary fits the stored
    weights and spoils what they have learnt. Raises ConfigError naming the keys.
    """
    changed = from_rank_0(lambda: _differences(config, directory, _FREE))
    if not changed and from_rank_0(lambda: _another_tokenizer(tokenizer, directory)):
        changed = [f"data.tokenizer is another than {directory / 'tokenizer.model'}"]
    if changed:
        raise ConfigError(
            f"{'; '.join(changed)}; a run goes on with what {directory} was made with: give the "
            "same, or start another run from it with stage.initial_checkpoint"
        )


def check_initial(config: RunConfig, directory: Path) -> None:
    """Refusal of initial weights that another model has learnt; all ranks together.

    Raises ConfigError naming the keys."""
    free = _FREE | _OF_THE_STAGE
    if changed := from_rank_0(lambda: _differences(config, directory, free)):
        raise ConfigError(
            f"stage.initial_checkpoint: {directory} holds the weights of another model: "
            f"{'; '.join(changed)}; give the values it was made with"
        )


def _differences(config: RunConfig, directory: Path, free: set[str]) -> list[str]:
    """What differs, as "model.decoder.norm_eps was 1e-05 and is 1e-06"."""
    before = dict(_settings(directories.read_config(directory).model))
    return [
        f"{name} was {before[name]} and is {value}"
        for name, value in _settings(config.model)
        if name not in free and value != before[name]
    ]


def _settings(section: Any, name: str = "model") -> Iterator[tuple[str, object]]:
    """The settings of a section and the sections in it, by their dotted names."""
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            yield from _settings(value, f"{name}.{field.name}")
        else:
            yield f"{name}.{field.name}", value


def _another_tokenizer(tokenizer: Tokenizer, directory: Path) -> bool:
    stored = directory / "tokenizer.model"
    return stored.is_file() and Tokenizer(stored).fingerprint != tokenizer.fingerprint
