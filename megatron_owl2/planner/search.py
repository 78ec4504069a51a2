"""Search for the parallel configurations of a run that fit given GPUs, the fastest first."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import get_args

from tqdm import tqdm

from megatron_owl2.config.schema import Recompute, RunConfig
from megatron_owl2.config.validate_parallel import validate_parallel
from megatron_owl2.errors import ConfigError
from megatron_owl2.planner import memory, timing
from megatron_owl2.planner.costs import RunCosts
from megatron_owl2.planner.machine import Machine
from megatron_owl2.planner.memory import RankMemory
from megatron_owl2.planner.timing import StepTime

RECOMPUTE = get_args(Recompute)  # from the fastest to the one that keeps least

_SHORTEST = 2048  # positions of a sequence that are worth a context-parallel rank
_DEEPEST = 16  # pipeline ranks that are tried
_WIDEST = 64  # rows of a micro-batch that are tried


@dataclass(frozen=True)
class Candidate:
    """A parallel configuration: the config with it, its fullest rank, its step time."""

    config: RunConfig
    memory: RankMemory
    time: StepTime


def ranked(
    config: RunConfig, machine: Machine, costs: RunCosts, count: int
) -> tuple[list[Candidate], int]:
    """The `count` fastest candidates that fit, one for every shape, and the number of valid ones.

    A shape is the sizes of tensor, pipeline, virtual pipeline and context; the fastest recompute
    and micro-batch stand for it. Of equal times less recomputation and more rows win.
    """
    valid = list(candidates(config, machine))
    order = sorted(
        (timing.fastest_step(c, machine, costs), -c.train.micro_batch_size, n)
        for n, c in enumerate(valid)
    )
    best: dict[tuple, Candidate] = {}
    progress = tqdm(order, "parallel configurations", unit="", leave=False, delay=3, disable=None)
    for bound, _, number in progress:
        # Nothing from here on can be faster than the last that would be shown.
        if len(best) >= count and bound > sorted(c.time.total for c in best.values())[count - 1]:
            break
        candidate = valid[number]
        found = best.get(_shape(candidate))
        if found is not None and bound >= found.time.total:
            continue
        if max(held.total for held in costs.static_memory(candidate)) > machine.usable:
            continue
        fullest = max(memory.per_pipeline_rank(candidate, costs), key=lambda rank: rank.total)
        if fullest.total > machine.usable:
            continue
        time = timing.step_time(candidate, machine, costs)
        if found is None or time.total < found.time.total:
            best[_shape(candidate)] = Candidate(candidate, fullest, time)
    return sorted(best.values(), key=lambda c: c.time.total)[:count], len(valid)


def by_recompute(config: RunConfig, machine: Machine, costs: RunCosts) -> dict[str, Candidate]:
    """The config as it is but for `parallel.recompute`, by every value that this can have."""
    found = {}
    for recompute in RECOMPUTE:
        changed = replace(config, parallel=replace(config.parallel, recompute=recompute))
        found[recompute] = Candidate(
            changed,
            max(memory.per_pipeline_rank(changed, costs), key=lambda rank: rank.total),
            timing.step_time(changed, machine, costs),
        )
    return found


def candidates(config: RunConfig, machine: Machine) -> Iterator[RunConfig]:
    """Every valid parallel configuration in powers of two; tensor parallelism stays in a node."""
    layers, length = config.model.decoder.num_layers, config.data.sequence_length
    for tp, pp, vp, cp, recompute, rows in product(
        _powers(min(machine.gpus_per_node, machine.gpus)),
        _powers(min(_DEEPEST, layers, machine.gpus)),
        _powers(layers),
        _powers(max(1, length // _SHORTEST)),
        RECOMPUTE,
        _powers(min(_WIDEST, config.train.global_batch_size)),
    ):
        if machine.gpus % (tp * pp * cp) or (pp == 1 and vp > 1) or pp * vp > layers:
            continue
        parallel = replace(
            config.parallel,
            tensor=tp,
            pipeline=pp,
            virtual_pipeline=vp,
            context=cp,
            sequence=tp > 1,
            tensor_overlap=config.parallel.tensor_overlap and tp > 1,
            layers=[],
            recompute=recompute,
        )
        train = replace(config.train, micro_batch_size=rows)
        candidate = replace(config, parallel=parallel, train=train)
        try:
            validate_parallel(candidate, machine.gpus)
        except ConfigError:
            continue
        yield candidate


def overrides(config: RunConfig, given: RunConfig) -> str:
    """The overrides, as on a command line, that turn `given` into the config."""
    own = _settings(given)
    changed = [f"{key}={value}" for key, value in _settings(config).items() if value != own[key]]
    return " ".join(changed)


def _settings(config: RunConfig) -> dict[str, int | str]:
    parallel = config.parallel
    return {
        "parallel.tensor": parallel.tensor,
        "parallel.sequence": str(parallel.sequence).lower(),
        "parallel.tensor_overlap": str(parallel.tensor_overlap).lower(),
        "parallel.pipeline": parallel.pipeline,
        "parallel.virtual_pipeline": parallel.virtual_pipeline,
        "parallel.context": parallel.context,
        "parallel.layers": str(parallel.layers).replace(" ", ""),
        "parallel.recompute": parallel.recompute,
        "train.micro_batch_size": config.train.micro_batch_size,
    }


def _shape(config: RunConfig) -> tuple[int, int, int, int]:
    parallel = config.parallel
    return parallel.tensor, parallel.pipeline, parallel.virtual_pipeline, parallel.context


def _powers(most: int) -> list[int]:
    return [2**n for n in range(most.bit_length())]
