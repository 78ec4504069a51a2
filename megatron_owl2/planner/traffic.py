"""Bytes that a rank of every pipeline rank sends in one optimizer step, by purpose."""

from dataclasses import dataclass

from megatron_owl2.config.schema import RunConfig
from megatron_owl2.planner.costs import RunCosts
from megatron_owl2.planner.static_memory import BYTES


@dataclass(frozen=True)
class RankTraffic:
    """Bytes that one rank sends per step; a ring's share where many take part.

    `tensor` and `context`: collectives of the layers, in both passes of all micro-batches;
    `pipeline`: hidden states to the next pipeline stage and their gradients to the one before;
    `gradients`: their sum over data and context ranks; `parameters`: the updated ones to all of
    these.
    """

    tensor: int
    context: int
    pipeline: int
    gradients: int
    parameters: int


def per_pipeline_rank(config: RunConfig, costs: RunCosts) -> list[RankTraffic]:
    """The traffic of every pipeline rank under the config's parallelism."""
    parallel = config.parallel
    num_stages = parallel.pipeline * parallel.virtual_pipeline
    count = costs.micro_batches(config)
    shards = costs.world_size // (parallel.tensor * parallel.pipeline)
    found = []
    for rank, held in enumerate(costs.static_memory(config)):
        own = range(rank, num_stages, parallel.pipeline)
        sent = [costs.sent(config, pipeline_stage) for pipeline_stage in own]
        # The first pipeline stage has none before it, the last none after it.
        states = sum((n < num_stages - 1) + (n > 0) for n in own)
        parameter_bytes = held.buffer * BYTES[config.train.precision]
        found.append(
            RankTraffic(
                tensor=sum(s["tensor"] for s in sent) * count,
                context=sum(s["context"] for s in sent) * count,
                pipeline=states * hidden_state_bytes(costs.shortened(config)) * count,
                gradients=held.buffer * 4 * (shards - 1) // shards,
                parameters=parameter_bytes * (shards - 1) // shards,
            )
        )
    return found


def hidden_state_bytes(config: RunConfig) -> int:
    """Bytes of the hidden states of a micro-batch on one rank, between two pipeline stages."""
    parallel = config.parallel
    split = parallel.context * (parallel.tensor if parallel.sequence else 1)
    numbers = config.data.sequence_length // split * config.model.decoder.hidden_size
    return numbers * config.train.micro_batch_size * BYTES[config.train.precision]
