"""A run that was stopped, in whatever way, goes on as if it had not been."""

import json
import re
import shutil
import signal

import pytest
import runs_in_turn
import tiny_run
import torch

from megatron_owl2.data.tokenizer import train_tokenizer
from megatron_owl2.errors import CheckpointError
from megatron_owl2.training.checkpoint import directories

pytestmark = pytest.mark.distributed

STEPS = 6
PARALLELISMS = {
    "DP 2": [],
    "TP 2": ["parallel.tensor=2"],
    "PP 2": ["parallel.pipeline=2"],
}
CHANGED = "TP 2 then PP 2"


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    config = tiny_run.make(folder, STEPS)
    done = tiny_run.train(config, folder / "whole", "train.save_interval=2")
    assert done.returncode == 0, done.stderr
    return config, folder / "whole"


@pytest.fixture(scope="module")
def resumed(uninterrupted, tmp_path_factory):
    """Figures by name of runs of two ranks under every parallelism, and of the same runs when
    other processes went on from their third step, CHANGED under another parallelism.

    Two launches do it all: what begins, and what goes on.
    """
    config, _ = uninterrupted
    folder = tmp_path_factory.mktemp("resumed")

    def launch(parallelisms):
        runs = [
            (folder / name, ["train.save_interval=3", *overrides])
            for name, overrides in parallelisms.items()
        ]
        done = runs_in_turn.launch(config, runs, processes=2)
        assert done.returncode == 0, done.stderr
        return done.stdout, {run.name: tiny_run.figures(run) for run, _ in runs}

    _, before = launch(PARALLELISMS | {CHANGED: PARALLELISMS["TP 2"]})
    for name in before:
        tiny_run.set_back(folder / name, 3)
    said, after = launch(PARALLELISMS | {CHANGED: PARALLELISMS["PP 2"]})
    assert said.count("continuing from") == len(after)
    return before, after


@pytest.mark.parametrize("name", PARALLELISMS)
def test_resumed_ranks_equal_uninterrupted_ones_bit_for_bit(resumed, name):
    before, after = resumed
    assert len(before[name]) == STEPS
    assert after[name] == before[name]


def test_a_resumed_process_equals_the_uninterrupted_one_bit_for_bit(uninterrupted, tmp_path):
    config, whole = uninterrupted
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    tiny_run.set_back(run, 4)
    done = tiny_run.train(config, run, "train.save_interval=2")
    assert done.returncode == 0, done.stderr
    assert "continuing from" in done.stdout
    assert tiny_run.figures(run) == tiny_run.figures(whole)


def test_a_run_saved_under_one_parallelism_goes_on_under_another(uninterrupted, resumed):
    expected = tiny_run.figures(uninterrupted[1])
    found = resumed[1][CHANGED]
    assert [step for step, *_ in found] == [step for step, *_ in expected]
    # The first step after the load; later ones drift apart as rounding does at this rate.
    assert found[3] == pytest.approx(expected[3], rel=1e-3)


@pytest.mark.parametrize(
    "processes, options",
    [(1, ["data.workers=1"]), (2, ["parallel.tensor=2"])],
    ids=["data worker", "TP 2"],
)
def test_ctrl_c_leaves_a_checkpoint_that_goes_on(uninterrupted, tmp_path, processes, options):
    config, _ = uninterrupted
    run, other = tmp_path / "run", tmp_path / "other"
    options = [*options, "optimizer.lr=1e-3"]  # and so is min_lr: the same whatever train.steps are
    endless = ["train.steps=100000", *options]
    stopped = tiny_run.interrupt(config, run, *endless, processes=processes, at_step=2)
    assert stopped.returncode != 0
    saved = directories.resolve(run)
    progress = json.loads((saved / "progress.json").read_text())
    logged = tiny_run.rows(run)[-1]["step"]
    assert 2 <= progress["step"] == logged
    assert progress["slots"] == 8 * logged

    options = [*options, f"train.steps={logged + 1}"]
    done = runs_in_turn.launch(config, [(run, options), (other, options)], processes)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("continuing from") == 1
    assert tiny_run.figures(run) == tiny_run.figures(other)


def test_half_a_checkpoint_is_never_taken_for_one(uninterrupted, tmp_path):
    _, whole = uninterrupted
    assert sorted(p.name for p in (whole / "checkpoints").iterdir()) == [
        "iter_0000002",
        "iter_0000004",
        "iter_0000006",
        "latest",
    ]
    for name in ("metadata.json", "run.yaml", "progress.json"):
        broken = tmp_path / f"without {name}"
        broken.mkdir()
        for file in directories.resolve(whole).iterdir():
            if file.name != name:
                (broken / file.name).write_bytes(file.read_bytes())
        with pytest.raises(CheckpointError, match=f"not a complete.*{name}"):
            directories.resolve(broken)
    with pytest.raises(CheckpointError, match="does not exist$"):
        directories.resolve(tmp_path / "nowhere")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/latest").write_text("iter_0000009")
    with pytest.raises(CheckpointError, match="0009 does not exist, which .*/latest names; write"):
        directories.resolve(tmp_path)


