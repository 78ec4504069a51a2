"""Runs that go on under another version of megatron-core and come back (tests/versions.sh)."""

import os
import shutil
import subprocess

import pytest
import stored
import tiny_run
import torch
from processes import single_threaded

from megatron_owl2.training.checkpoint import directories

OTHER = os.environ.get("OTHER_PYTHON")

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.versions,
    pytest.mark.skipif(OTHER is None, reason="tests/versions.sh runs it"),
]


def test_a_run_goes_on_under_the_other_version_and_comes_back(tmp_path):
    """Saved under DP 2, by the other version under one process, and read here under TP 2 with
    another rate and decay, which the losses and gradients of that step do not depend on."""
    config, whole, run = tiny_run.make(tmp_path, 3), tmp_path / "whole", tmp_path / "run"
    constant = ["optimizer.lr=1e-3", "train.save_interval=1"]  # min_lr is the same
    two = ["train.micro_batch_size=1", *constant]
    done = tiny_run.train(config, whole, *two, processes=2)
    assert done.returncode == 0, done.stderr

    shutil.copytree(whole, run)
    tiny_run.set_back(run, 1)
    program = tiny_run.program(config, run, [*constant, "train.steps=2"])
    done = subprocess.run(
        [OTHER, *program], env=single_threaded(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "continuing from" in done.stdout
    ours, theirs = (folder / "checkpoints/iter_0000002" for folder in (whole, run))
    assert sorted(p.name for p in theirs.iterdir() if p.suffix != ".distcp") == sorted(
        p.name for p in ours.iterdir() if p.suffix != ".distcp"
    )
    expected, found = stored.read(ours), stored.read(theirs)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-5, msg=name)

    changed = ["optimizer.lr=2e-3", "optimizer.min_lr=2e-3", "optimizer.weight_decay=0.2"]
    done = tiny_run.train(config, run, "parallel.tensor=2", *changed, processes=2)
    assert done.returncode == 0, done.stderr
    assert "continuing from" in done.stdout
    for now, then in zip(tiny_run.figures(run), tiny_run.figures(whole), strict=True):
        assert now == pytest.approx(then, rel=1e-4)
    assert tiny_run.rows(run)[-1]["lr"] == pytest.approx(2e-3)
    common = torch.load(directories.resolve(run) / "common.pt", weights_only=False)
    decays = {group["weight_decay"] for group in common["optimizer"]["optimizer"]["param_groups"]}
    assert decays == {0.2, 0.0}
