"""Pipeline schedules: order of micro-batches, peak activation memory, makespan.

megatron-core's 1F1B and its interleaved form (pipeline_parallel/schedules.py).
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple


class PipelineTask(NamedTuple):
    """Forward or backward pass of one micro-batch through one model chunk of a rank."""

    forward: bool
    chunk: int
    micro_batch: int


@functools.cache
def order(rank: int, pipeline: int, chunks: int, micro_batches: int) -> tuple[PipelineTask, ...]:
    """The tasks of pipeline rank `rank`, one after the other."""
    total = micro_batches * chunks
    if pipeline == 1:
        ahead = 0
    elif chunks == 1:
        ahead = pipeline - rank - 1
    else:
        ahead = 2 * (pipeline - rank - 1) + (chunks - 1) * pipeline
    ahead = min(ahead, total)
    forward = [_task(True, n, pipeline, chunks) for n in range(total)]
    backward = [_task(False, n, pipeline, chunks) for n in range(total)]
    steady = [task for pair in zip(forward[ahead:], backward, strict=False) for task in pair]
    return (*forward[:ahead], *steady, *backward[total - ahead :])


def _task(forward: bool, number: int, pipeline: int, chunks: int) -> PipelineTask:
    """The forward or backward task of this number on a rank.

    The interleaved order takes `pipeline` micro-batches through a chunk, then through the next;
    backward begins with the last chunk.
    """
    if chunks == 1:
        return PipelineTask(forward, 0, number)
    group, place = divmod(number, pipeline * chunks)
    chunk, micro_batch = divmod(place, pipeline)
    return PipelineTask(
        forward, chunk if forward else chunks - 1 - chunk, group * pipeline + micro_batch
    )


def peak_memory(tasks: Sequence[PipelineTask], kept: Sequence[int], working: Sequence[int]) -> int:
    """The most bytes that live at once on a rank that runs `tasks`.

    `kept` by chunk lives from a forward pass to its backward pass; `working` by chunk while one of
    them runs.
    """
    now = peak = 0
    for task in tasks:
        now += kept[task.chunk] if task.forward else 0
        peak = max(peak, now + working[task.chunk])
        now -= 0 if task.forward else kept[task.chunk]
    return peak


def makespan(
    forward: Sequence[float], backward: Sequence[float], pipeline: int, count: int
) -> float:
    """Seconds until the last rank is done with `count` micro-batches.

    `forward` and `backward` are seconds of every pipeline stage (chunk * pipeline + rank). A pass
    begins when its rank is free and the pass before it is done; sending takes no time here.
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
        for rank, tasks in enumerate(orders):
            while place[rank] < len(tasks):
                task = tasks[place[rank]]
                number = task.chunk * pipeline + rank
                needed = _input_of(task, number, last)
                if needed is not None and needed not in done:
                    waiting = True
                    break
                begin = free[rank] if needed is None else max(free[rank], done[needed])
                free[rank] = begin + (forward if task.forward else backward)[number]
                done[task.forward, number, task.micro_batch] = free[rank]
                place[rank] += 1
    busiest = max(
        sum(forward[rank::pipeline]) + sum(backward[rank::pipeline]) for rank in range(pipeline)
    )
    return max(free) + (count - simulated) * busiest


def _input_of(task: PipelineTask, number: int, last: int) -> tuple[bool, int, int] | None:
    """The pass that a pass through pipeline stage `number` takes its input from, as direction,
    pipeline stage and micro-batch; None for images and text."""
    if task.forward:
        return (True, number - 1, task.micro_batch) if number else None
    if number == last:
        return True, last, task.micro_batch
    return False, number + 1, task.micro_batch
