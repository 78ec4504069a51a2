"""Estimated time of an optimizer step by cause: computing, communication, waiting, update."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_owl2.config.schema import RunConfig
from megatron_owl2.mcore.parallel import layers_per_stage
from megatron_owl2.planner import schedule, traffic
from megatron_owl2.planner.compute_time import ComputeTime, pipeline_stage_times, update_time
from megatron_owl2.planner.costs import RunCosts
from megatron_owl2.planner.machine import Machine


@dataclass(frozen=True)
class StepTime:
    """Seconds of an optimizer step on the busiest pipeline rank, by cause.

    `gemm`: GEMMs and attention of both passes; `elementwise`: all other kernels of the layers;
    `recompute`: what of both is computed again; `accumulate`: gradients added to their buffers;
    `layers`: communication of tensor and context parallelism and between pipeline stages, as far
    as it is waited for; `bubble`: waiting for other pipeline stages; `data`: what of gradients and
    parameters is not hidden behind a micro-batch; `update`: the optimizer. `padding` is the part of
    the first three that is spent on padding.
    """

    gemm: float
    elementwise: float
    recompute: float
    accumulate: float
    layers: float
    bubble: float
    data: float
    update: float
    padding: float

    @property
    def compute(self) -> float:
        """Seconds that the GPU computes for in the micro-batches."""
        return self.gemm + self.elementwise + self.recompute + self.accumulate

    @property
    def total(self) -> float:
        return self.compute + self.layers + self.bubble + self.data + self.update

    @property
    def bubble_share(self) -> float:
        """The share of the bubble in the time in which the pipeline runs."""
        return self.bubble / (self.compute + self.layers + self.bubble)

    @property
    def overheads(self) -> dict[str, float]:
        """Seconds beside the GEMMs of the model by cause, most first; padding is one of them, so
        that they may overlap."""
        causes = {name: seconds for name, seconds in vars(self).items() if name != "gemm"}
        return dict(sorted(causes.items(), key=lambda cause: -cause[1]))


def fastest_step(config: RunConfig, machine: Machine, costs: RunCosts) -> float:
    """A lower bound of the step time in seconds: the computing of its busiest pipeline rank."""
    stages = pipeline_stage_times(config, machine, costs, least=True)
    pipeline = config.parallel.pipeline
    busiest = max(sum(s.forward + s.backward for s in stages[r::pipeline]) for r in range(pipeline))
    return busiest * costs.micro_batches(config)


def step_time(config: RunConfig, machine: Machine, costs: RunCosts) -> StepTime:
    """The estimate under the config's parallelism.

    What is waited for of the layers' traffic belongs to the forward pass by a third. Gradients and
    parameters travel beside one micro-batch where `parallel.overlap` is set.
    """
    pipeline = config.parallel.pipeline
    count = costs.micro_batches(config)
    stages = pipeline_stage_times(config, machine, costs)
    by_rank = [sum(stages[rank::pipeline], ComputeTime()) for rank in range(pipeline)]
    waits = _communication_seconds(config, machine, costs)
    span = schedule.makespan(
        [stage.forward + wait / 3 for stage, wait in zip(stages, waits, strict=True)],
        [stage.backward + wait * 2 / 3 for stage, wait in zip(stages, waits, strict=True)],
        pipeline,
        count,
    )
    busiest = max(
        range(pipeline),
        key=lambda r: by_rank[r].forward + by_rank[r].backward + sum(waits[r::pipeline]),
    )
    compute, layers = by_rank[busiest] * count, sum(waits[busiest::pipeline]) * count
    bubble = span - compute.forward - compute.backward - layers
    return StepTime(
        gemm=compute.gemm_forward + compute.gemm_backward,
        elementwise=compute.elementwise_forward + compute.elementwise_backward,
        recompute=compute.recompute,
        accumulate=compute.accumulate,
        layers=layers,
        bubble=bubble if bubble > 1e-9 * span else 0.0,  # not rounding
        data=_data_parallel_seconds(config, machine, costs, by_rank),
        update=update_time(config, machine, costs),
        padding=compute.rows * costs.padded_share,
    )


def _communication_seconds(config: RunConfig, machine: Machine, costs: RunCosts) -> list[float]:
    """Seconds per micro-batch that every pipeline stage waits for its layers' collectives and its
    neighbours' hidden states."""
    tp, cp = config.parallel.tensor, config.parallel.context
    waited = 1 - machine.overlap_efficiency * config.parallel.tensor_overlap
    hidden_states = traffic.hidden_state_bytes(costs.shortened(config))
    num_stages = len(layers_per_stage(config))
    # Ranks count tensor first, then context, data, pipeline.
    next_stage = 1 if machine.gpus <= machine.gpus_per_node else machine.gpus_per_node + 1
    waits = []
    for pipeline_stage in range(num_stages):
        sent = costs.sent(config, pipeline_stage)
        wait = machine.sending(sent["tensor"], tp) * waited
        wait += machine.sending(sent["context"], tp * cp, tp)
        states = (pipeline_stage > 0) + (pipeline_stage < num_stages - 1)
        waits.append(wait + machine.sending(states * hidden_states, next_stage, next_stage))
    return waits


def _data_parallel_seconds(
    config: RunConfig,
    machine: Machine,
    costs: RunCosts,
    by_rank: Sequence[ComputeTime],
) -> float:
    """Seconds per step for gradients and parameters that no micro-batch hides."""
    parallel = config.parallel
    extent = parallel.tensor * parallel.context * costs.data_parallel(config)
    longest = 0.0
    for rank, sent in enumerate(traffic.per_pipeline_rank(config, costs)):
        gradients = machine.sending(sent.gradients, extent, parallel.tensor)
        parameters = machine.sending(sent.parameters, extent, parallel.tensor)
        if parallel.overlap:
            gradients = max(0.0, gradients - by_rank[rank].backward)
            parameters = max(0.0, parameters - by_rank[rank].forward)
        longest = max(longest, gradients + parameters)
    return longest
