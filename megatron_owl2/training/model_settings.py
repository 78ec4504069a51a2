"""Settings of a run's model, held against those of the checkpoint that its weights come from."""

from collections.abc import Set
from pathlib import Path

from megatron_owl2.config.model_differences import RUN_ONLY, model_differences
from megatron_owl2.config.schema import RunConfig
from megatron_owl2.data.tokenizer import Tokenizer
from megatron_owl2.errors import ConfigError
from megatron_owl2.training.checkpoint import directories
from megatron_owl2.training.from_rank_0 import from_rank_0

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

    def changes() -> list[str]:
        stored = directory / "tokenizer.model"
        if changed := _changes(config, directory, RUN_ONLY):
            return changed
        same = not stored.is_file() or stored.read_bytes() == tokenizer.data
        return [] if same else [f"data.tokenizer is another than {stored}"]

    if changed := from_rank_0(changes):
        raise ConfigError(
            f"{'; '.join(changed)}; a run goes on with what {directory} was made with: give the "
            "same, or start another run from it with stage.initial_checkpoint"
        )


def check_initial(config: RunConfig, directory: Path) -> None:
    """Refusal of initial weights that another model has learnt; all ranks together.

    Raises ConfigError naming the keys."""
    free = RUN_ONLY | _OF_THE_STAGE
    if changed := from_rank_0(lambda: _changes(config, directory, free)):
        raise ConfigError(
            f"stage.initial_checkpoint: {directory} holds the weights of another model: "
            f"{'; '.join(changed)}; give the values it was made with"
        )


def _changes(config: RunConfig, directory: Path, free: Set[str]) -> list[str]:
    """What differs, as "model.decoder.norm_eps was 1e-05 and is 1e-06"."""
    differing = model_differences(config.model, directories.read_config(directory).model)
    return [f"{n} was {was} and is {now}" for n, (now, was) in differing.items() if n not in free]
