"""A checkpoint under another layout and back: the same numbers, the same rates, the same run."""

import json
import re
import shutil
from pathlib import Path

import pytest
import stored
import tiny_run
import torch
from processes import run_ranks

from megatron_owl2 import mcore
from megatron_owl2.config import ParallelConfig
from megatron_owl2.model.owl2 import build
from megatron_owl2.training import checkpoint

STEPS, SAVED = 3, "iter_0000002"
FOUR = ["parallel.tensor=2", "parallel.pipeline=2"]
DATA = ["train.micro_batch_size=1"]  # TP 1 PP 1 DP 4


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run under TP 2 PP 2 DP 1 with checkpoints of its last two steps."""
    folder = tmp_path_factory.mktemp("layouts")
    config = tiny_run.make(folder, STEPS)
    done = tiny_run.train(config, folder / "run", "train.save_interval=2", *FOUR, processes=4)
    assert done.returncode == 0, done.stderr
    return config, folder / "run"


@pytest.fixture(scope="module")
def reloaded(whole, tmp_path_factory):
    """Its checkpoint loaded and saved at DP 4, and that one at TP 2 PP 2 again."""
    _, run = whole
    folder = tmp_path_factory.mktemp("reloaded")
    script = str(Path(__file__).with_name("reload.py"))
    done = run_ranks(4, script, run / "checkpoints" / SAVED, folder, "1x1", "2x2")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("layout", ["1x1", "2x2"])
def test_weights_optimizer_and_rates_are_bitwise_the_same(whole, reloaded, layout):
    before = whole[1] / "checkpoints" / SAVED
    expected, found = stored.read(before), stored.read(reloaded / layout)
    assert found.keys() == expected.keys()
    assert any(name.startswith(stored.MOMENT) for name in expected)
    assert all(found[name].equal(expected[name]) for name in expected)

    common = [torch.load(d / "common.pt", weights_only=False) for d in (before, reloaded / layout)]
    assert common[0]["scheduler"] == common[1]["scheduler"]
    rates = json.loads((reloaded / f"{layout}.json").read_text())
    groups = {
        (g["wd_mult"], g["lr_mult"]): g for g in common[0]["optimizer"]["optimizer"]["param_groups"]
    }
    assert len(rates) == len(groups) and len({lr for _, lr in groups}) >= 4  # one per depth
    for group in rates:
        old = groups[group["wd_mult"], group["lr_mult"]]
        assert group == {name: float(old[name]) for name in group}
        assert group["lr"] == pytest.approx(rates_of_one(rates)["lr"] * group["lr_mult"], rel=1e-12)


def rates_of_one(rates):
    """A group without a factor on its rate."""
    return next(group for group in rates if group["lr_mult"] == 1.0)


@pytest.mark.parametrize(
    "source, options, tolerance", [("run", DATA, 1e-6), ("2x2", FOUR, 0)], ids=["DP 4", "back"]
)
def test_the_next_step_is_the_same(whole, reloaded, tmp_path, source, options, tolerance):
    config, run = whole
    again = tmp_path / "again"
    (again / "checkpoints").mkdir(parents=True)
    kept = run / "checkpoints" / SAVED if source == "run" else reloaded / source
    shutil.copytree(kept, again / "checkpoints" / SAVED)
    (again / "checkpoints" / checkpoint.LATEST).write_text(SAVED)
    done = tiny_run.train(config, again, *options, processes=4)
    assert done.returncode == 0, done.stderr
    (step,) = tiny_run.rows(again)
    expected = tiny_run.rows(run)[-1]
    assert step["step"] == expected["step"] == STEPS
    assert step["loss"] == pytest.approx(expected["loss"], rel=tolerance, abs=0)
    assert step["lr"] == expected["lr"]


def test_a_run_cannot_go_on_from_weights_and_what_they_lack_is_listed(whole, tmp_path):
    config, run = whole
    saved = checkpoint.resolve(run)
    settings = checkpoint.read_config(saved)
    settings.parallel = ParallelConfig()
    groups = mcore.initialize(settings.parallel)
    chunks = build(mcore.Layout(settings, groups), settings.model, 1)
    checkpoint.load_weights(saved, chunks)
    bare = tmp_path / "run" / "checkpoints" / saved.name
    checkpoint.save(bare, chunks, settings)
    with pytest.raises(checkpoint.CheckpointError, match=r"weights only.*initial_checkpoint"):
        checkpoint.read_progress(bare)

    shutil.copyfile(saved / "progress.json", bare / "progress.json")
    (bare.parent / checkpoint.LATEST).write_text(bare.name)
    done = tiny_run.train(config, tmp_path / "run", f"train.steps={STEPS + 1}")
    assert done.returncode != 0
    assert f"error: rank 0: checkpoint {bare} does not fit the optimizer" in done.stderr
    listed = set(re.findall(r"missing: (optimizer\.state\..*)", done.stderr))
    stored_by_optimizer = {name for name in stored.read(saved) if name.startswith("optimizer.")}
    assert listed == stored_by_optimizer
