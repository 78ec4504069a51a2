"""The model's door to megatron-core: process groups, parallel linears, and what 0.16 needs mended.

The trainer uses megatron-core's schedules, optimizer and checkpoints directly; what must be changed
in those is in training/optimizer_state.py and training/checkpoint_writer.py.
A linear takes [..., in] and returns [..., out] (megatron-core's own return a bias beside it).
"""

import copy
import importlib.util
import os
import warnings
from datetime import timedelta

import torch

from megatron_owl2 import context, cpu

# One queue per device keeps communication ahead of the GEMM it overlaps with; CUDA reads it once.
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
ON_CPU = cpu.apply()  # before the first megatron.core import, see cpu.py

if ON_CPU:  # kernels that only exist for GPUs are not missed
    warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
# What megatron-core 0.16 says of itself under newer versions of torch is nothing users can mend.
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed|megatron")
for said in (
    "full scope is deprecated",
    "Apex is not installed",
    "The following imports from `dynamic_context.py`",
    "The .grad attribute of a Tensor that is not a leaf",
    "TypedStorage is deprecated",
):
    warnings.filterwarnings("ignore", message=said)

from megatron.core import parallel_state  # noqa: E402
from megatron.core.enums import ModelType  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.core.tensor_parallel import (  # noqa: E402
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
    vocab_parallel_cross_entropy,
)
from megatron.core.transformer.module import MegatronModule  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

from megatron_owl2.config import ParallelConfig, RunConfig  # noqa: E402

__all__ = [
    "ON_CPU",
    "ColumnLinear",
    "Layout",
    "MegatronModule",
    "ModelType",
    "RowLinear",
    "VocabEmbedding",
    "device",
    "initialize",
    "normal",
    "vocab_parallel_cross_entropy",
]


def device() -> torch.device:
    """The device of this rank: its CUDA device, or the CPU where there is no GPU."""
    return torch.device("cpu") if ON_CPU else torch.device("cuda", torch.cuda.current_device())


def initialize(parallel: ParallelConfig, timeout_minutes: int = 30) -> ProcessGroupCollection:
    """Join the process group torchrun describes (NCCL, or gloo on CPU) and lay out the ranks.

    Outside torchrun a group of one process is made. A rank that waits for another longer than
    `timeout_minutes` fails. Returns megatron-core's process groups.
    """
    if not torch.distributed.is_initialized():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        alone = {}
        if "MASTER_ADDR" not in os.environ and os.environ.get("WORLD_SIZE", "1") == "1":
            alone = {"store": torch.distributed.HashStore(), "rank": 0, "world_size": 1}
        torch.distributed.init_process_group(
            "gloo" if ON_CPU else "nccl",
            timeout=timedelta(minutes=timeout_minutes),
            **alone,
        )
    if not parallel_state.model_parallel_is_initialized():
        interleaved = parallel.virtual_pipeline > 1
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor,
            pipeline_model_parallel_size=parallel.pipeline,
            virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if interleaved else None,
            context_parallel_size=parallel.context,
            distributed_timeout_minutes=timeout_minutes,
            # Nobody answers in a fake group (planner/ranks.py), over gloo neither.
            create_gloo_process_groups=torch.distributed.get_backend() != "fake",
        )
    return ProcessGroupCollection.use_mpu_process_groups()


