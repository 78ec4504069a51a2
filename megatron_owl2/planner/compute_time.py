"""Estimated time that the GPUs of a pipeline stage compute for, by cause."""

from dataclasses import astuple, dataclass, replace

from megatron_owl2.config.schema import RunConfig
from megatron_owl2.mcore.parallel import layers_per_stage
from megatron_owl2.model.parts import find_part
from megatron_owl2.planner.costs import RunCosts
from megatron_owl2.planner.elementwise import PassBytes
from megatron_owl2.planner.machine import Machine
from megatron_owl2.planner.static_memory import BYTES, optimizer_share

# Bytes for every trained number on a rank. In a micro-batch, its gradient is read and added to the
# fp32 buffer; Transformer Engine's GEMM adds it itself, and writes no gradient of its own.
_READ = {"local": 1, "transformer_engine": -1}
# In a step, the buffer is set to zero and divided by the number of tokens.
_BUFFER = 4 + 8
# In a step, for every number of a rank's share of the optimizer: the fp32 gradient's norm and
# clipping, the copy to bf16, and AdamW: torch's in eight kernels (optim/adam.py), TE's in one.
_SHARE = {"local": 4 + 8 + 6 + 80, "transformer_engine": 4 + 8 + 6 + 28}


@dataclass(frozen=True)
class ComputeTime:
    """Seconds that a GPU computes for in a micro-batch, by cause.

    GEMMs have attention with them. `recompute` is both GEMMs and elementwise operations, in the
    backward pass; `accumulate`, which belongs there too, adds gradients to their buffers. `rows` is
    the part of all but `accumulate` that grows with the length of the decoder's rows.
    """

    gemm_forward: float = 0.0
    gemm_backward: float = 0.0
    elementwise_forward: float = 0.0
    elementwise_backward: float = 0.0
    recompute: float = 0.0
    accumulate: float = 0.0
    rows: float = 0.0

    @property
    def forward(self) -> float:
        return self.gemm_forward + self.elementwise_forward

    @property
    def backward(self) -> float:
        own = self.gemm_backward + self.elementwise_backward
        return own + self.recompute + self.accumulate

    def __add__(self, other: "ComputeTime") -> "ComputeTime":
        return ComputeTime(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __mul__(self, count: float) -> "ComputeTime":
        return ComputeTime(*(count * seconds for seconds in astuple(self)))


def pipeline_stage_times(
    config: RunConfig, machine: Machine, costs: RunCosts, *, least: bool = False
) -> list[ComputeTime]:
    """The time of a micro-batch in every pipeline stage, on one GPU; padding is computed as well.

    `least`: a lower bound that needs no passes of the model under the config's own parallelism.
    """
    parallel, model = config.parallel, config.model
    shorter = costs.shortened(config)
    elementwise = costs.elementwise.least if least else costs.elementwise
    moved = elementwise(shorter)
    kept_all = replace(shorter, parallel=replace(parallel, recompute="none"))
    own = moved if least or parallel.recompute == "none" else elementwise(kept_all)
    layers = {
        "first": {
            "vision_model": model.vision.num_layers,
            "abstractor": model.abstractor.num_layers,
        },
        "layers": {"decoder": model.decoder.num_layers},
        "last": {"head": 1},
    }
    place_times = {
        place: _compute_time(config, machine, costs, place, _sum(moved, n), _sum(own, n))
        for place, n in layers.items()
    }
    layer = place_times["layers"] * (1 / model.decoder.num_layers)
    stages = [layer * count for count in layers_per_stage(config)]
    stages[0] += place_times["first"]
    stages[-1] += place_times["last"]
    if least:
        return stages
    accumulate = _accumulating(config, machine, costs)
    return [replace(stage, accumulate=t) for stage, t in zip(stages, accumulate, strict=True)]


def _sum(moved: dict[str, PassBytes], layers: dict[str, int]) -> PassBytes:
    forward, backward = zip(
        *((n * moved[name][0], n * moved[name][1]) for name, n in layers.items()), strict=True
    )
    return sum(forward), sum(backward)


def _compute_time(
    config: RunConfig,
    machine: Machine,
    costs: RunCosts,
    place: str,
    moved: PassBytes,
    own: PassBytes,
) -> ComputeTime:
    """The time of all layers at a place of the pipeline ("first", "layers", "last").

    `own` are the bytes of `moved` without recomputation.
    """
    parallel = config.parallel
    ranks = parallel.tensor * (1 if place == "first" else parallel.context)
    fp8 = config.kernels.fp8 != "none" and place == "layers"
    forward, backward, again = (
        machine.computing(flops / ranks) / (machine.fp8_speedup if fp8 else 1.0)
        for flops in (
            sum(n for group, n in spent.items() if find_part(group).pipeline == place)
            for spent in costs.micro_batch_flops(config)
        )
    )
    found = ComputeTime(
        gemm_forward=forward,
        gemm_backward=backward,
        elementwise_forward=machine.moving(own[0]),
        elementwise_backward=machine.moving(own[1]),
        recompute=again + machine.moving(moved[1] - own[1]),
    )
    in_rows = place != "first"
    return replace(found, rows=found.forward + found.backward if in_rows else 0.0)


def _accumulating(config: RunConfig, machine: Machine, costs: RunCosts) -> list[float]:
    """Seconds in which a micro-batch's gradients are added to their buffers, by pipeline stage."""
    chunks = config.parallel.virtual_pipeline
    size = 8 + _READ[config.kernels.backend] * BYTES[config.train.precision]
    by_rank = [machine.moving(held.buffer * size) for held in costs.static_memory(config)]
    return [seconds / chunks for _ in range(chunks) for seconds in by_rank]


def update_time(config: RunConfig, machine: Machine, costs: RunCosts) -> float:
    """Seconds of the optimizer's update on the busiest rank."""
    return max(
        machine.moving(
            held.buffer * _BUFFER + optimizer_share(config, held) * _SHARE[config.kernels.backend]
        )
        for held in costs.static_memory(config)
    )
