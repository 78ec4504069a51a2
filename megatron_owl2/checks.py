"""What a configuration must satisfy before work starts; every refusal names the fix."""

import dataclasses
import math
import sys
from collections.abc import Callable
from pathlib import Path

from megatron_owl2.config import MODALITY_SPLIT, ConfigError, ModelConfig, RunConfig

# Beyond every model: more is a mistake, which otherwise shows after minutes or in lost memory.
_MOST, _MOST_LAYERS, _MOST_POSITIONS = 2**24, 1000, 2**28
_LARGEST = sys.float_info.max
# The least value and its words, where a number need not be above 0.
_LEAST = {"image_mean": (-_LARGEST, "finite")} | dict.fromkeys(
    ("init_std", "position_init_std", "attention_init_std"), (0, "finite and not below 0")
)

_MAY_BE_ZERO = {"workers", "seed", "warmup_steps", "keep_last", "keep_every", "picture_interval"}


def check(config: RunConfig, world_size: int) -> None:
    """Refuse a run that cannot work on `world_size` ranks, before any process group exists.

    Raises ConfigError naming the keys and the fix; files and directories are looked for here too.
    """
    check_model(config.model)
    _check_each(config, _uncounted)
    check_layout(config, world_size)
    _check_files(config)
    _require(
        config.train.precision in ("fp32", "bf16"),
        f"train.precision is {config.train.precision!r}; use fp32 or bf16",
    )
    _require(
        config.optimizer.warmup_steps < config.train.steps,
        f"optimizer.warmup_steps ({config.optimizer.warmup_steps}) must be smaller than "
        f"train.steps ({config.train.steps})",
    )
    _require(
        config.optimizer.lr > 0 and 0 <= config.optimizer.min_lr <= config.optimizer.lr,
        f"optimizer rates must satisfy 0 <= min_lr ({config.optimizer.min_lr}) <= "
        f"lr ({config.optimizer.lr}) and lr > 0",
    )
    _require(
        config.data.sequence_length > config.model.tokens_per_image,
        f"data.sequence_length ({config.data.sequence_length}) leaves no room for text: an "
        f"image takes {config.model.tokens_per_image} tokens",
    )
    _require(
        config.data.sequence_length <= config.model.decoder.max_positions,
        f"data.sequence_length ({config.data.sequence_length}) exceeds "
        f"model.decoder.max_positions ({config.model.decoder.max_positions})",
    )

    _require(
        0 <= config.data.max_bad_fraction <= 1,
        f"data.max_bad_fraction ({config.data.max_bad_fraction}) must be from 0 to 1",
    )
    storage = config.data.storage
    _require(
        min(storage.cache_gib, storage.timeout, config.data.stall_timeout) > 0,
        f"data.storage.cache_gib ({storage.cache_gib}), data.storage.timeout ({storage.timeout}) "
        f"and data.stall_timeout ({config.data.stall_timeout}) must be positive",
    )


