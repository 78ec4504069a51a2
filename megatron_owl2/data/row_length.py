"""Length of a micro-batch: its longest row and no more, as far as the kernels allow.

Padding is inert, so results do not depend on the length. It follows from the samples of the
micro-batch alone, so a resume finds the same.
"""

import math

from megatron_owl2.config.fp8 import FP8_RECIPES
from megatron_owl2.config.schema import RunConfig

TILE = 16  # positions; keeps the shapes few, and the rows of a GEMM in whole tiles


def row_alignment(config: RunConfig) -> int:
    """Multiple of positions that the micro-batches of a run are as long as.

    Context parallelism cuts rows into 2 pieces per rank and sequence parallelism these over the
    tensor-parallel ranks; FP8 GEMMs take the rows of a rank in multiples
    (config/validate_parallel.py). User buffers have one shape, that of `data.sequence_length`.
    """
    parallel = config.parallel
    if parallel.tensor_overlap:
        return config.data.sequence_length
    shards = parallel.context * (parallel.tensor if parallel.sequence else 1)
    alignment = math.lcm(TILE, shards)
    if parallel.context > 1:
        alignment = math.lcm(alignment, 2 * parallel.context)
    if config.kernels.fp8 != "none":
        recipe = FP8_RECIPES[config.kernels.fp8]
        gathered = parallel.sequence and recipe.gathered_row_alignment
        rows = shards * (gathered or recipe.gemm_row_alignment)
        alignment = math.lcm(alignment, rows // math.gcd(rows, config.train.micro_batch_size))
    return min(alignment, config.data.sequence_length)


def padded_length(longest: int, alignment: int, sequence_length: int) -> int:
    """Positions of a micro-batch whose longest row has `longest`: a multiple of `alignment`, or
    `sequence_length`, which every configuration that is valid can compute."""
    return min(-(-longest // alignment) * alignment, sequence_length)
