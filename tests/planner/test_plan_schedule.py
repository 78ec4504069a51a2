"""Pipeline schedules against the textbook, with even and uneven stages."""

import pytest

from megatron_owl2.planner import schedule


@pytest.mark.parametrize(
    ("pipeline", "chunks", "count"), [(1, 1, 8), (4, 1, 2), (4, 1, 64), (4, 2, 8), (8, 4, 128)]
)
def test_the_bubble_of_even_stages_is_that_of_the_papers(pipeline, chunks, count):
    stages = pipeline * chunks
    span = schedule.makespan([1 / chunks] * stages, [2 / chunks] * stages, pipeline, count)
    # Narayanan et al. 2021: (p - 1) / v micro-batches of time are lost.
    assert span == pytest.approx(3 * (count + (pipeline - 1) / chunks))


def test_the_busiest_stage_sets_the_pace():
    even, uneven = ([1.0, 1.0, 1.0, 1.0], [2.0] * 4), ([1.0, 1.0, 1.0, 1.5], [2.0, 2.0, 2.0, 3.0])
    lost = schedule.makespan(*uneven, 4, 100) - schedule.makespan(*even, 4, 100)
    assert lost == pytest.approx(1.5 * 100, rel=0.02)


def test_every_rank_runs_every_micro_batch_once_in_an_order_that_ends():
    for pipeline, chunks, count in ((1, 1, 3), (4, 1, 2), (4, 1, 9), (2, 3, 4), (4, 2, 8)):
        for rank in range(pipeline):
            tasks = schedule.order(rank, pipeline, chunks, count)
            assert len(set(tasks)) == len(tasks) == 2 * chunks * count
            for task in tasks:
                if not task.forward:
                    assert tasks.index(task._replace(forward=True)) < tasks.index(task)


def test_what_waits_is_what_1f1b_and_its_interleaved_form_hold():
    def waiting(rank, pipeline, chunks, count):
        tasks = schedule.order(rank, pipeline, chunks, count)
        return schedule.peak_memory(tasks, [1] * chunks, [0] * chunks)

    assert [waiting(rank, 4, 1, 16) for rank in range(4)] == [4, 3, 2, 1]
    assert [waiting(rank, 4, 1, 2) for rank in range(4)] == [2, 2, 2, 1]
    # megatron-core: 2 (p - r - 1) + (v - 1) p run ahead, and one more.
    assert [waiting(rank, 4, 2, 16) for rank in range(4)] == [11, 9, 7, 5]


def test_working_memory_counts_on_top_of_what_waits():
    tasks = schedule.order(0, 2, 1, 4)
    assert schedule.peak_memory(tasks, [10], [3]) == 2 * 10 + 3
