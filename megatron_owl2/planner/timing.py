"""Estimated time of an optimizer step: computation, pipeline bubble, communication."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_owl2.config.schema import RunConfig
from megatron_owl2.mcore.parallel import layers_per_stage
from megatron_owl2.model.parts import find_part
from megatron_owl2.planner import schedule, traffic
from megatron_owl2.planner.costs import RunCosts


@dataclass(frozen=True)
class Machine:
    """The GPUs of a job and what is assumed of them.

    `mfu` is the share of `peak_tflops` that a GPU reaches while it computes. `intra_node` and
    `inter_node` are GB/s that a GPU sends at to GPUs of its node and of other nodes. `reserve_gib`
    of the memory is for CUDA, NCCL and what the allocator cannot use.
    """

    gpus: int
    memory_gib: float
    gpus_per_node: int = 8
    reserve_gib: float = 4.0
    peak_tflops: float = 989.0  # an H100 in bf16, dense
    mfu: float = 0.4
    intra_node: float = 300.0
    inter_node: float = 40.0

    @property
    def usable(self) -> int:
        """Bytes of a GPU's memory that the run may take."""
        return int((self.memory_gib - self.reserve_gib) * 2**30)

    def seconds(self, operations: float) -> float:
        """Seconds that one GPU computes for."""
        return operations / (self.peak_tflops * 1e12 * self.mfu)

    def sending(self, size: float, extent: int) -> float:
        """Seconds to send `size` bytes among ranks of which `extent` in a row take part."""
        return size / (1e9 * (self.intra_node if extent <= self.gpus_per_node else self.inter_node))


@dataclass(frozen=True)
class StepTime:
    """Seconds of an optimizer step on the busiest pipeline rank, by cause.

    `compute`: with what is recomputed; `layers`: communication of tensor and context parallelism
    and between pipeline stages; `bubble`: waiting for other pipeline stages; `data`: what of
    gradients and parameters is not hidden behind a micro-batch.
    """

    compute: float
    layers: float
    bubble: float
    data: float

    @property
    def total(self) -> float:
        return self.compute + self.layers + self.bubble + self.data

    @property
    def bubble_share(self) -> float:
        """The share of the bubble in the time in which the pipeline runs."""
        return self.bubble / (self.compute + self.layers + self.bubble)


def stage_seconds(
    config: RunConfig, machine: Machine, costs: RunCosts
) -> tuple[list[float], list[float]]:
    """Seconds that a GPU of every pipeline stage computes per micro-batch, forward and backward.

    Padding is computed like tokens. Images are split over tensor-parallel ranks only.
    """
    parallel = config.parallel
    counts = layers_per_stage(config)
    found = []
    for spent in costs.micro_batch_flops(config):
        layer = sum(_of_pipeline(spent, "layers")) / config.model.decoder.num_layers
        stage_flops = [layer / parallel.context * count for count in counts]
        stage_flops[0] += sum(_of_pipeline(spent, "first"))
        stage_flops[-1] += sum(_of_pipeline(spent, "last")) / parallel.context
        found.append([machine.seconds(flops / parallel.tensor) for flops in stage_flops])
    return found[0], found[1]


def _of_pipeline(spent: dict[str, float], pipeline: str) -> list[float]:
    """The FLOPs of the groups that are at this end of the pipeline, or in its layers."""
    return [n for group, n in spent.items() if find_part(group).pipeline == pipeline]


def fastest_step(config: RunConfig, machine: Machine, costs: RunCosts) -> float:
    """A lower bound of the step time in seconds: the computing of its busiest pipeline rank."""
    forward, backward = stage_seconds(config, machine, costs)
    pipeline = config.parallel.pipeline
    busiest = max(sum(forward[r::pipeline]) + sum(backward[r::pipeline]) for r in range(pipeline))
    return busiest * costs.micro_batches(config)


def step_time(config: RunConfig, machine: Machine, costs: RunCosts) -> StepTime:
    """The estimate under the config's parallelism.

    Traffic of the layers is waited for; a third of it belongs to the forward pass. Gradients and
    parameters travel beside one micro-batch where `parallel.overlap` is set.
    """
    pipeline = config.parallel.pipeline
    count = costs.micro_batches(config)
    forward, backward = stage_seconds(config, machine, costs)
    by_rank = [
        sum(forward[rank::pipeline]) + sum(backward[rank::pipeline]) for rank in range(pipeline)
    ]
    waits = _communication_seconds(config, machine, costs)
    span = schedule.makespan(
        [f + w / 3 for f, w in zip(forward, waits, strict=True)],
        [b + w * 2 / 3 for b, w in zip(backward, waits, strict=True)],
        pipeline,
        count,
    )
    busiest = max(range(pipeline), key=lambda rank: by_rank[rank] + sum(waits[rank::pipeline]))
    compute, layers = by_rank[busiest] * count, sum(waits[busiest::pipeline]) * count
    bubble = span - compute - layers
    return StepTime(
        compute,
        layers,
        bubble if bubble > 1e-9 * span else 0.0,  # not rounding
        _data_parallel_seconds(config, machine, costs, forward, backward),
    )


def _communication_seconds(config: RunConfig, machine: Machine, costs: RunCosts) -> list[float]:
    """Seconds per micro-batch that every pipeline stage waits for its layers' collectives and its
    neighbours' hidden states."""
    tp, cp = config.parallel.tensor, config.parallel.context
    num_stages = len(layers_per_stage(config))
    # Ranks count tensor first, then context, data, pipeline.
    next_stage = 1 if machine.gpus <= machine.gpus_per_node else machine.gpus_per_node + 1
    waits = []
    for pipeline_stage in range(num_stages):
        sent = costs.activations(config, pipeline_stage).sent
        wait = machine.sending(sent["tensor"], tp) + machine.sending(sent["context"], tp * cp)
        states = (pipeline_stage > 0) + (pipeline_stage < num_stages - 1)
        size = states * traffic.hidden_state_bytes(config)
        waits.append(wait + machine.sending(size, next_stage))
    return waits


def _data_parallel_seconds(
    config: RunConfig,
    machine: Machine,
    costs: RunCosts,
    forward: Sequence[float],
    backward: Sequence[float],
) -> float:
    """Seconds per step for gradients and parameters that no micro-batch hides."""
    parallel = config.parallel
    extent = parallel.tensor * parallel.context * costs.data_parallel(config)
    longest = 0.0
    for rank, sent in enumerate(traffic.per_pipeline_rank(config, costs)):
        gradients = machine.sending(sent.gradients, extent)
        parameters = machine.sending(sent.parameters, extent)
        if parallel.overlap:
            gradients = max(0.0, gradients - sum(backward[rank :: parallel.pipeline]))
            parameters = max(0.0, parameters - sum(forward[rank :: parallel.pipeline]))
        longest = max(longest, gradients + parameters)
    return longest
