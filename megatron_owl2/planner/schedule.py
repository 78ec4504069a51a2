"""The order in which pipeline ranks run micro-batches: what waits in memory, who waits for whom.

megatron-core's 1F1B and its interleaved form (pipeline_parallel/schedules.py).
"""

from collections.abc import Sequence
from typing import NamedTuple


class PipelineTask(NamedTuple):
    """A pass of one micro-batch through one chunk of a rank."""

    forward: bool
    chunk: int
    micro_batch: int


def order(rank: int, pipeline: int, chunks: int, micro_batches: int) -> list[PipelineTask]:
    """What pipeline rank `rank` runs, one after the other."""
    total = micro_batches * chunks
    if pipeline == 1:
        ahead = 0
    elif chunks == 1:
        ahead = pipeline - rank - 1
    else:
        ahead = 2 * (pipeline - rank - 1) + (chunks - 1) * pipeline
    ahead = min(ahead, total)
    forward = [_run(True, n, pipeline, chunks) for n in range(total)]
    backward = [_run(False, n, pipeline, chunks) for n in range(total)]
    steady = [run for pair in zip(forward[ahead:], backward, strict=False) for run in pair]
    return forward[:ahead] + steady + backward[total - ahead :]


def _run(forward: bool, number: int, pipeline: int, chunks: int) -> PipelineTask:
    """The interleaved order takes `pipeline` micro-batches through a chunk, then through the next;
    backward begins with the last chunk."""
    if chunks == 1:
        return PipelineTask(forward, 0, number)
    group, place = divmod(number, pipeline * chunks)
    chunk, micro_batch = divmod(place, pipeline)
    return PipelineTask(
        forward, chunk if forward else chunks - 1 - chunk, group * pipeline + micro_batch
    )


def peak_memory(runs: Sequence[PipelineTask], kept: Sequence[int], working: Sequence[int]) -> int:
    """The most bytes that live at once on a rank that runs `runs`.

    `kept` by chunk lives from a forward pass to its backward pass; `working` by chunk while one of
    them runs.
    """
    now = most = 0
    for run in runs:
        now += kept[run.chunk] if run.forward else 0
        most = max(most, now + working[run.chunk])
        now -= 0 if run.forward else kept[run.chunk]
    return most


def makespan(forward: Sequence[float], backward: Sequence[float], pipeline: int, count: int):
    """Seconds until the last rank is done with `count` micro-batches.

    `forward` and `backward` are seconds of every stage (chunk * pipeline + rank). A pass begins
    when its rank is free and the pass before it is done; sending takes no time here.
    """
    chunks = len(forward) // pipeline
    # Once every rank is busy, each further round takes as long as the busiest rank.
    simulated = min(count, 4 * pipeline)
    orders = [order(rank, pipeline, chunks, simulated) for rank in range(pipeline)]
    done: dict[tuple[bool, int, int], float] = {}
    free, place = [0.0] * pipeline, [0] * pipeline
    last = len(forward) - 1
    waiting = True
    while waiting:
        waiting = False
        for rank, runs in enumerate(orders):
            while place[rank] < len(runs):
                run = runs[place[rank]]
                stage = run.chunk * pipeline + rank
                if run.forward:
                    needed = (True, stage - 1, run.micro_batch) if stage else None
                else:
                    turn = stage == last
                    needed = (turn, stage if turn else stage + 1, run.micro_batch)
                if needed is not None and needed not in done:
                    waiting = True
                    break
                begin = max(free[rank], done.get(needed, 0.0))
                free[rank] = begin + (forward if run.forward else backward)[stage]
                done[run.forward, stage, run.micro_batch] = free[rank]
                place[rank] += 1
    busiest = max(
        sum(forward[rank::pipeline]) + sum(backward[rank::pipeline]) for rank in range(pipeline)
    )
    return max(free) + (count - simulated) * busiest
