"""Parallel context of a rank: megatron-core's configuration, process groups and collectives."""

import copy
import importlib.util
from typing import TypeVar

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_owl2.config.fp8 import FP8_RECIPES
from megatron_owl2.config.schema import RunConfig
from megatron_owl2.mcore import context_parallel
from megatron_owl2.mcore.setup import on_cpu

Module = TypeVar("Module", bound=torch.nn.Module)


def layers_per_stage(config: RunConfig) -> list[int]:
    """Numbers of decoder layers of all pipeline stages, in the order of the layers.

    Pipeline stage n is chunk n // pipeline of pipeline rank n % pipeline.
    """
    if config.parallel.layers:
        return list(config.parallel.layers)
    count = config.parallel.pipeline * config.parallel.virtual_pipeline
    return [config.model.decoder.num_layers // count] * count


def fused_gradients_found() -> bool:
    """Whether apex's kernel is there that adds weight gradients to their buffer in the GEMM."""
    return not on_cpu() and importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None


class ParallelContext:
    """Parallel context of a rank: megatron-core's config and process groups, which modules build
    their shares from, and the collectives between them.

    `transformer` is the TransformerConfig of the decoder, which the pipeline schedules and the
    gradient buffers read; ViT and abstractor run without sequence parallelism, so their linears
    take the copy `replicated`. `fuses_gradients` asks that the GEMMs of weight gradients add to the
    buffers of the optimizer, and as an attribute says whether some do: Transformer Engine's by
    themselves, local linears where apex's kernel is there. Layers are moved to `device` one by one
    as they are built, or stay where they are made.
    """

    def __init__(
        self,
        config: RunConfig,
        groups: ProcessGroupCollection,
        *,
        fuses_gradients: bool = False,
        device: torch.device | None = None,
    ):
        decoder, parallel = config.model.decoder, config.parallel
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[config.train.precision]
        self.groups = groups
        self.device = device
        self.dtype = dtype
        self.recompute = parallel.recompute
        self.backend = config.kernels.backend
        self.elementwise = config.kernels.elementwise
        self.lora = config.stage.lora
        self.seed = config.train.seed  # of what is drawn as the model runs
        self.fp8_recipe = recipe = FP8_RECIPES.get(config.kernels.fp8)  # None: no FP8
        local_fusion = fuses_gradients and fused_gradients_found()
        te_fusion = fuses_gradients and self.backend == "transformer_engine"
        self.fuses_gradients = local_fusion or te_fusion
        self._layers = layers_per_stage(config)
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
            # With two ranks a batch of sends would mix those to the next and to the previous rank.
            overlap_p2p_comm=interleaved,
            batch_p2p_comm=not interleaved,
            batch_p2p_sync=False,  # a way around a fault of old versions of torch
            # Of a tensor that was sent only its graph is used again. The interleaved schedule would
            # free some while they are being sent; and a stage without layers sends its very input,
            # or a view, whose gradient needs its shape.
            deallocate_pipeline_outputs=not interleaved and all(self._layers),
            context_parallel_size=parallel.context,
            sequence_parallel=parallel.sequence,
            tp_comm_overlap=parallel.tensor_overlap,
            params_dtype=dtype,
            pipeline_dtype=dtype,
            bf16=dtype is torch.bfloat16,
            fp8=recipe.te_format if recipe else None,
            fp8_recipe=recipe.name if recipe else "delayed",
            fp8_amax_history_len=1024,
            fp8_amax_compute_algo="max",  # one quiet micro-batch must not narrow the range
            use_cpu_initialization=True,  # the same weights for every tensor-parallel size
            calculate_per_token_loss=True,  # micro-batches differ in their number of targets
            gradient_accumulation_fusion=local_fusion,
            bias_activation_fusion=False,
            masked_softmax_fusion=False,
            persist_layer_norm=False,
            attention_dropout=0.0,
            hidden_dropout=0.0,
            add_bias_linear=False,
        )
        self.replicated = copy.copy(self.transformer)
        self.replicated.sequence_parallel = False

    def place(self, module: Module) -> Module:
        """The module, moved to `device` if there is one."""
        return module if self.device is None else module.to(self.device)

    def layer_range(self, chunk: int) -> tuple[int, int, int]:
        """Pipeline stage that model chunk `chunk` of this rank is, and its first and last + 1
        layer."""
        number = chunk * self.groups.pp.size() + self.groups.pp.rank()
        return number, sum(self._layers[:number]), sum(self._layers[: number + 1])

    @property
    def num_pipeline_stages(self) -> int:
        """Number of pipeline stages over all pipeline ranks and chunks."""
        return len(self._layers)

    @property
    def tensor_parallel_size(self) -> int:
        return self.groups.tp.size()

    @property
    def sequence_parallel(self) -> bool:
        return self.transformer.sequence_parallel

    def copy_to_tensor_parallel(self, x: torch.Tensor) -> torch.Tensor:
        """Bring [s/tp, b, h] (or [s, b, h]) to every tensor-parallel rank, once for all readers.

        The backward pass sums the readers' gradients over the ranks, by reduce-scatter under
        sequence parallelism and all-reduce without. Readers are ColumnLinears that `share_input`.
        """
        if self.sequence_parallel:
            return gather_from_sequence_parallel_region(
                x, tensor_parallel_output_grad=True, group=self.groups.tp
            )
        if self.tensor_parallel_size == 1:
            return x
        return copy_to_tensor_model_parallel_region(x, group=self.groups.tp)

    def sum_row_outputs(self, x: torch.Tensor) -> torch.Tensor:
        """Sum x [s, b, n] over the tensor-parallel ranks as a row linear does its output: to
        [s/tp, b, n] of this rank under sequence parallelism, else [s, b, n]."""
        if self.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(x, group=self.groups.tp)
        return reduce_from_tensor_model_parallel_region(x, group=self.groups.tp)

    def split_context(self, x: torch.Tensor) -> torch.Tensor:
        """This rank's part [s/cp, b, h] of [s, b, h] under context parallelism; else x."""
        size = self.groups.cp.size()
        if size == 1:
            return x
        places = context_parallel.positions(len(x), self.groups.cp.rank(), size, x.device)
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
        return x.chunk(self.tensor_parallel_size, dim=0)[self.groups.tp.rank()]

    def sum_over_tensor_ranks(self, x: torch.Tensor) -> torch.Tensor:
        """Sum x over the tensor-parallel ranks, in the forward and in the backward pass."""
        total = reduce_from_tensor_model_parallel_region(x, group=self.groups.tp)
        return copy_to_tensor_model_parallel_region(total, group=self.groups.tp)

    def gather_logits(self, x: torch.Tensor) -> torch.Tensor:
        """Concatenate x [..., n/tp] over the tensor-parallel ranks to [..., n]."""
        if self.tensor_parallel_size == 1:
            return x
        return gather_from_tensor_model_parallel_region(x, group=self.groups.tp)

    def mark_sequence_parallel(self, *parameters: torch.nn.Parameter) -> None:
        """Have the gradients of replicated parameters that see s/tp rows summed over the ranks."""
        for parameter in parameters:
            # megatron-core keeps its marks on the parameters themselves.
            parameter.sequence_parallel = self.sequence_parallel  # pyright: ignore[reportAttributeAccessIssue]


def mark_tensor_parallel(
    parameter: torch.nn.Parameter | None, *, dim: int, stride: int = 1
) -> None:
    """Mark a parameter as split along `dim` over the tensor-parallel ranks, as megatron-core does
    where it gives it values; it is `stride` equal blocks, each of which is split."""
    assert parameter is not None, "these linears have weights of their own"
    for name, value in (
        ("tensor_model_parallel", True),
        ("partition_dim", dim),
        ("partition_stride", stride),
    ):
        setattr(parameter, name, value)
