"""A checkpoint resharded and back: the same numbers, the same rates, the same run."""

import json
import pickle
import re
import shutil

import pytest
import runs_in_turn
import stored
import tiny_run
import torch
from paths import HELPERS
from processes import run_ranks

from megatron_owl2.config.schema import ParallelConfig
from megatron_owl2.errors import CheckpointError
from megatron_owl2.mcore import setup
from megatron_owl2.mcore.parallel import ParallelContext
from megatron_owl2.model.owl2 import build
from megatron_owl2.training.checkpoint import directories, save_load
from megatron_owl2.training.checkpoint.index import read_index

pytestmark = pytest.mark.distributed

STEPS, SAVED = 3, "iter_0000002"
FOUR = ["parallel.tensor=2", "parallel.pipeline=2"]
DATA = ["train.micro_batch_size=1"]  # TP 1 PP 1 DP 4


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run under TP 2 PP 2 DP 1 with checkpoints of its last two steps."""
    folder = tmp_path_factory.mktemp("parallelisms")
    config = tiny_run.make(folder, STEPS)
    done = tiny_run.train(config, folder / "run", "train.save_interval=2", *FOUR, processes=4)
    assert done.returncode == 0, done.stderr
    return config, folder / "run"


@pytest.fixture(scope="module")
def reloaded(whole, tmp_path_factory):
    """Its checkpoint loaded and saved at DP 4, and that one at TP 2 PP 2 again."""
    _, run = whole
    folder = tmp_path_factory.mktemp("reloaded")
    script = str(HELPERS.joinpath("reload.py"))
    done = run_ranks(4, script, run / "checkpoints" / SAVED, folder, "1x1", "2x2")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("parallelism", ["1x1", "2x2"])
def test_weights_optimizer_and_rates_are_bitwise_the_same(whole, reloaded, parallelism):
    before = whole[1] / "checkpoints" / SAVED
    expected, found = stored.read(before), stored.read(reloaded / parallelism)
    assert found.keys() == expected.keys()
    assert any(name.startswith(stored.MOMENT) for name in expected)
    assert all(found[name].equal(expected[name]) for name in expected)

    common = [
        torch.load(d / "common.pt", weights_only=False) for d in (before, reloaded / parallelism)
    ]
    assert common[0]["scheduler"] == common[1]["scheduler"]
    rates = json.loads((reloaded / f"{parallelism}.json").read_text())
    groups = {
        (g["wd_mult"], g["lr_mult"]): g for g in common[0]["optimizer"]["optimizer"]["param_groups"]
    }
    assert len(rates) == len(groups) and len({lr for _, lr in groups}) >= 4  # one per depth
    for group in rates:
        old = groups[group["wd_mult"], group["lr_mult"]]
        assert group == {name: float(old[name]) for name in group}
        assert group["lr"] == pytest.approx(rates_of_one(rates)["lr"] * group["lr_mult"], rel=1e-12)


def test_what_ranks_have_alike_is_read_once_for_all_of_them(whole, reloaded):
    """Four data-parallel ranks have all weights each, and each moment once between them."""
    source = whole[1] / "checkpoints" / SAVED
    index = read_index(source)
    ranks = json.loads((reloaded / "1x1.reads.json").read_text())
    sent_by_rank_0 = [".metadata", "common.pt", "metadata.json"]
    assert [[name for name in sent_by_rank_0 if name in rank["files"]] for rank in ranks] == [
        sent_by_rank_0,
        [],
        [],
        [],
    ]
    assert all(ranks[0]["files"].count(name) == 1 for name in sent_by_rank_0[:2])

    weights = {
        (place.relative_path, place.offset): place.length
        for key, place in index.storage_data.items()
        if not key.fqn.startswith("optimizer.")
    }
    read = [[weights[*t] for t in rank["tensors"] if tuple(t) in weights] for rank in ranks]
    assert sorted(sum(read, [])) == sorted(weights.values())
    assert max(map(sum, read)) < 1.5 * sum(weights.values()) / len(ranks)


def test_main_parameters_outlive_a_change_of_precision(whole, tmp_path):
    """In fp32 they are the weights themselves, which the checkpoint has in bf16 too."""
    config, _ = whole
    run, other = tmp_path / "run", tmp_path / "other"
    options = ["train.precision=bf16", "train.micro_batch_size=1", "train.steps=1"]
    done = tiny_run.train(config, run, *options, processes=2)
    assert done.returncode == 0, done.stderr
    saved = directories.resolve(run)
    script = str(HELPERS.joinpath("reload.py"))
    (saved / "run.yaml").write_text((saved / "run.yaml").read_text().replace("bf16", "fp32"))
    other.mkdir()
    done = run_ranks(2, script, saved, other, "1x1")
    assert done.returncode == 0, done.stderr
    before, after = (stored.read(d, "optimizer.state.param.") for d in (saved, other / "1x1"))
    assert before.keys() == after.keys() and len(before) > 100
    assert all(after[name].equal(before[name]) for name in before)


def test_an_optimizer_that_is_not_whole_is_refused(whole, tmp_path):
    config, run = whole
    broken = tmp_path / "run" / "checkpoints" / SAVED
    shutil.copytree(run / "checkpoints" / SAVED, broken)
    (broken.parent / directories.LATEST).write_text(SAVED)
    index = read_index(broken)
    name = f"{stored.MOMENT}output_layer.weight"
    entry = index.state_dict_metadata[name]
    lost = entry.chunks.pop()
    del index.storage_data[
        next(i for i in index.storage_data if (i.fqn, i.offset) == (name, lost.offsets))
    ]
    (broken / ".metadata").write_bytes(pickle.dumps(index))
    done = tiny_run.train(config, tmp_path / "run", processes=2)
    assert done.returncode != 0
    assert f"{name} is not whole" in done.stderr


def rates_of_one(rates):
    """A group without a factor on its rate."""
    return next(group for group in rates if group["lr_mult"] == 1.0)


def test_the_next_step_is_the_same(whole, reloaded, tmp_path):
    """Of the checkpoint under DP 4, and of what came back from there under its own ranks."""
    config, run = whole
    cases = {"DP 4": (run / "checkpoints" / SAVED, DATA), "back": (reloaded / "2x2", FOUR)}
    for name, (checkpoint, _) in cases.items():
        shutil.copytree(checkpoint, tmp_path / name / "checkpoints" / SAVED)
        (tmp_path / name / "checkpoints" / directories.LATEST).write_text(SAVED)
    again = [(tmp_path / name, options) for name, (_, options) in cases.items()]
    done = runs_in_turn.launch(config, again, processes=4)
    assert done.returncode == 0, done.stderr
    expected = tiny_run.rows(run)[-1]
    for name, tolerance in {"DP 4": 1e-6, "back": 0}.items():
        (step,) = tiny_run.rows(tmp_path / name)
        assert step["step"] == expected["step"] == STEPS
        assert step["loss"] == pytest.approx(expected["loss"], rel=tolerance, abs=0)
        assert step["lr"] == expected["lr"]


def test_a_run_cannot_go_on_from_weights_and_what_they_lack_is_listed(whole, tmp_path):
    config, run = whole
    saved = directories.resolve(run)
    settings = directories.read_config(saved)
    settings.parallel = ParallelConfig()
    groups = setup.initialize(settings.parallel)
    chunks = build(ParallelContext(settings, groups), settings.model, 1)
    save_load.load_weights(saved, chunks)
    bare = tmp_path / "run" / "checkpoints" / saved.name
    save_load.save(bare, chunks, settings)
    with pytest.raises(CheckpointError, match=r"weights only.*initial_checkpoint"):
        directories.read_progress(bare)

    shutil.copyfile(saved / "progress.json", bare / "progress.json")
    (bare.parent / directories.LATEST).write_text(bare.name)
    done = tiny_run.train(config, tmp_path / "run", f"train.steps={STEPS + 1}")
    assert done.returncode != 0
    assert f"error: rank 0: checkpoint {bare} does not fit the optimizer" in done.stderr
    listed = set(re.findall(r"missing: (optimizer\.state\..*)", done.stderr))
    stored_by_optimizer = {name for name in stored.read(saved) if name.startswith("optimizer.")}
    assert listed == stored_by_optimizer
