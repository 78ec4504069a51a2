"""The bytes that a rank of every pipeline rank sends in one optimizer step, by what for."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_owl2.config.schema import RunConfig
from megatron_owl2.planner.activations import ActivationCosts
from megatron_owl2.planner.memory import micro_batches
from megatron_owl2.planner.static_memory import BYTES, Weight, static_memory


@dataclass(frozen=True)
class RankTraffic:
    """Bytes that one rank sends per step; a ring's share where many take part.

    `tensor` and `context`: collectives of the layers, in both passes of all micro-batches;
    `pipeline`: hidden states to the next stage and their gradients to the one before; `gradients`:
    their sum over data and context ranks; `parameters`: the updated ones to all of these.
    """

    tensor: int
    context: int
    pipeline: int
    gradients: int
    parameters: int


def per_pipeline_rank(
    config: RunConfig, world_size: int, weights: Sequence[Weight], costs: ActivationCosts
) -> list[RankTraffic]:
    """The traffic of every pipeline rank of the config's layout."""
    parallel = config.parallel
    stages = parallel.pipeline * parallel.virtual_pipeline
    count = micro_batches(config, world_size)
    shards = world_size // (parallel.tensor * parallel.pipeline)
    found = []
    for rank, rank_held in enumerate(static_memory(config, world_size, weights)):
        own = range(rank, stages, parallel.pipeline)
        sent = [costs(config, stage).sent for stage in own]
        # The first stage has none before it, the last none after it.
        states = sum((stage < stages - 1) + (stage > 0) for stage in own)
        found.append(
            RankTraffic(
                tensor=sum(s["tensor"] for s in sent) * count,
                context=sum(s["context"] for s in sent) * count,
                pipeline=states * hidden_state_bytes(config) * count,
                gradients=rank_held.buffer * 4 * (shards - 1) // shards,
                parameters=rank_held.buffer
                * BYTES[config.train.precision]
                * (shards - 1)
                // shards,
            )
        )
    return found


def hidden_state_bytes(config: RunConfig) -> int:
    """Of the hidden states of a micro-batch on one rank, between two stages."""
    parallel = config.parallel
    split = parallel.context * (parallel.tensor if parallel.sequence else 1)
    numbers = config.data.sequence_length // split * config.model.decoder.hidden_size
    return numbers * config.train.micro_batch_size * BYTES[config.train.precision]
