"""Peak memory of every pipeline rank."""

from dataclasses import dataclass

from megatron_owl2.config.schema import RunConfig
from megatron_owl2.model.kernels.user_buffers import buffer_bytes
from megatron_owl2.planner import schedule
from megatron_owl2.planner.costs import RunCosts
from megatron_owl2.planner.static_memory import StaticMemory, optimizer_share


@dataclass(frozen=True)
class RankMemory:
    """Bytes of the fullest rank of a pipeline rank.

    `activations` are those of all micro-batches that wait for their backward pass, with the peak
    beside them, and user buffers. `update` is the working memory of torch's AdamW (one fp32 number
    for each of its share; a fused one has none), in use when no activations are there.
    """

    held: StaticMemory
    activations: int
    update: int

    @property
    def total(self) -> int:
        return self.held.total + max(self.activations, self.update)


def per_pipeline_rank(config: RunConfig, costs: RunCosts) -> list[RankMemory]:
    """The memory of every pipeline rank under the config's parallelism."""
    parallel = config.parallel
    num_stages = parallel.pipeline * parallel.virtual_pipeline
    # In 4 rounds of the pipeline as much waits as ever will.
    rounds = min(costs.micro_batches(config), 4 * parallel.pipeline)
    found = []
    for rank, held in enumerate(costs.static_memory(config)):
        chunks = [
            costs.activations(config, pipeline_stage)
            for pipeline_stage in range(rank, num_stages, parallel.pipeline)
        ]
        tasks = schedule.order(rank, parallel.pipeline, parallel.virtual_pipeline, rounds)
        peak = schedule.peak_memory(tasks, [c.kept for c in chunks], [c.working for c in chunks])
        peak += max(chunk.shared for chunk in chunks) + buffer_bytes(config)
        found.append(RankMemory(held, peak, 4 * optimizer_share(config, held)))
    return found
