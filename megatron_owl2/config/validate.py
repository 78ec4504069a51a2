"""What a configuration must satisfy before work starts; every refusal names the fix."""

import dataclasses
import math

from megatron_owl2.config.machine import check_files, check_machine
from megatron_owl2.config.require import check_each, one_of, require
from megatron_owl2.config.schema import RunConfig
from megatron_owl2.config.validate_model import validate_model
from megatron_owl2.config.validate_parallel import validate_parallel

_MAY_BE_ZERO = {
    *("workers", "seed", "warmup_steps", "keep_last", "keep_every", "picture_interval"),
    *("interval", "samples"),
}


def validate(config: RunConfig, world_size: int) -> None:
    """Refuse a run that cannot work on `world_size` ranks, before any process group exists.

    Raises ConfigError naming the keys and the fix; files and directories are looked for here too.
    """
    validate_settings(config, world_size)
    check_machine(config)
    check_files(config)


def validate_settings(config: RunConfig, world_size: int) -> None:
    """Refuse what no machine and no files would make work; raises ConfigError."""
    validate_model(config.model)
    check_each(config, _unfit)
    validate_parallel(config, world_size)
    one_of(config, "train.precision", "fp32", "bf16")
    require(
        config.optimizer.warmup_steps < config.train.steps,
        f"optimizer.warmup_steps ({config.optimizer.warmup_steps}) must be smaller than "
        f"train.steps ({config.train.steps})",
    )
    require(
        config.optimizer.lr > 0 and 0 <= config.optimizer.min_lr <= config.optimizer.lr,
        f"optimizer rates must satisfy 0 <= min_lr ({config.optimizer.min_lr}) <= "
        f"lr ({config.optimizer.lr}) and lr > 0",
    )
    _check_optimizer(config)
    require(
        config.data.sequence_length > config.model.tokens_per_image,
        f"data.sequence_length ({config.data.sequence_length}) leaves no room for text: an "
        f"image takes {config.model.tokens_per_image} tokens",
    )
    require(
        config.data.sequence_length <= config.model.decoder.max_positions,
        f"data.sequence_length ({config.data.sequence_length}) exceeds "
        f"model.decoder.max_positions ({config.model.decoder.max_positions})",
    )

    require(
        0 <= config.data.max_bad_fraction <= 1,
        f"data.max_bad_fraction ({config.data.max_bad_fraction}) must be from 0 to 1",
    )
    health = config.health
    require(
        health.spike_factor == 0 or health.spike_factor > 1,
        f"health.spike_factor ({health.spike_factor}) must be above 1, or about every second step "
        "would be skipped; 0 skips none",
    )
    one_of(config, "watch.profiler", "none", "torch", "nsys")
    one_of(config, "wandb.mode", "offline", "online")
    storage = config.data.storage
    require(
        min(storage.cache_gib, storage.timeout, config.data.stall_timeout) > 0,
        f"data.storage.cache_gib ({storage.cache_gib}), data.storage.timeout ({storage.timeout}) "
        f"and data.stall_timeout ({config.data.stall_timeout}) must be positive",
    )


def _unfit(field: dataclasses.Field, value: object) -> str | None:
    """Every whole number of a run counts something; a few may be 0. The others are amounts."""
    least = 0 if field.name in _MAY_BE_ZERO else 1
    if field.type is int and value < least:
        return f"at least {least}"
    if field.type is float and not 0 <= value < math.inf:
        return "finite and not below 0"
    return None


def _check_optimizer(config: RunConfig) -> None:
    """What AdamW and the rates of a stage can be; raises ConfigError."""
    chosen = config.optimizer
    require(
        max(chosen.beta1, chosen.beta2) < 1 and chosen.eps > 0,
        f"optimizer.beta1 ({chosen.beta1}) and beta2 ({chosen.beta2}) must be below 1, and eps "
        f"({chosen.eps}) above 0",
    )
    require(
        0 < chosen.vision_layer_decay <= 1,
        f"optimizer.vision_layer_decay ({chosen.vision_layer_decay}) must be above 0 and at most "
        "1, which is no decay; freeze what shall not learn with stage.frozen",
    )
    for pattern, rate in config.stage.rates.items():
        require(
            0 <= rate < math.inf,
            f"stage.rates: {pattern!r} has {rate}; a factor must be finite and not below 0",
        )
