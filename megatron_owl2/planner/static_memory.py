"""Static memory of every rank, to the byte: parameters, gradients and optimizer states.

It follows from the names, sizes and splits of the whole model, which is built
once without storage, and from how megatron-core lays out its gradient buffers.
"""

import bisect
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from megatron_owl2.config.schema import KernelConfig, ParallelConfig, RunConfig
from megatron_owl2.mcore.parallel import ParallelContext, layers_per_stage
from megatron_owl2.model.owl2 import Owl2, build
from megatron_owl2.model.parts import part_of
from megatron_owl2.planner.fake_process_groups import fake_process_groups
from megatron_owl2.planner.meta_device import build_on_meta_device
from megatron_owl2.training import parameter_groups

BYTES = {"bf16": 2, "fp32": 4}


@dataclass(frozen=True)
class Weight:
    """A parameter of the whole model; `split` says that tensor-parallel ranks share it."""

    name: str
    numel: int
    split: bool
    trained: bool

    def local(self, tensor: int) -> int:
        """The number of its elements on one of `tensor` ranks."""
        return self.numel // tensor if self.split else self.numel

    @property
    def in_kernel_linear(self) -> bool:
        """Whether it is the weight of a linear of `kernels.backend`."""
        return self.name.startswith("decoder.") and ".linear_" in self.name


@dataclass(frozen=True)
class StaticMemory:
    """Bytes that a rank holds from the first step to the last.

    `optimizer` is that of the data-parallel rank with most; they share buffers, not parameters, and
    padding has no state. `copies` are weights in FP8, which Transformer Engine keeps from the first
    micro-batch of a step on, for both passes. `buffer` is the number of elements of the
    gradient buffers, with padding.
    """

    parameters: int
    gradients: int
    optimizer: int
    copies: int
    buffer: int

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.copies


def with_local_kernels(config: RunConfig) -> RunConfig:
    """The same run with torch's GEMMs and attention, which have the same parameters and run
    everywhere, and with the elementwise kernels that a GPU would have."""
    chosen = config.kernels.elementwise
    kernels = KernelConfig(elementwise="fused" if chosen == "auto" else chosen)
    return replace(config, kernels=kernels)


def model_weights(config: RunConfig) -> list[Weight]:
    """All parameters of the model in their order, from the model itself on the meta device."""
    whole = replace(with_local_kernels(config), parallel=ParallelConfig())
    with fake_process_groups(whole.parallel, 1, 0) as groups:
        (model,) = _on_meta(whole, groups)
        return [
            Weight(
                name,
                parameter.numel(),
                getattr(parameter, "tensor_model_parallel", False),
                parameter_groups.is_trainable(name, config.stage),
            )
            for name, parameter in model.named_parameters()
        ]


def weights_by_pipeline_stage(config: RunConfig, weights: Sequence[Weight]) -> list[list[Weight]]:
    """The weights of every pipeline stage, in order (layers_per_stage)."""
    ends = list(itertools.accumulate(layers_per_stage(config)))
    found: list[list[Weight]] = [[] for _ in ends]
    for weight in weights:
        place = part_of(weight.name).pipeline
        if place == "layers":
            layer = int(weight.name.split(".")[2])  # decoder.layers.N
            found[bisect.bisect_right(ends, layer)].append(weight)
        else:
            found[0 if place == "first" else -1].append(weight)
    return found


def static_memory(
    config: RunConfig, world_size: int, weights: Sequence[Weight]
) -> list[StaticMemory]:
    """The static memory of every pipeline rank."""
    parallel, size = config.parallel, BYTES[config.train.precision]
    shards = world_size // (parallel.tensor * parallel.pipeline)  # data x context ranks
    # A byte as it is and one transposed, which not every GPU and recipe need (module/linear.py).
    copied = 0 if config.kernels.fp8 == "none" else 2
    by_stage = weights_by_pipeline_stage(config, weights)
    found = []
    for rank in range(parallel.pipeline):
        frozen = buffer = copies = 0
        own = np.zeros(shards, dtype=np.int64)
        for chunk in range(parallel.virtual_pipeline):
            here = by_stage[chunk * parallel.pipeline + rank]
            frozen += sum(w.local(parallel.tensor) for w in here if not w.trained)
            copies += sum(w.local(parallel.tensor) for w in here if w.in_kernel_linear) * copied
            limit = _bucket_size(config, shards) if rank == chunk == 0 else None
            sizes = [w.local(parallel.tensor) for w in here if w.trained]
            for start, end, places in _buckets(sizes, limit, shards):
                own += _elements_per_rank(start, end, places, shards)
                buffer = buffer + end - start
        found.append(
            StaticMemory(
                parameters=(frozen + buffer) * size,
                gradients=buffer * 4,
                optimizer=int(own.max()) * _state_bytes(config),
                copies=copies,
                buffer=buffer,
            )
        )
    return found


