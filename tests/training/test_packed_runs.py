"""Runs on packed rows: one epoch sees every sample once, whatever ranks and stops it has."""

import json

import dialogues
import pytest
import runs_in_turn
import tiny_run

from megatron_owl2.config.load import load_config
from megatron_owl2.data.shards.records import Record
from megatron_owl2.data.tokenizer import Tokenizer
from megatron_owl2.errors import ConfigError
from megatron_owl2.mcore import setup
from megatron_owl2.training.checkpoint import directories
from megatron_owl2.training.metrics.data_report import NAME
from megatron_owl2.training.run_data import open_run_data

pytestmark = pytest.mark.distributed

SIZES = {"a": 40, "b": 23, "bad": 10}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One epoch in one process, the same in two, the same with a stop after two steps; and one over
    a source with bad samples."""
    folder = tmp_path_factory.mktemp("packed")
    config = tiny_run.make(folder)
    for name in ("a", "b"):
        dialogues.write(folder / name, SIZES[name], folder / "tokenizer.model")
    dialogues.write(folder / "bad", 10, folder / "tokenizer.model", record=damaged)
    options = [
        "data.packing=true",
        "data.sequence_length=64",
        "data.max_bad_fraction=0.5",
        "optimizer.min_lr=1e-2",  # the schedule does not depend on the number of steps
        "train.global_batch_size=8",
        f"validation.sources=['{folder / 'b'}']",
        "validation.samples=0",
        "validation.interval=2",
    ]
    first, second, bad = (f"{{path: {folder / name}, weight: 0}}" for name in SIZES)
    whole = [*options, f"data.sources=[{first}, {second}]"]
    spoilt = [*options, f"data.sources=[{first}, {bad}]"]
    epoch, two, one = "train.epochs=1", "train.steps=2", "train.micro_batch_size=1"
    launches = {
        1: [
            ("whole", [*whole, epoch]),
            ("stopped", [*whole, two]),
            ("stopped", [*whole, epoch]),
            ("spoilt", [*spoilt, epoch]),
            ("then of 4", [*whole, two]),
            ("then of 4", [*whole, epoch, "train.global_batch_size=4"]),
            ("then of 16", [*whole, two]),
            ("then of 16", [*whole, epoch, "train.global_batch_size=16"]),
        ],
        2: [("two ranks", [*whole, epoch, one])],
    }
    for processes, wanted in launches.items():
        done = runs_in_turn.launch(
            config, [(folder / name, overrides) for name, overrides in wanted], processes
        )
        assert done.returncode == 0, done.stderr[-5000:]
        (folder / f"{processes}.log").write_text(done.stdout + done.stderr)
    return folder


def damaged(index: int) -> Record:
    record = dialogues.dialogue(index, "bad")
    if index != 1:
        return record
    return Record(record.key, (b"\xff\xd8\xff" + bytes(40),), turns=record.turns)


def test_an_epoch_sees_every_sample_once_and_says_so(runs):
    report = json.loads((runs / "whole" / NAME).read_text())
    seen = {row["path"]: (row["seen"], row["epochs"], row["bad"]) for row in report["sources"]}
    assert seen == {str(runs / name): (SIZES[name], 1.0, 0) for name in ("a", "b")}
    rows = tiny_run.rows(runs / "whole")
    assert [row["seen"] for row in rows[-1]["sources"]] == [SIZES["a"], SIZES["b"]]
    assert f"{SIZES['a']:>11,} samples, 1.00 epochs, 0 shortened, 0 bad  {runs / 'a'}" in (
        (runs / "1.log").read_text()
    )
    assert "samples with" in (runs / "1.log").read_text(), "the packing is described"


@pytest.mark.parametrize("size", [4, 16])
def test_an_epoch_ends_at_its_end_when_the_batch_size_changed(runs, size):
    """Two steps of 8 rows, the rest in batches of another size."""
    run = runs / f"then of {size}"
    report = json.loads((run / NAME).read_text())
    assert [row["seen"] for row in report["sources"]] == [SIZES["a"], SIZES["b"]]
    rows = tiny_run.rows(run)
    of_8 = tiny_run.rows(runs / "whole")[-1]["step"]
    fewest, most = (-(-(8 * steps - 16) // size) for steps in (of_8 - 1, of_8))
    assert fewest <= len(rows) - 2 <= most
    assert all(row["loss"] is not None for row in rows), "no step is empty"


def test_further_epochs_are_another_phase(runs):
    """The empty rows behind the last epoch have taken the places of the next one's first rows."""
    whole = runs / "whole"
    config = load_config(whole / "run.yaml", ["train.epochs=2"])
    setup.initialize(config.parallel)
    try:
        tokenizer, resumed = Tokenizer(config.data.tokenizer), directories.latest(whole)
        assert resumed is not None
        with pytest.raises(ConfigError, match="come to the end of its 1.*data.phase=2"):
            open_run_data(config, tokenizer, resumed)
        config.data.phase, config.train.epochs = 2, 1
        data = open_run_data(config, tokenizer, resumed)
        assert [phase.epochs for phase in data.phases] == [1, 1]
        assert data.steps(config) == 2 * directories.read_progress(resumed)["step"]
    finally:
        setup.shutdown()


def test_bad_samples_are_counted_by_their_reason(runs):
    report = json.loads((runs / "spoilt" / NAME).read_text())
    row = report["sources"][1]
    assert (row["seen"], row["bad"], row["samples"]) == (9, 1, 10)
    ((reason, count),) = row["reasons"].items()
    assert count == 1 and reason.startswith("image cannot be decoded")
    # The key of a sample is no part of its reason, whatever is in it.
    assert "bad00001" not in reason and "'" not in reason
    assert f"1 x {reason}" in (runs / "1.log").read_text()


def test_two_ranks_do_the_same_steps(runs):
    for ours, expected in zip(
        tiny_run.rows(runs / "two ranks"), tiny_run.rows(runs / "whole"), strict=True
    ):
        assert ours["step"] == expected["step"]
        assert ours["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        if "validation" in expected:
            (found,), (wanted,) = ours["validation"], expected["validation"]
            assert found["samples"] == wanted["samples"] == SIZES["b"] and found["bad"] == 0
            assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-5)
    # Of each step the ranks read nearly as many tokens and images: one row's at most.
    for row in tiny_run.rows(runs / "two ranks"):
        assert row["image_spread"] <= 4 and 0 <= row["token_spread"] < 1


def test_a_run_that_was_stopped_goes_on_bit_for_bit(runs):
    assert tiny_run.figures(runs / "stopped") == tiny_run.figures(runs / "whole")