def shutdown() -> None:
    """Leave the process groups; for tests and tools that build several layouts in one process."""
    parallel_state.destroy_model_parallel()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def stage_layers(config: RunConfig) -> list[int]:
    """How many decoder layers each stage has, in the order of the layers.

    Stage n is chunk n // pipeline of pipeline rank n % pipeline.
    """
    if config.parallel.layers:
        return list(config.parallel.layers)
    stages = config.parallel.pipeline * config.parallel.virtual_pipeline
    return [config.model.decoder.num_layers // stages] * stages


def fused_gradients_found() -> bool:
    """Whether apex's kernel is there that adds weight gradients to their buffer in the GEMM."""
    return not ON_CPU and importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None


# Transformer Engine's own choice for every recipe (common/recipe): one scale for a whole tensor
# leaves gradients the wider e5m2, scales per block the finer e4m3 throughout.
_FP8_FORMAT = {
    "none": None,
    "tensorwise": "hybrid",
    "delayed": "hybrid",
    "blockwise": "e4m3",
    "mxfp8": "e4m3",
}


class Layout:
    """What a module must know to build its share: megatron-core's config and process groups.

    `transformer` is the TransformerConfig of the decoder, which the pipeline schedules and the
    gradient buffers read; ViT and abstractor run without sequence parallelism, so their linears
    take the copy `replicated`. `fuses_gradients` has the GEMMs of weight gradients add to the
    buffers of the optimizer, where the backend or apex has the kernel for it; not under full
    recomputation, where a linear gets its weight back without the marks that tell the gradient
    buffers of it (saved-tensor hooks return plain tensors), which end in an assertion.
    """

    def __init__(
        self, config: RunConfig, groups: ProcessGroupCollection, *, fuses_gradients: bool = False
    ):
        decoder, parallel = config.model.decoder, config.parallel
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[config.train.precision]
        self.groups = groups
        self.dtype = dtype
        self.recompute = parallel.recompute
        self.backend, self.fp8 = config.kernels.backend, config.kernels.fp8
        self.fuses_gradients = fuses_gradients and parallel.recompute != "full"
        self._layers = stage_layers(config)
        interleaved = parallel.virtual_pipeline > 1
        self.transformer = TransformerConfig(
            num_layers=len(self._layers),  # for checks of even splits; ours need not be even
            hidden_size=decoder.hidden_size,
            num_attention_heads=decoder.num_heads,
            num_query_groups=decoder.num_kv_heads,
            ffn_hidden_size=decoder.ffn_size,
            tensor_model_parallel_size=parallel.tensor,
            pipeline_model_parallel_size=parallel.pipeline,
            virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if interleaved else None,
            # With two ranks a batch of sends would mix those to the next and to the previous stage.
            overlap_p2p_comm=interleaved,
            batch_p2p_comm=not interleaved,
            context_parallel_size=parallel.context,
            sequence_parallel=parallel.sequence,
            params_dtype=dtype,
            pipeline_dtype=dtype,
            bf16=dtype is torch.bfloat16,
            fp8=_FP8_FORMAT[self.fp8],
            fp8_recipe="delayed" if self.fp8 == "none" else self.fp8,
            fp8_amax_history_len=1024,
            fp8_amax_compute_algo="max",  # one quiet micro-batch must not narrow the range
            use_cpu_initialization=True,  # the same weights for every tensor-parallel size
            calculate_per_token_loss=True,  # micro-batches differ in their number of targets
            gradient_accumulation_fusion=self.fuses_gradients and fused_gradients_found(),
            bias_activation_fusion=False,
            masked_softmax_fusion=False,
            persist_layer_norm=False,
            attention_dropout=0.0,
            hidden_dropout=0.0,
            add_bias_linear=False,
        )
        self.replicated = copy.copy(self.transformer)
        self.replicated.sequence_parallel = False

    def stage(self, chunk: int) -> tuple[int, int, int]:
        """The number of this rank's stage that `chunk` is, and its first and last + 1 layer."""
        number = chunk * self.groups.pp.size() + self.groups.pp.rank()
        return number, sum(self._layers[:number]), sum(self._layers[: number + 1])

    @property
    def stages(self) -> int:
        """How many parts the decoder is cut into, over pipeline ranks and chunks."""
        return len(self._layers)

    @property
    def tensor(self) -> int:
        return self.groups.tp.size()

    @property
    def sequence_parallel(self) -> bool:
        return self.transformer.sequence_parallel

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        """Bring [s/tp, b, h] (or [s, b, h]) to every tensor-parallel rank, once for all readers.

        The backward pass sums the readers' gradients over the ranks, by reduce-scatter under
        sequence parallelism and all-reduce without. Readers are ColumnLinears that `share_input`.
        """
        if self.sequence_parallel:
            return gather_from_sequence_parallel_region(
                x, tensor_parallel_output_grad=True, group=self.groups.tp
            )
        return copy_to_tensor_model_parallel_region(x, group=self.groups.tp)

    def split_context(self, x: torch.Tensor) -> torch.Tensor:
        """This rank's part [s/cp, b, h] of [s, b, h] under context parallelism; else x."""
        size = self.groups.cp.size()
        if size == 1:
            return x
        places = context.positions(len(x), self.groups.cp.rank(), size, x.device)
        return x.index_select(0, places)

    def gather_context(self, x: torch.Tensor) -> torch.Tensor:
        """[s/cp, ...] of all context-parallel ranks one after the other; the backward pass sums."""
        return gather_from_sequence_parallel_region(
            x, tensor_parallel_output_grad=True, group=self.groups.cp
        )

    def split_sequence(self, x: torch.Tensor) -> torch.Tensor:
        """This rank's part [s/tp, b, h] of [s, b, h] under sequence parallelism; else x."""
        if not self.sequence_parallel:
            return x
        return scatter_to_sequence_parallel_region(x, group=self.groups.tp)

    def sequence_slice(self, x: torch.Tensor) -> torch.Tensor:
        """The rows of x [s, ...] that belong to this rank, for tensors without gradient."""
        if not self.sequence_parallel:
            return x
        return x.chunk(self.tensor, dim=0)[self.groups.tp.rank()]

    def sum_over_tensor_ranks(self, x: torch.Tensor) -> torch.Tensor:
        """Sum x over the tensor-parallel ranks, in the forward and in the backward pass."""
        total = reduce_from_tensor_model_parallel_region(x, group=self.groups.tp)
        return copy_to_tensor_model_parallel_region(total, group=self.groups.tp)

    def gather_last(self, x: torch.Tensor) -> torch.Tensor:
        """Concatenate x [..., n/tp] over the tensor-parallel ranks to [..., n]."""
        return gather_from_tensor_model_parallel_region(x, group=self.groups.tp)

    def mark_sequence_parallel(self, *parameters: torch.nn.Parameter) -> None:
        """Have the gradients of replicated parameters that see s/tp rows summed over the ranks."""
        for parameter in parameters:
            parameter.sequence_parallel = self.sequence_parallel


class ColumnLinear(ColumnParallelLinear):
    """y = x W^T + b with W [out, in] split by rows over the tensor-parallel ranks.

    `share_input`: the input comes from `Layout.enter` and is read by other linears too.
    `stride`: W is `stride` equal blocks, each split over the ranks (2 for gate and up).
    """

    def __init__(
        self,
        layout: Layout,
        inputs: int,
        outputs: int,
        *,
        bias: bool,
        init_std: float,
        sequence_parallel: bool = False,
        share_input: bool = False,
        stride: int = 1,
    ):
        super().__init__(
            inputs,
            outputs,
            config=layout.transformer
            if sequence_parallel and not share_input
            else layout.replicated,
            init_method=normal(init_std),
            bias=bias,
            stride=stride,
            disable_grad_reduce=share_input,
            tp_group=layout.groups.tp,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)[0]


class RowLinear(RowParallelLinear):
    """y = x W^T + b with x [..., in/tp] and W [out, in] split by columns; summed over the ranks."""

    def __init__(
        self,
        layout: Layout,
        inputs: int,
        outputs: int,
        *,
        bias: bool,
        init_std: float,
        sequence_parallel: bool = False,
    ):
        super().__init__(
            inputs,
            outputs,
            config=layout.transformer if sequence_parallel else layout.replicated,
            init_method=normal(init_std),
            bias=bias,
            input_is_parallel=True,
            skip_bias_add=False,
            tp_group=layout.groups.tp,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)[0]


class VocabEmbedding(VocabParallelEmbedding):
    """Token ids [b, s] to embeddings [b, s, h], the vocabulary split over the ranks."""

    def __init__(self, layout: Layout, vocab_size: int, hidden_size: int, *, init_std: float):
        super().__init__(
            vocab_size,
            hidden_size,
            init_method=normal(init_std),
            config=layout.replicated,
            tp_group=layout.groups.tp,
        )


def normal(std: float):
    """Fills a tensor from a normal distribution with mean 0, as megatron-core's linears ask."""
    return lambda weight: torch.nn.init.normal_(weight, mean=0.0, std=std)
