"""The pool gives out one item to a process at a time, so that it knows what a killed one had."""

import os
import signal

import pytest

from megatron_owl2.utils.process_pool import ProcessPool, WorkerDiedError


def square(number: int) -> int:
    return number**2


def die_at_7(number: int) -> int:
    if number == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def test_results_come_with_their_items_and_a_death_with_those_in_work():
    looks = []
    with ProcessPool(2) as pool:
        found = dict(pool.as_completed(square, range(5), lambda: looks.append(1)))
        assert found == {0: 0, 1: 1, 2: 4, 3: 9, 4: 16}
        assert 3 <= len(looks) <= 5  # at most two items end between two looks
        with pytest.raises(ZeroDivisionError):
            list(pool.as_completed(divmod_by_zero, [1]))
        done = []
        with pytest.raises(WorkerDiedError, match="a process was killed") as error:
            for number, _ in pool.as_completed(die_at_7, range(100)):
                done.append(number)
    assert 7 in error.value.items and len(error.value.items) <= 2
    # The other process may finish some more before the death is noticed.
    assert 7 not in done and not set(done) & set(error.value.items)


def divmod_by_zero(number: int) -> tuple[int, int]:
    return divmod(number, 0)