def check_model(model: ModelConfig) -> None:
    """Refuse numbers that no model has and sizes that do not fit together; raises ConfigError."""
    _check_each(model, misfit, "model.")
    vision, decoder = model.vision, model.decoder
    _require(
        vision.image_size % vision.patch_size == 0,
        f"model.vision.image_size ({vision.image_size}) is not divisible by "
        f"model.vision.patch_size ({vision.patch_size}); use a multiple of the patch",
    )
    for name, width, heads in (
        ("model.vision", vision.hidden_size, vision.num_heads),
        ("model.abstractor", vision.hidden_size, model.abstractor.num_heads),
        ("model.decoder", decoder.hidden_size, decoder.num_heads),
    ):
        _require(
            width % heads == 0, f"{name}.num_heads ({heads}) does not divide the width ({width})"
        )
    _require(
        vision.hidden_size % 4 == 0,
        f"model.vision.hidden_size ({vision.hidden_size}) must be a multiple of 4 for the "
        "two-dimensional position table of the abstractor",
    )
    positions = (vision.grid_size**2 + 1 + model.abstractor.num_queries) * vision.hidden_size
    _require(
        positions <= _MOST_POSITIONS,
        f"the abstractor needs position tables of {positions} numbers, at most {_MOST_POSITIONS} "
        "can be; lower model.vision.image_size or model.abstractor.num_queries",
    )
    _require(
        decoder.num_heads % decoder.num_kv_heads == 0,
        f"model.decoder.num_heads ({decoder.num_heads}) is not a multiple of "
        f"num_kv_heads ({decoder.num_kv_heads})",
    )
    _require(
        (decoder.hidden_size // decoder.num_heads) % 2 == 0,
        "the decoder's head size must be even for rotary positions; change "
        "model.decoder.num_heads or hidden_size",
    )
    split = decoder.modality_split
    _require(
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


def check_layout(config: RunConfig, world_size: int) -> None:
    """Refuse a parallel layout or batch that the ranks cannot carry; raises ConfigError."""
    model, parallel, train = config.model, config.parallel, config.train
    tp, pp = parallel.tensor, parallel.pipeline
    _require(
        world_size % (tp * pp) == 0,
        f"{world_size} processes cannot be divided by parallel.tensor ({tp}) x "
        f"parallel.pipeline ({pp}) = {tp * pp}; start a multiple of {tp * pp} processes",
    )
    for name, size in (
        ("model.vision.num_heads", model.vision.num_heads),
        ("model.vision.ffn_size", model.vision.ffn_size),
        ("model.abstractor.num_heads", model.abstractor.num_heads),
        ("model.abstractor.ffn_size", model.abstractor.ffn_size),
        ("model.decoder.num_heads", model.decoder.num_heads),
        ("model.decoder.num_kv_heads", model.decoder.num_kv_heads),
        ("model.decoder.ffn_size", model.decoder.ffn_size),
        ("model.decoder.vocab_size", model.decoder.vocab_size),
    ):
        _require(size % tp == 0, f"{name} ({size}) is not divisible by parallel.tensor ({tp})")
    _require(
        model.decoder.num_layers % pp == 0,
        f"model.decoder.num_layers ({model.decoder.num_layers}) is not divisible by "
        f"parallel.pipeline ({pp})",
    )
    _require(
        not parallel.sequence or tp > 1,
        "parallel.sequence splits activations over the tensor-parallel ranks; it needs "
        "parallel.tensor > 1",
    )
    _require(
        not parallel.sequence or config.data.sequence_length % tp == 0,
        f"data.sequence_length ({config.data.sequence_length}) is not divisible by "
        f"parallel.tensor ({tp}), which parallel.sequence needs",
    )
    data_parallel = world_size // (tp * pp)
    _require(
        train.global_batch_size % (train.micro_batch_size * data_parallel) == 0,
        f"train.global_batch_size ({train.global_batch_size}) is not a multiple of "
        f"micro_batch_size ({train.micro_batch_size}) x data-parallel ranks "
        f"({data_parallel})",
    )


def _check_each(
    section: object,
    judge: Callable[[dataclasses.Field, object], str | None],
    prefix: str = "",
) -> None:
    """Hold every value of a section and of the sections in it against what it must be."""
    for entry in dataclasses.fields(section):
        value, name = getattr(section, entry.name), f"{prefix}{entry.name}"
        if dataclasses.is_dataclass(value):
            _check_each(value, judge, f"{name}.")
        elif wanted := judge(entry, value):
            raise ConfigError(f"{name} is {value!r}; it must be {wanted}")


def _uncounted(field: dataclasses.Field, value: object) -> str | None:
    """Every whole number of a run counts something; a few may be 0."""
    least = 0 if field.name in _MAY_BE_ZERO else 1
    return f"at least {least}" if field.type is int and value < least else None


def _check_files(config: RunConfig) -> None:
    _require(config.train.output != "", "train.output is not set; name the run directory")
    _require(config.data.tokenizer != "", "data.tokenizer is not set; name a SentencePiece model")
    _require(
        Path(config.data.tokenizer).is_file(),
        f"data.tokenizer: {config.data.tokenizer} does not exist",
    )
    _require(len(config.data.sources) > 0, "data.sources is empty; name at least one data set")
    for index, source in enumerate(config.data.sources):
        _require(
            0 < source.weight < math.inf,
            f"data.sources[{index}].weight ({source.weight}) must be positive and finite",
        )
        if "://" in source.path:
            _require(
                config.data.storage.cache != "",
                f"data.sources[{index}] is read over a network; set data.storage.cache to a folder "
                "on a local disk of the nodes",
            )
            continue
        _require(
            (Path(source.path) / "manifest.json").is_file(),
            f"data.sources[{index}]: {source.path or '(empty path)'} holds no manifest.json; "
            "make shards with tools/preprocess_data.py",
        )
    initial = config.stage.initial_checkpoint
    _require(
        initial is None or Path(initial).is_dir(),
        f"stage.initial_checkpoint: {initial} is not a directory",
    )


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)