def test_a_killed_save_leaves_the_last_checkpoint_in_place(uninterrupted, tmp_path):
    """The process dies inside the write: what is there is the checkpoint before, whole."""
    config, _ = uninterrupted
    run = tmp_path / "run"
    crash = tmp_path / "sitecustomize.py"
    crash.write_text(
        "import os, signal\n"
        "rename = os.rename\n"
        "def dying(source, target, **options):\n"
        "    if 'iter_0000004' in str(target):\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return rename(source, target, **options)\n"
        "os.rename = dying\n"
    )
    done = tiny_run.train(
        config, run, "train.save_interval=2", environment={"PYTHONPATH": str(tmp_path)}
    )
    assert done.returncode == -signal.SIGKILL
    assert directories.resolve(run).name == "iter_0000002"
    assert not (run / "checkpoints" / "iter_0000004").exists()
    resumed = tiny_run.train(config, run, "train.save_interval=2")
    assert resumed.returncode == 0, resumed.stderr
    assert len(tiny_run.rows(run)) == STEPS
    leftovers = [p.name for p in (run / "checkpoints").iterdir() if p.name.startswith(".")]
    assert leftovers == []


def test_other_data_is_refused_on_resume(uninterrupted, tmp_path):
    config, whole = uninterrupted
    for override in ("data.seed=5", "optimizer.vision_layer_decay=0.5"):
        refused = tiny_run.train(config, whole, override, f"train.steps={STEPS + 1}")
        assert refused.returncode != 0
        (line,) = [x for x in refused.stderr.splitlines() if x.startswith("error: ")]
        assert override.partition("=")[0] in line and "is not what" in line


def test_another_model_of_the_same_shapes_is_refused(uninterrupted, tmp_path):
    """On resume, and as the start of a stage, which may choose its template and resolution only."""
    config, whole = uninterrupted
    start = f"stage.initial_checkpoint={whole}"
    for override, before in (
        ("model.decoder.norm_eps=1e-5", "1e-06"),
        ("model.vision.num_heads=2", "4"),
        ("model.template=vicuna_v1", "owl2"),
    ):
        name, _, now = override.partition("=")
        wanted = f"{name} was {before} and is {now.replace('1e-5', '1e-05')}"
        refused = tiny_run.train(config, whole, override, f"train.steps={STEPS + 1}")
        assert refused.returncode != 0
        (line,) = [x for x in refused.stderr.splitlines() if x.startswith("error: ")]
        assert wanted in line and "iter_0000006" in line
        begun = tiny_run.train(config, tmp_path / name, override, start, "train.steps=1")
        if name == "model.template":
            assert begun.returncode == 0, begun.stderr
        else:
            assert begun.returncode != 0
            assert f"holds the weights of another model: {wanted}" in begun.stderr


def test_another_vocabulary_is_refused_on_resume(uninterrupted, tmp_path):
    config, whole = uninterrupted
    texts = [f"other words {i} altogether, zebra {i * 7}" for i in range(60)]
    train_tokenizer(texts, tmp_path / "other.model", tiny_run.MODEL["decoder"]["vocab_size"])
    options = [f"data.tokenizer={tmp_path / 'other.model'}", f"train.steps={STEPS + 1}"]
    refused = tiny_run.train(config, whole, *options)
    assert refused.returncode != 0
    assert "error: data.tokenizer is another than" in refused.stderr


def test_other_data_start_a_recorded_phase(uninterrupted, tmp_path):
    config, whole = uninterrupted
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    for more in (2, 3):  # the phase begins, and goes on
        options = [f"train.steps={STEPS + more}", "data.seed=5", "data.phase=2"]
        done = tiny_run.train(config, run, *options)
        assert done.returncode == 0, done.stderr
        assert f"data: phase 2 from sample {8 * STEPS}" in done.stdout
        progress = directories.read_progress(run)
        assert [phase["start_slot"] for phase in progress["phases"]] == [0, 8 * STEPS]
        sources = tiny_run.rows(run)[-1]["sources"]
        assert sum(source["seen"] for source in sources) == 8 * more  # of the new phase alone


def test_rates_settings_and_length_follow_the_configuration(uninterrupted, tmp_path):
    config, whole = uninterrupted
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    options = ["lr=4e-3", "min_lr=4e-3", "beta1=0.5", "beta2=0.6", "eps=0.1", "weight_decay=0.25"]
    options = [f"train.steps={STEPS + 4}", *(f"optimizer.{option}" for option in options)]
    resumed = tiny_run.train(config, run, *options)
    assert resumed.returncode == 0, resumed.stderr
    assert [row["lr"] for row in tiny_run.rows(run)[STEPS:]] == pytest.approx([4e-3] * 4)
    common = torch.load(directories.resolve(run) / "common.pt", weights_only=False)
    groups = common["optimizer"]["optimizer"]["param_groups"]
    in_force = {(*group["betas"], group["eps"], group["weight_decay"]) for group in groups}
    assert in_force == {(0.5, 0.6, 0.1, 0.25), (0.5, 0.6, 0.1, 0.0)}


def test_a_torn_line_of_metrics_does_not_block_resuming(uninterrupted, tmp_path):
    config, whole = uninterrupted
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    resumed = tiny_run.train(config, run, f"train.steps={STEPS + 1}")
    assert resumed.returncode == 0, resumed.stderr
    assert [row["step"] for row in tiny_run.rows(run)] == list(range(1, STEPS + 2))


def test_loss_that_explodes_stops_the_run_and_names_the_samples(uninterrupted, tmp_path):
    config, _ = uninterrupted
    run = tmp_path / "run"
    done = tiny_run.train(config, run, "optimizer.lr=1e30", "optimizer.min_lr=1e30")
    assert done.returncode != 0
    (line,) = [x for x in done.stderr.splitlines() if x.startswith("error: ")]
    assert re.match(r"error: rank 0: \d+ steps in a row were skipped .*samples \d+ to \d+", line)
    assert not (run / "checkpoints").exists()
