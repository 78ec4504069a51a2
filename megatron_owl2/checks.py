"""What a configuration must satisfy before work starts; every refusal names the fix."""

import dataclasses
import functools
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
    check_settings(config, world_size)
    check_machine(config)
    _check_files(config)


def check_settings(config: RunConfig, world_size: int) -> None:
    """Refuse what no machine and no files would make work; raises ConfigError."""
    check_model(config.model)
    _check_each(config, _uncounted)
    check_layout(config, world_size)
    _one_of(config, "train.precision", "fp32", "bf16")
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
    health = config.health
    _require(
        min(health.step_timeout, health.spike_factor) >= 0,
        f"health.step_timeout ({health.step_timeout}) and health.spike_factor "
        f"({health.spike_factor}) must not be negative",
    )
    _require(
        0 <= config.watch.peak_tflops < math.inf,
        f"watch.peak_tflops ({config.watch.peak_tflops}) must be finite and not negative",
    )
    _one_of(config, "watch.profiler", "none", "torch", "nsys")
    _one_of(config, "wandb.mode", "offline", "online")
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
    tp, pp, cp = parallel.tensor, parallel.pipeline, parallel.context
    _require(
        world_size % (tp * pp * cp) == 0,
        f"{world_size} processes cannot be divided by parallel.tensor ({tp}) x "
        f"parallel.pipeline ({pp}) x parallel.context ({cp}) = {tp * pp * cp}; start a multiple of "
        f"{tp * pp * cp} processes",
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
    _check_stages(config)
    _one_of(config, "parallel.recompute", "none", "selective", "full")
    _require(
        not parallel.sequence or tp > 1,
        "parallel.sequence splits activations over the tensor-parallel ranks; it needs "
        "parallel.tensor > 1",
    )
    length = config.data.sequence_length
    _require(
        cp == 1 or length % (2 * cp) == 0,
        f"data.sequence_length ({length}) is not divisible by 2 x parallel.context ({cp}): every "
        "rank takes one chunk from the front and one from the end",
    )
    _require(
        not parallel.sequence or length // cp % tp == 0,
        f"data.sequence_length ({length}) / parallel.context ({cp}) is not divisible by "
        f"parallel.tensor ({tp}), which parallel.sequence needs",
    )
    data_parallel = world_size // (tp * pp * cp)
    micro_batches, rest = divmod(train.global_batch_size, train.micro_batch_size * data_parallel)
    _require(
        rest == 0,
        f"train.global_batch_size ({train.global_batch_size}) is not a multiple of "
        f"micro_batch_size ({train.micro_batch_size}) x data-parallel ranks "
        f"({data_parallel})",
    )
    _require(
        parallel.virtual_pipeline == 1 or micro_batches % pp == 0,
        f"a step has {micro_batches} micro-batches per data-parallel rank; a virtual pipeline "
        f"needs a multiple of parallel.pipeline ({pp})",
    )
    _check_kernels(config)


def _check_stages(config: RunConfig) -> None:
    """How the decoder is cut over pipeline ranks and their chunks."""
    parallel, layers = config.parallel, config.model.decoder.num_layers
    stages = parallel.pipeline * parallel.virtual_pipeline
    _require(
        parallel.virtual_pipeline == 1 or parallel.pipeline > 1,
        f"parallel.virtual_pipeline is {parallel.virtual_pipeline}, but there is no pipeline; "
        "raise parallel.pipeline or leave it at 1",
    )
    if not parallel.layers:
        _require(
            layers % stages == 0,
            f"model.decoder.num_layers ({layers}) is not divisible by parallel.pipeline x "
            f"parallel.virtual_pipeline = {stages}; name the layers of every stage in "
            "parallel.layers",
        )
        return
    given = parallel.layers
    _require(
        len(given) == stages and sum(given) == layers and min(given) >= 0,
        f"parallel.layers is {given}; it must hold {stages} numbers, none below 0, one for every "
        f"stage of parallel.pipeline x parallel.virtual_pipeline, that add up to {layers}",
    )


def _check_kernels(config: RunConfig) -> None:
    """Refuse kernels that would compute in another precision than asked, or not at all."""
    kernels, model, parallel = config.kernels, config.model, config.parallel
    _one_of(config, "kernels.backend", "local", "transformer_engine")
    _one_of(config, "kernels.fp8", "none", "tensorwise", "delayed", "blockwise", "mxfp8")
    _require(
        kernels.backend == "local" or config.train.precision == "bf16",
        "kernels.backend=transformer_engine computes in bf16; set train.precision to bf16",
    )
    decoder, tp = model.decoder, parallel.tensor
    head = decoder.hidden_size // decoder.num_heads
    _require(
        kernels.backend == "local" or (head % 8 == 0 and head <= 256),
        f"the decoder's heads are {head} wide; the fused attention of "
        "kernels.backend=transformer_engine takes multiples of 8 up to 256; use "
        "kernels.backend=local",
    )
    if kernels.fp8 == "none":
        return
    _require(
        kernels.backend == "transformer_engine",
        f"kernels.fp8={kernels.fp8} needs kernels.backend=transformer_engine; with the local one "
        "the run would be in bf16",
    )
    multiple = 32 if kernels.fp8 == "mxfp8" else 16
    # Scales per block are gathered along the sequence in whole blocks (utils.py and
    # tensor/float8_blockwise_tensor.py of Transformer Engine).
    gathered = 128 if kernels.fp8 == "blockwise" and parallel.sequence else multiple
    shards = parallel.context * (tp if parallel.sequence else 1)
    rows = config.data.sequence_length * config.train.micro_batch_size
    where = f"kernels.fp8={kernels.fp8}"
    where += " with parallel.sequence" if gathered > multiple else ""
    _require(
        rows % (shards * gathered) == 0,
        f"data.sequence_length x train.micro_batch_size = {rows} rows over {shards} ranks; "
        f"{where} needs a multiple of {gathered} on each",
    )
    for name, size, of in (
        ("hidden_size", decoder.hidden_size, gathered),
        ("hidden_size / parallel.tensor", decoder.hidden_size // tp, multiple),
        ("num_kv_heads x head size / parallel.tensor", decoder.num_kv_heads * head // tp, multiple),
        ("ffn_size / parallel.tensor", decoder.ffn_size // tp, multiple),
    ):
        _require(
            size % of == 0, f"model.decoder.{name} is {size}; {where} needs a multiple of {of}"
        )


def check_machine(config: RunConfig) -> None:
    """Refuse what this machine cannot do, before anything is built; raises ConfigError."""
    own_kernels, profiler = config.kernels.backend == "local", config.watch.profiler
    if own_kernels and profiler != "nsys":
        return
    import torch

    for wanted, what, instead in (
        (not own_kernels, "kernels.backend=transformer_engine", "kernels.backend=local"),
        (profiler == "nsys", "watch.profiler=nsys", "watch.profiler=torch"),
    ):
        _require(
            not wanted or torch.cuda.is_available(),
            f"{what} needs a GPU, and torch sees none here; use {instead}",
        )
    if own_kernels:
        return
    try:  # megatron-core's way
        from transformer_engine.pytorch.fp8 import FP8GlobalStateManager
    except (ImportError, OSError, RuntimeError) as error:
        raise ConfigError(
            f"kernels.backend=transformer_engine cannot be imported ({error}); pip install "
            "--no-build-isolation megatron-owl2[gpu]"
        ) from None
    major, minor = torch.cuda.get_device_capability()
    _require(
        major >= 8,
        "kernels.backend=transformer_engine needs compute capability 8.0 for bf16, this GPU has "
        f"{major}.{minor}; use kernels.backend=local",
    )
    support = {
        "blockwise": FP8GlobalStateManager.is_fp8_block_scaling_available,
        "mxfp8": FP8GlobalStateManager.is_mxfp8_available,
    }
    if config.kernels.fp8 != "none":  # it depends on GPU, CUDA and cuBLAS together
        able, reason = support.get(config.kernels.fp8, FP8GlobalStateManager.is_fp8_available)()
        _require(able, f"kernels.fp8={config.kernels.fp8} does not run here: {reason}")


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


def _one_of(config: RunConfig, key: str, *choices: str) -> None:
    value = functools.reduce(getattr, key.split("."), config)
    most, last = ", ".join(choices[:-1]), choices[-1]
    _require(value in choices, f"{key} is {value!r}; use {most} or {last}")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)
