"""Parallel sizes, batches and kernels that fit a model and a number of ranks."""

import math

from megatron_owl2.config.fields import check_section
from megatron_owl2.config.fp8 import FP8_RECIPES, FP8Recipe
from megatron_owl2.config.require import require
from megatron_owl2.config.schema import RunConfig


def validate_parallel(config: RunConfig, world_size: int) -> None:
    """Refuse parallel sizes, a batch or kernels that do not fit the ranks; raises ConfigError."""
    check_section(config.parallel, "parallel.")
    check_section(config.kernels, "kernels.")
    model, parallel, train = config.model, config.parallel, config.train
    tp, pp, cp = parallel.tensor, parallel.pipeline, parallel.context
    require(
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
    ):
        require(size % tp == 0, f"{name} ({size}) is not divisible by parallel.tensor ({tp})")
    decoder = model.decoder
    require(
        decoder.padded_vocab_size % tp == 0,
        f"model.decoder.vocab_size ({decoder.vocab_size}), with padding "
        f"{decoder.padded_vocab_size}, is not divisible by parallel.tensor ({tp}); set "
        f"model.decoder.vocab_multiple ({decoder.vocab_multiple}) to "
        f"{math.lcm(decoder.vocab_multiple, tp)} (a checkpoint keeps its own)",
    )
    _check_pipeline_stages(config)
    require(
        not parallel.sequence or tp > 1,
        "parallel.sequence splits activations over the tensor-parallel ranks; it needs "
        "parallel.tensor > 1",
    )
    require(
        not parallel.tensor_overlap or parallel.sequence,
        "parallel.tensor_overlap overlaps the communication of sequence parallelism; set "
        "parallel.sequence=true, or parallel.tensor_overlap=false",
    )
    length = config.data.sequence_length
    require(
        cp == 1 or length % (2 * cp) == 0,
        f"data.sequence_length ({length}) is not divisible by 2 x parallel.context ({cp}): every "
        "rank takes one piece from the front and one from the end",
    )
    require(
        not parallel.sequence or length // cp % tp == 0,
        f"data.sequence_length ({length}) / parallel.context ({cp}) is not divisible by "
        f"parallel.tensor ({tp}), which parallel.sequence needs",
    )
    data_parallel = world_size // (tp * pp * cp)
    micro_batches, rest = divmod(train.global_batch_size, train.micro_batch_size * data_parallel)
    require(
        rest == 0,
        f"train.global_batch_size ({train.global_batch_size}) is not a multiple of "
        f"micro_batch_size ({train.micro_batch_size}) x data-parallel ranks "
        f"({data_parallel})",
    )
    require(
        parallel.virtual_pipeline == 1 or micro_batches % pp == 0,
        f"a step has {micro_batches} micro-batches per data-parallel rank; a virtual pipeline "
        f"needs a multiple of parallel.pipeline ({pp})",
    )
    _check_kernels(config)


def _check_pipeline_stages(config: RunConfig) -> None:
    """Decoder layers of the pipeline stages."""
    parallel, layers = config.parallel, config.model.decoder.num_layers
    num_stages = parallel.pipeline * parallel.virtual_pipeline
    require(
        parallel.virtual_pipeline == 1 or parallel.pipeline > 1,
        f"parallel.virtual_pipeline is {parallel.virtual_pipeline}, but there is no pipeline; "
        "raise parallel.pipeline or leave it at 1",
    )
    if not parallel.layers:
        require(
            layers % num_stages == 0,
            f"model.decoder.num_layers ({layers}) is not divisible by parallel.pipeline x "
            f"parallel.virtual_pipeline = {num_stages}; name the layers of every "
            "pipeline stage in parallel.layers",
        )
        return
    given = parallel.layers
    require(
        len(given) == num_stages and sum(given) == layers and min(given) >= 0,
        f"parallel.layers is {given}; it must hold {num_stages} numbers, none below 0, one for "
        f"every pipeline stage of parallel.pipeline x parallel.virtual_pipeline, that "
        f"add up to {layers}",
    )


def _check_kernels(config: RunConfig) -> None:
    """Refuse kernels that would compute in another precision than asked, or not at all."""
    kernels, decoder = config.kernels, config.model.decoder
    if kernels.backend == "transformer_engine":
        require(
            config.train.precision == "bf16",
            "kernels.backend=transformer_engine computes in bf16; set train.precision to bf16",
        )
        head = decoder.hidden_size // decoder.num_heads
        require(
            head % 8 == 0 and head <= 256,
            f"the decoder's heads are {head} wide; the fused attention of "
            "kernels.backend=transformer_engine takes multiples of 8 up to 256; use "
            "kernels.backend=local",
        )
    require(
        not config.parallel.tensor_overlap or kernels.backend == "transformer_engine",
        "parallel.tensor_overlap needs the GEMMs of kernels.backend=transformer_engine; set it, or "
        "parallel.tensor_overlap=false",
    )
    require(
        kernels.fp8 == "none" or kernels.backend == "transformer_engine",
        f"kernels.fp8={kernels.fp8} needs kernels.backend=transformer_engine; with the "
        f"{kernels.backend} one the run would be in bf16",
    )
    if kernels.fp8 != "none":
        _check_fp8(config, FP8_RECIPES[kernels.fp8])


def _check_fp8(config: RunConfig, recipe: FP8Recipe) -> None:
    """Refuse sizes that the FP8 GEMMs of the decoder do not take."""
    decoder, parallel = config.model.decoder, config.parallel
    tp, head = parallel.tensor, decoder.hidden_size // decoder.num_heads
    multiple = recipe.gemm_row_alignment
    gathered = recipe.gathered_row_alignment if parallel.sequence else multiple
    if parallel.tensor_overlap:
        require(
            recipe.overlapped_row_alignment is not None,
            f"the user buffers of parallel.tensor_overlap do not take kernels.fp8={recipe.name}; "
            "set parallel.tensor_overlap=false",
        )
        gathered = recipe.overlapped_row_alignment or gathered
    shards = parallel.context * (tp if parallel.sequence else 1)
    rows = config.data.sequence_length * config.train.micro_batch_size
    where = f"kernels.fp8={recipe.name}"
    where += " with parallel.sequence" if gathered > multiple else ""
    require(
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
        require(size % of == 0, f"model.decoder.{name} is {size}; {where} needs a multiple of {of}")
