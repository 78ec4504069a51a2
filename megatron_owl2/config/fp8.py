"""FP8 recipes: all that the package knows of each, in one table.

A new recipe is a name in `RecipeName` and a row of `FP8_RECIPES`, which checks, Megatron's
configuration, kernels and benchmarks read.
"""

from dataclasses import dataclass
from typing import Literal

RecipeName = Literal["tensorwise", "delayed", "blockwise", "mxfp8"]  # as Megatron's fp8_recipe
FP8 = Literal["none", RecipeName]  # the values of kernels.fp8


@dataclass(frozen=True)
class FP8Recipe:
    """An FP8 recipe of Megatron and Transformer Engine.

    `te_format` is Megatron's `fp8`, of which Transformer Engine chooses the same for every recipe
    (common/recipe): "hybrid" leaves gradients the wider e5m2, as one scale for a whole tensor
    needs; with a scale per block all tensors take the finer e4m3.
    """

    name: RecipeName
    te_format: Literal["hybrid", "e4m3"]
    gemm_row_alignment: int  # of the sizes of every GEMM (megatron-core, fp8_utils.py)
    gathered_row_alignment: int  # the same where sequence parallelism gathers quantized rows
    support_check: str  # method of Transformer Engine's FP8GlobalStateManager
    # As gathered_row_alignment, in user buffers (module/base.py of Transformer Engine); None: they
    # do not take the recipe.
    overlapped_row_alignment: int | None = None


FP8_RECIPES: dict[str, FP8Recipe] = {
    recipe.name: recipe
    for recipe in (
        FP8Recipe("tensorwise", "hybrid", 16, 16, "is_fp8_available", 16),
        FP8Recipe("delayed", "hybrid", 16, 16, "is_fp8_available", 16),
        # Gathered in whole blocks (utils.py, tensor/float8_blockwise_tensor.py of TE).
        FP8Recipe("blockwise", "e4m3", 16, 128, "is_fp8_block_scaling_available"),
        FP8Recipe("mxfp8", "e4m3", 32, 32, "is_mxfp8_available", 128),
    )
}
