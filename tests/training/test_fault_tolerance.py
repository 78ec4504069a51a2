"""Steps that go wrong: skipped and written down, and the end of a run that goes nowhere."""

import json
import os
import subprocess
import sys
import time

import faults
import pytest
import stored
import tiny_run

from megatron_owl2.config.schema import HealthConfig
from megatron_owl2.training.checkpoint import directories
from megatron_owl2.training.fault_tolerance import GradientSpikeGuard

pytestmark = pytest.mark.distributed


def judge(folder, norms, state=None, **settings):
    """What is decided about the norms of the steps 1, 2, ..., each of 4 samples."""
    policy = GradientSpikeGuard(HealthConfig(**settings), folder, state, writes=True)
    samples = [range(4 * step, 4 * step + 4) for step in range(len(norms))]
    return policy, [policy.should_apply(n + 1, samples[n], norm) for n, norm in enumerate(norms)]


def test_a_norm_that_is_no_number_is_skipped_and_recorded(tmp_path):
    policy, accepted = judge(tmp_path, [1.0, float("nan"), 1.0, float("inf"), 1.0])
    assert accepted == [True, False, True, False, True]
    rows = [json.loads(line) for line in (tmp_path / "skipped_steps.jsonl").open()]
    assert [(r["step"], r["first_slot"], r["last_slot"]) for r in rows] == [(2, 4, 7), (4, 12, 15)]
    assert "nan" in rows[0]["reason"] and policy.state["skipped"] == 2


def test_a_spike_is_measured_against_the_median_of_what_was_accepted(tmp_path):
    quiet = [1.0] * 16
    assert judge(tmp_path, [*quiet, 3.9, 4.1, 1.0], spike_factor=4)[1][16:] == [True, False, True]
    assert judge(tmp_path, [*quiet, 100.0])[1][-1], "no factor, no spikes"
    assert judge(tmp_path, [1.0] * 15 + [100.0], spike_factor=4)[1][-1], "no median to trust yet"


def test_a_resumed_run_judges_like_the_uninterrupted_one(tmp_path):
    norms = [1.0 + n / 50 for n in range(40)] + [2.7, 3.3, 1.0, 9.0]
    policy, earlier = judge(tmp_path, norms[:40], spike_factor=2)
    state = json.loads(json.dumps(policy.state))
    later = judge(tmp_path, norms[40:], state, spike_factor=2)[1]
    assert earlier + later == judge(tmp_path, norms, spike_factor=2)[1]
    assert later == [True, False, True, False]


def test_too_many_in_a_row_stop_the_run(tmp_path):
    nan = float("nan")
    assert judge(tmp_path, [nan, nan, 1.0, nan, nan], max_skipped=3)[1].count(False) == 4
    with pytest.raises(FloatingPointError, match=r"3 steps in a row .* step 3 \(samples 8 to 11\)"):
        judge(tmp_path, [nan] * 3, max_skipped=3)


def test_a_step_of_nan_leaves_everything_as_it_was(tmp_path):
    """The second of four steps is poisoned; the run goes on, and a resumed run repeats it."""
    config = tiny_run.make(tmp_path, 4)
    run, other = tmp_path / "run", tmp_path / "other"
    options = ["train.save_interval=1", "optimizer.lr=1e-3", "optimizer.weight_decay=0.0"]
    done = tiny_run.train(config, run, *options, fault=faults.loss_of_the_second_step_is_nan)
    assert done.returncode == 0, done.stderr
    assert "skipped step 2 (samples 8 to 15): the gradient norm is nan" in done.stderr
    rows = tiny_run.rows(run)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert [row["skipped_steps"] for row in rows] == [0, 1, 1, 1]
    first, second = (
        stored.read(run / "checkpoints" / f"iter_000000{step}", prefix)
        for step, prefix in ((1, ""), (2, ""))
    )
    assert first.keys() == second.keys()
    assert all(first[name].equal(second[name]) for name in first)
    done = tiny_run.train(config, other, *options)
    assert tiny_run.rows(other)[2]["loss"] != rows[2]["loss"]
    assert tiny_run.rows(other)[1]["loss"] == rows[1]["loss"]


def test_a_run_whose_first_step_is_skipped_goes_on_from_its_checkpoint(tmp_path):
    config, run, other = tiny_run.make(tmp_path, 3), tmp_path / "run", tmp_path / "other"
    fault = faults.loss_of_the_first_step_is_nan
    done = tiny_run.train(config, other, fault=fault)
    assert done.returncode == 0, done.stderr
    options = ["train.save_interval=1", "train.steps=1", "optimizer.min_lr=1e-2"]
    assert tiny_run.train(config, run, *options, fault=fault).returncode == 0
    assert tiny_run.rows(run)[-1]["skipped_steps"] == 1
    done = tiny_run.train(config, run)
    assert done.returncode == 0, done.stderr
    assert tiny_run.figures(run)[1:] == tiny_run.figures(other)[1:]


def test_what_is_being_saved_when_a_run_gives_up_is_saved(tmp_path):
    config, run = tiny_run.make(tmp_path, 4), tmp_path / "run"
    options = ["train.save_interval=1", "health.max_skipped=1"]
    done = tiny_run.train(
        config,
        run,
        *options,
        environment={"RUN": str(run)},
        fault=faults.loss_is_nan_and_files_are_written_late,
    )
    assert done.returncode != 0
    assert "error: rank 0: 1 steps in a row were skipped" in done.stderr
    assert directories.resolve(run).name == "iter_0000001"


def test_a_hanging_rank_ends_the_job_and_every_rank_shows_its_stack(tmp_path):
    config = tiny_run.make(tmp_path, 4)
    run = tmp_path / "run"
    options = ["train.micro_batch_size=1", "train.save_interval=1", "health.step_timeout=4"]
    options += ["train.async_save=false"]  # a save that is not complete would be lost
    started = time.monotonic()
    done = tiny_run.train(config, run, *options, processes=2, fault=faults.rank_1_hangs)
    assert done.returncode != 0
    assert time.monotonic() - started < 60
    for rank in (0, 1):
        assert f"rank {rank}: step 3 took more than 4 seconds" in done.stderr
        stacks = (run / "stacks" / f"rank-{rank:05d}.txt").read_text()
        assert ("in sleeps" in stacks) == (rank == 1), stacks
        assert "in train" in stacks, stacks
    assert directories.resolve(run).name == "iter_0000002"
    assert len(tiny_run.rows(run)) == 2


def test_a_thread_that_never_yields_cannot_hold_up_the_end():
    """The interpreter stands still, so only the timer of the operating system helps."""
    program = (
        "import re, tempfile; from megatron_owl2.training import fault_tolerance\n"
        "fault_tolerance._GRACE = 0.2\n"
        "dog = fault_tolerance.Watchdog(0.5, tempfile.mkdtemp(), 0)\n"
        "dog.begin('a step')\n"
        "re.match('(a|a)*b', 'a' * 40)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1 and done.stderr.startswith("Timeout (0:00:01.1"), done.stderr
    assert os.path.join("re", "__init__.py") in done.stderr