def optimizer_share(config: RunConfig, held: StaticMemory) -> int:
    """The number of parameters that a rank with this static memory has the optimizer's state of."""
    return held.optimizer // _state_bytes(config)


def _state_bytes(config: RunConfig) -> int:
    """Bytes of the optimizer for a parameter: two fp32 moments, and an fp32 weight unless the
    model's own is that."""
    return 12 if BYTES[config.train.precision] == 2 else 8


def check_sharding(config: RunConfig, world_size: int, weights: Sequence[Weight]) -> str:
    """A check of the weights that the plan counts with against the model of every pipeline rank.

    The models are built on the meta device among `world_size` ranks. Returns a sentence about what
    was found: every weight in exactly one pipeline stage, in the planned order and size. Raises
    RuntimeError naming the first that is not.
    """
    parallel = config.parallel
    by_stage = weights_by_pipeline_stage(config, weights)
    local = whole = 0
    for rank in range(parallel.pipeline):
        # The first rank of this pipeline stage: tensor counts first, then context, data,
        # pipeline.
        first = world_size // parallel.pipeline * rank
        with fake_process_groups(parallel, world_size, first) as groups:
            for chunk, model in enumerate(_on_meta(with_local_kernels(config), groups)):
                number = chunk * parallel.pipeline + rank
                planned = by_stage[number]
                built = [(name, p.numel()) for name, p in model.named_parameters()]
                expected = [(w.name, w.local(parallel.tensor)) for w in planned]
                for found, wanted in itertools.zip_longest(built, expected):
                    if found != wanted:
                        raise RuntimeError(
                            f"pipeline stage {number} has {found}, the plan {wanted}"
                        )
                local += sum(numel for _, numel in built)
                whole += sum(w.numel for w in planned)
    stages = "1 pipeline stage" if len(by_stage) == 1 else f"{len(by_stage)} pipeline stages"
    return (
        f"sharding checked on the meta device for {world_size:,} ranks: {stages}, {local:,} "
        f"parameters on one tensor-parallel rank of each, {whole:,} in the model"
    )


def _on_meta(config: RunConfig, groups) -> list[Owl2]:
    context = ParallelContext(config, groups)
    with build_on_meta_device():
        return build(context, config.model, config.parallel.virtual_pipeline)


def _bucket_size(config: RunConfig, shards: int) -> int | None:
    """The number of elements after which the first chunk of the first rank begins another bucket
    (megatron-core, distributed_data_parallel.py); None for one bucket."""
    return max(40_000_000, 1_000_000 * shards) if config.parallel.overlap else None


def _buckets(
    sizes: Sequence[int], limit: int | None, shards: int
) -> Iterator[tuple[int, int, list[tuple[int, int]]]]:
    """Start and end of every bucket of a gradient buffer, and the places of its parameters.

    The buffer holds the parameters from the last to the first, each at a multiple of 64 elements;
    buckets end at a multiple of 128 that all shards divide (megatron-core,
    param_and_grad_buffer.py).
    """
    end = bucket_start = 0
    places = []
    for size in reversed(sizes):
        start = _up(end, 64)
        end = start + size
        places.append((start, end))
        if limit is not None and end - bucket_start >= limit:
            end = _up(end, math.lcm(shards, 128))
            yield bucket_start, end, places
            bucket_start, places = end, []
    if places:
        yield bucket_start, _up(end, math.lcm(shards, 128)), places


def _elements_per_rank(
    start: int, end: int, places: list[tuple[int, int]], shards: int
) -> np.ndarray:
    """Elements of parameters in every rank's equal share of a bucket, int64 [shards]."""
    starts, ends = np.array(places).T
    done = np.concatenate([[0], np.cumsum(ends - starts)])
    cuts = start + (end - start) // shards * np.arange(shards + 1)
    begun = np.searchsorted(starts, cuts, side="right")  # parameters that start below a cut
    last_end = np.where(begun > 0, ends[begun - 1], 0)
    return np.diff(done[begun] - np.maximum(last_end - cuts, 0))


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
