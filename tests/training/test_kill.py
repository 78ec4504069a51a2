"""Ranks that are killed at random moments; the long form is `python tests/helpers/kill_runs.py`."""

import kill_runs
import pytest

pytestmark = pytest.mark.distributed


def test_killed_ranks_lose_nothing_and_leave_nothing(tmp_path):
    found = kill_runs.prove(tmp_path, {"DP 2": ["in a save", "after some steps"]}, seed=3)
    assert len(found) == 2
    assert any(kill.in_save for kill in found)
