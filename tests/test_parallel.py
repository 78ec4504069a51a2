"""The same optimizer steps from the same checkpoint under every parallel layout, over gloo."""

import pytest
import tiny_run

LAYOUTS = {
    "one process": (1, []),
    "TP 2": (2, ["parallel.tensor=2"]),
    "TP 2 SP": (2, ["parallel.tensor=2", "parallel.sequence=true"]),
    "PP 2": (2, ["parallel.pipeline=2"]),
    "DP 2": (2, ["train.micro_batch_size=1"]),
    "TP 2 PP 2": (4, ["parallel.tensor=2", "parallel.pipeline=2"]),
    "TP 2 SP DP 2": (
        4,
        ["parallel.tensor=2", "parallel.sequence=true", "train.micro_batch_size=1"],
    ),
}
STAGE_1 = "stage.trainable=['vision_model.*','abstractor.*','*.linear_kv_vision.weight','*vision']"


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A configuration whose run starts from a checkpoint, and what one process makes of it."""
    folder = tmp_path_factory.mktemp("parallel")
    config = tiny_run.make(folder)
    made = tiny_run.train(config, folder / "initial", "train.steps=1")
    assert made.returncode == 0, made.stderr
    initial = f"stage.initial_checkpoint={folder / 'initial'}"
    found = {}
    for name, stage in (("everything", []), ("stage 1", [STAGE_1])):
        done = tiny_run.train(config, folder / name, initial, *stage)
        assert done.returncode == 0, done.stderr
        found[name] = tiny_run.figures(folder / name)
        assert [step for step, *_ in found[name]] == [1, 2]
    return config, initial, found


def check(start, name, stage, tmp_path, *overrides):
    config, initial, found = start
    processes, layout = LAYOUTS[name]
    options = [initial, *layout, *overrides]
    if stage == "stage 1":
        options.append(STAGE_1)
    done = tiny_run.train(config, tmp_path / "run", *options, processes=processes)
    assert done.returncode == 0, done.stderr
    for ours, reference in zip(tiny_run.figures(tmp_path / "run"), found[stage], strict=True):
        assert ours == pytest.approx(reference, rel=1e-5)


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "one process"])
def test_losses_and_gradient_norms_do_not_depend_on_the_layout(start, tmp_path, name):
    check(start, name, "everything", tmp_path)


@pytest.mark.parametrize("name", LAYOUTS)
def test_nor_on_recomputation_with_micro_batches_in_flight(start, tmp_path, name):
    check(start, name, "everything", tmp_path, "parallel.recompute=full")


@pytest.mark.parametrize("name", ["TP 2 SP", "PP 2", "DP 2"])
def test_a_frozen_language_model_trains_alike_under_every_layout(start, tmp_path, name):
    check(start, name, "stage 1", tmp_path, "parallel.recompute=full")


def test_sequence_and_pipeline_parallelism_together(start, tmp_path):
    check(start, "TP 2 PP 2", "everything", tmp_path, "parallel.sequence=true")


def test_bf16_is_close_to_fp32(start, tmp_path):
    config, initial, found = start
    done = tiny_run.train(config, tmp_path / "run", initial, "train.precision=bf16", processes=2)
    assert done.returncode == 0, done.stderr
    for ours, reference in zip(
        tiny_run.figures(tmp_path / "run"), found["everything"], strict=True
    ):
        assert ours[1] == pytest.approx(reference[1], rel=0.02)
        assert ours[1] != reference[1]


def test_the_second_step_shows_that_the_first_one_learned(start):
    _, _, found = start
    assert found["everything"][1][1] < found["everything"][0][1]
    assert found["everything"] != found["stage 1"]
