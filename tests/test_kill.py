"""Ranks that are killed at random moments; the long form is `python tests/kill_runs.py`."""

import kill_runs


def test_killed_ranks_lose_nothing_and_leave_nothing(tmp_path):
    kills = {"DP 2": ["in a save", "after some steps"], "TP 2": ["in a save"]}
    found = kill_runs.prove(tmp_path, kills, seed=3)
    assert len(found) == 3
    assert any(kill.in_save for kill in found)
