"""How long a step takes: operations at a given rate, the pipeline's bubble, traffic in the way."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_owl2.config.schema import RunConfig
from megatron_owl2.mcore.parallel import layers_per_stage
from megatron_owl2.model import flops
from megatron_owl2.planner import schedule, traffic
from megatron_owl2.planner.activations import ActivationCosts
from megatron_owl2.planner.memory import data_parallel, micro_batches
from megatron_owl2.planner.static_memory import Weight


@dataclass(frozen=True)
class Machine:
    """GPUs and what is assumed of them.

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
        """Bytes of a GPU's memory for the run."""
        return int((self.memory_gib - self.reserve_gib) * 2**30)

    def seconds(self, operations: float) -> float:
        """That one GPU computes for."""
        return operations / (self.peak_tflops * 1e12 * self.mfu)

    def sending(self, size: float, extent: int) -> float:
        """Seconds to send `size` bytes among ranks of which `extent` in a row take part."""
        return size / (1e9 * (self.intra_node if extent <= self.gpus_per_node else self.inter_node))


@dataclass(frozen=True)
class StepTime:
    """Seconds of an optimizer step, and what they are made of on the busiest pipeline rank.

    `compute` with what is recomputed; `layers`: traffic of tensor and context parallelism and
    between stages; `bubble`: waiting for other stages; `data`: what of gradients and parameters is
    not hidden behind a micro-batch.
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
        """Of the time in which the pipeline runs."""
        return self.bubble / (self.compute + self.layers + self.bubble)


def load(config: RunConfig, samples: int, tokens: int | None = None) -> flops.Load:
    """Samples with a picture each, of `tokens` tokens; without it as long as they may be."""
    length = config.data.sequence_length if tokens is None else tokens
    return flops.Load(
        images=samples,
        tokens=samples * length,
        vision_tokens=samples * config.model.tokens_per_image,
        pairs=samples * length * (length + 1) // 2,
    )


def trained(weights: Sequence[Weight]) -> set[str]:
    """The names of what trains."""
    return {weight.name for weight in weights if weight.trained}


def stage_seconds(
    config: RunConfig, machine: Machine, names: set[str]
) -> tuple[list[float], list[float]]:
    """Seconds that a GPU of every stage computes per micro-batch, forward and backward.

    Padding is computed like tokens. Pictures are split over tensor-parallel ranks only.
    """
    parallel = config.parallel
    rows = load(config, config.train.micro_batch_size)
    forward = flops.training_flops(config.model, rows, set())
    both = flops.training_flops(config.model, rows, names)
    again = flops.forward_again(config.model, rows, names, parallel.recompute)
    backward = {part: both[part] - forward[part] + again[part] for part in flops.PARTS}
    counts = layers_per_stage(config)
    found = []
    for spent in (forward, backward):
        layer = spent["decoder"] / config.model.decoder.num_layers / parallel.context
        stages = [layer * count for count in counts]
        stages[0] += spent["ViT"] + spent["abstractor"]
        stages[-1] += spent["output layer"] / parallel.context
        found.append([machine.seconds(stage / parallel.tensor) for stage in stages])
    return found[0], found[1]


def fastest_step(config: RunConfig, machine: Machine, names: set[str]) -> float:
    """Seconds that no estimate of a step is below: the computing of its busiest rank."""
    forward, backward = stage_seconds(config, machine, names)
    pipeline = config.parallel.pipeline
    busiest = max(sum(forward[r::pipeline]) + sum(backward[r::pipeline]) for r in range(pipeline))
    return busiest * micro_batches(config, machine.gpus)


def step_time(
    config: RunConfig, machine: Machine, weights: Sequence[Weight], costs: ActivationCosts
) -> StepTime:
    """The estimate for the config's layout.

    Traffic of the layers is waited for; a third of it belongs to the forward pass. Gradients and
    parameters travel beside one micro-batch where `parallel.overlap` is set.
    """
    parallel = config.parallel
    tp, cp, pipeline = parallel.tensor, parallel.context, parallel.pipeline
    count = micro_batches(config, machine.gpus)
    forward, backward = stage_seconds(config, machine, trained(weights))
    by_rank = [
        sum(forward[rank::pipeline]) + sum(backward[rank::pipeline]) for rank in range(pipeline)
    ]
    # Ranks count tensor first, then context, data, pipeline.
    next_stage = 1 if machine.gpus <= machine.gpus_per_node else machine.gpus_per_node + 1
    waits = []
    for stage in range(len(forward)):
        sent = costs(config, stage).sent
        wait = machine.sending(sent["tensor"], tp) + machine.sending(sent["context"], tp * cp)
        states = (stage > 0) + (stage < len(forward) - 1)
        size = states * traffic.hidden_state_bytes(config)
        waits.append(wait + machine.sending(size, next_stage))
    span = schedule.makespan(
        [f + w / 3 for f, w in zip(forward, waits, strict=True)],
        [b + w * 2 / 3 for b, w in zip(backward, waits, strict=True)],
        pipeline,
        count,
    )
    busiest = max(range(pipeline), key=lambda rank: by_rank[rank] + sum(waits[rank::pipeline]))
    compute, layers = by_rank[busiest] * count, sum(waits[busiest::pipeline]) * count
    data = 0.0
    for rank, sent in enumerate(traffic.per_pipeline_rank(config, machine.gpus, weights, costs)):
        extent = tp * cp * data_parallel(config, machine.gpus)
        gradients = machine.sending(sent.gradients, extent)
        parameters = machine.sending(sent.parameters, extent)
        if parallel.overlap:
            gradients = max(0.0, gradients - sum(backward[rank::pipeline]))
            parameters = max(0.0, parameters - sum(forward[rank::pipeline]))
        data = max(data, gradients + parameters)
    bubble = span - compute - layers
    return StepTime(compute, layers, bubble if bubble > 1e-9 * span else 0.0, data)  # not rounding
