"""What a configuration must satisfy before work starts; every refusal names the fix."""

import dataclasses
import math

from megatron_owl2.checks.layout import check_layout
from megatron_owl2.checks.machine import check_files, check_machine
from megatron_owl2.checks.model import check_model
from megatron_owl2.checks.require import check_each, one_of, require
from megatron_owl2.config import RunConfig

__all__ = ["check", "check_layout", "check_machine", "check_model", "check_settings"]

_MAY_BE_ZERO = {"workers", "seed", "warmup_steps", "keep_last", "keep_every", "picture_interval"}


def check(config: RunConfig, world_size: int) -> None:
    """Refuse a run that cannot work on `world_size` ranks, before any process group exists.

    Raises ConfigError naming the keys and the fix; files and directories are looked for here too.
    """
    check_settings(config, world_size)
    check_machine(config)
    check_files(config)


def check_settings(config: RunConfig, world_size: int) -> None:
    """Refuse what no machine and no files would make work; raises ConfigError."""
    check_model(config.model)
    check_each(config, _uncounted)
    check_layout(config, world_size)
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
        min(health.step_timeout, health.spike_factor) >= 0,
        f"health.step_timeout ({health.step_timeout}) and health.spike_factor "
        f"({health.spike_factor}) must not be negative",
    )
    require(
        0 <= config.watch.peak_tflops < math.inf,
        f"watch.peak_tflops ({config.watch.peak_tflops}) must be finite and not negative",
    )
    one_of(config, "watch.profiler", "none", "torch", "nsys")
    one_of(config, "wandb.mode", "offline", "online")
    storage = config.data.storage
    require(
        min(storage.cache_gib, storage.timeout, config.data.stall_timeout) > 0,
        f"data.storage.cache_gib ({storage.cache_gib}), data.storage.timeout ({storage.timeout}) "
        f"and data.stall_timeout ({config.data.stall_timeout}) must be positive",
    )


def _uncounted(field: dataclasses.Field, value: object) -> str | None:
    """Every whole number of a run counts something; a few may be 0."""
    least = 0 if field.name in _MAY_BE_ZERO else 1
    return f"at least {least}" if field.type is int and value < least else None
