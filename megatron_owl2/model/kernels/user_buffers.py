"""User buffers of Transformer Engine: communication of tensor parallelism within the GEMMs.

With `parallel.tensor_overlap` a GEMM is cut into pieces, and each piece is sent while the next is
computed (module/base.py and module/linear.py of Transformer Engine):

* `linear_proj`, `linear_fc2`: the reduce-scatter of the output, the all-gather of its gradient;
* `linear_fc1`: the all-gather of the input.

Beside GEMMs, through NCCL and with the switch or without: the second all-gather of the input of
`linear_fc1` and the reduce-scatter of its gradient, in the backward pass. Alone: the all-gather of
the input that the projections to queries, keys and values share, and the reduce-scatter of its
gradient, which are ours (`ParallelContext.copy_to_tensor_parallel`).

Not run on a GPU.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megatron_owl2.config.schema import RunConfig
from megatron_owl2.errors import ConfigError
from megatron_owl2.mcore.parallel import ParallelContext

_BUFFERS = 12  # of Transformer Engine (module/base.py, initialize_ub)


@contextmanager
def user_buffers(config: RunConfig, context: ParallelContext) -> Iterator[None]:
    """The buffers of the run, with `parallel.tensor_overlap`; all ranks enter and leave together.

    Transformer Engine keeps them for the process. Their shape is that of every micro-batch. Raises
    ConfigError where Transformer Engine refuses them.
    """
    if not config.parallel.tensor_overlap:
        yield
        return
    from transformer_engine.pytorch.module import base  # pyright: ignore[reportMissingImports]

    modes = base.UserBufferQuantizationMode
    try:
        base.initialize_ub(
            shape=_shape(config),
            tp_size=context.tensor_parallel_size,
            quantization_modes=[modes.FP8 if context.fp8_recipe else modes.NONE],
            dtype=context.dtype,
            bootstrap_backend=torch.distributed.get_backend(),
        )
    except (AssertionError, RuntimeError) as error:
        raise ConfigError(
            f"parallel.tensor_overlap cannot run here: {error}; or set "
            "parallel.tensor_overlap=false"
        ) from error
    try:
        yield
    finally:
        base.destroy_ub()


def buffer_bytes(config: RunConfig) -> int:
    """Bytes of the buffers of a rank, in bf16 or in bytes for FP8; 0 without them."""
    rows, size = _shape(config)
    width = 2 if config.kernels.fp8 == "none" else 1
    return _BUFFERS * rows * size * width if config.parallel.tensor_overlap else 0


def _shape(config: RunConfig) -> list[int]:
    """Rows of a micro-batch on a rank, and hidden_size."""
    rows = config.data.sequence_length // config.parallel.context * config.train.micro_batch_size
    return [rows, config.model.decoder.hidden_size]
