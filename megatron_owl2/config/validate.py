"""Checks of a configuration before work starts; every refusal names the key and the fix."""

import math

from megatron_owl2.config.fields import check_section
from megatron_owl2.config.lora import check_lora
from megatron_owl2.config.machine import check_files, check_machine
from megatron_owl2.config.require import require
from megatron_owl2.config.schema import RunConfig
from megatron_owl2.config.templates import check_trainable
from megatron_owl2.config.validate_model import validate_model
from megatron_owl2.config.validate_parallel import validate_parallel


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
    require(
        not config.model.vision.temporal,
        "model.vision.temporal is for inference: training data have no videos, so its adapters "
        "would learn nothing; start from a model for images",
    )
    check_section(config)
    validate_parallel(config, world_size)
    check_trainable(config.model.conversation)
    check_lora(config.stage.lora, config.model)
    if not config.train.epochs:
        check_steps(config)
    _check_rates(config)
    _check_optimizer(config)
    _check_sequence_length(config)
    _check_data(config)
    _check_validation(config)
    factor = config.health.spike_factor
    require(
        factor == 0 or factor > 1,
        f"health.spike_factor ({factor}) must be above 1, or about every second step would be "
        "skipped; 0 skips none",
    )


def check_steps(config: RunConfig) -> None:
    """Refuse a run that would end before its warm-up; raises ConfigError."""
    warmup, steps = config.optimizer.warmup_steps, config.train.steps
    require(
        warmup < steps,
        f"optimizer.warmup_steps ({warmup}) must be smaller than train.steps ({steps})",
    )


def _check_rates(config: RunConfig) -> None:
    """Learning rates, and the factors of a stage on them."""
    chosen = config.optimizer
    require(
        chosen.lr > 0 and 0 <= chosen.min_lr <= chosen.lr,
        f"optimizer rates must satisfy 0 <= min_lr ({chosen.min_lr}) <= "
        f"lr ({chosen.lr}) and lr > 0",
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


def _check_optimizer(config: RunConfig) -> None:
    """Coefficients of AdamW."""
    chosen = config.optimizer
    require(
        max(chosen.beta1, chosen.beta2) < 1 and chosen.eps > 0,
        f"optimizer.beta1 ({chosen.beta1}) and beta2 ({chosen.beta2}) must be below 1, and eps "
        f"({chosen.eps}) above 0",
    )


def _check_sequence_length(config: RunConfig) -> None:
    """Room for an image and text, and positions for all tokens."""
    length, model = config.data.sequence_length, config.model
    require(
        length > model.tokens_per_image,
        f"data.sequence_length ({length}) leaves no room for text: an image takes "
        f"{model.tokens_per_image} tokens",
    )
    require(
        length <= model.decoder.max_positions,
        f"data.sequence_length ({length}) exceeds "
        f"model.decoder.max_positions ({model.decoder.max_positions})",
    )


def check_groups(config: RunConfig) -> None:
    """Refuse groups of sources that do not make up a global batch; raises ConfigError."""
    data, train = config.data, config.train
    for index, source in enumerate(data.sources):
        where = f"data.sources[{index}].group is {source.group!r}"
        if not data.groups:
            require(
                not source.group,
                f"{where}, but data.groups is empty; say there how many samples of a batch the "
                "group has, or name the sources anew without group",
            )
            continue
        require(
            source.group in data.groups,
            f"{where}, and data.groups has {', '.join(data.groups)}; give it one of these, or set "
            "data.groups={} and no group of any source",
        )
    if not data.groups:
        return
    for name, count in data.groups.items():
        require(
            count >= 1,
            f"data.groups.{name} is {count}; it must be at least 1, or leave the group out",
        )
        require(
            not data.sources or any(source.group == name for source in data.sources),
            f"data.groups has {name!r}, but none of data.sources; give one group: {name}, or "
            "begin anew with data.groups={}",
        )
    total = sum(data.groups.values())
    require(
        total == train.global_batch_size,
        f"data.groups adds up to {total} samples of a batch, but train.global_batch_size is "
        f"{train.global_batch_size}; change one of them",
    )
    require(
        not data.packing,
        "data.groups counts samples, of which a packed row has several; set data.packing=false, or "
        "leave out data.groups and give the sources weights",
    )
    require(
        train.epochs == 0,
        f"train.epochs is {train.epochs}, but every group of data.groups comes to the end of its "
        "samples at another step; set train.epochs=0 and give train.steps",
    )


def _check_data(config: RunConfig) -> None:
    """Weights and groups of the sources, and what packed rows need."""
    check_groups(config)
    for group in config.data.groups or [""]:
        weights = [source.weight for source in config.data.sources if source.group == group]
        require(
            all(weights) or not any(weights),
            "data.sources: a weight of 0 stands for a source's number of samples; give it to all "
            f"sources{f' of the group {group}' if group else ''} or to none",
        )
    cp_by_te = config.parallel.context > 1 and config.kernels.backend == "transformer_engine"
    require(
        not (config.data.packing and cp_by_te),
        "data.packing under parallel.context > 1 needs kernels.backend=local: Transformer Engine "
        "cuts every packed sequence over the ranks, so that each would have to divide by 2 x "
        "parallel.context; use parallel.tensor or parallel.pipeline for memory",
    )


def _check_validation(config: RunConfig) -> None:
    """Validation at an interval, for which there are data."""
    chosen = config.validation
    require(
        chosen.interval == 0 or len(chosen.sources) > 0,
        f"validation.interval is {chosen.interval}, but validation.sources is empty; name data "
        "sets that are not trained on, or set validation.interval to 0",
    )
