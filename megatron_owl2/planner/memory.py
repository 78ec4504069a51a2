"""The most bytes that each pipeline rank has at once."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_owl2.config.schema import RunConfig
from megatron_owl2.planner import schedule
from megatron_owl2.planner.activations import ActivationCosts
from megatron_owl2.planner.static_memory import BYTES, StaticMemory, Weight, static_memory


@dataclass(frozen=True)
class RankMemory:
    """Bytes of the fullest rank of a pipeline rank.

    `activations` are those of all micro-batches that wait, with what is worked with beside them.
    `update` is the working memory of torch's AdamW (one fp32 number for each of its share; a fused
    one has none), in use when no activations are there.
    """

    held: StaticMemory
    activations: int
    update: int

    @property
    def total(self) -> int:
        return self.held.total + max(self.activations, self.update)


def per_pipeline_rank(
    config: RunConfig, world_size: int, weights: Sequence[Weight], costs: ActivationCosts
) -> list[RankMemory]:
    """The memory of every pipeline rank of the config's layout."""
    parallel = config.parallel
    stages = parallel.pipeline * parallel.virtual_pipeline
    # In 4 rounds of the pipeline as much waits as ever will.
    rounds = min(micro_batches(config, world_size), 4 * parallel.pipeline)
    found = []
    for rank, rank_held in enumerate(static_memory(config, world_size, weights)):
        chunks = [costs(config, stage) for stage in range(rank, stages, parallel.pipeline)]
        runs = schedule.order(rank, parallel.pipeline, parallel.virtual_pipeline, rounds)
        most = schedule.peak_memory(runs, [c.kept for c in chunks], [c.working for c in chunks])
        most += max(chunk.shared for chunk in chunks)
        moments = rank_held.optimizer // (12 if BYTES[config.train.precision] == 2 else 8) * 4
        found.append(RankMemory(rank_held, most, moments))
    return found


def micro_batches(config: RunConfig, world_size: int) -> int:
    """How many micro-batches every data-parallel rank has in a step."""
    return config.train.global_batch_size // (
        config.train.micro_batch_size * data_parallel(config, world_size)
    )


def data_parallel(config: RunConfig, world_size: int) -> int:
    """How many groups of ranks read samples of their own."""
    parallel = config.parallel
    return world_size // (parallel.tensor * parallel.pipeline * parallel.context)
