"""Runs whose steps have fixed numbers of texts and images, whatever ranks and stops they have."""

import json

import pytest
import runs_in_turn
import tiny_data
import tiny_run

from megatron_owl2.training.metrics.data_report import NAME

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Four steps in one process, the same with a stop after two, the same in two processes."""
    folder = tmp_path_factory.mktemp("grouped")
    config = tiny_run.make(folder)
    records = list(map(tiny_data.record, range(60)))
    for name, with_images in (("text", False), ("images", True)):
        chosen = [record for record in records if bool(record.images) == with_images]
        tiny_data.write(folder / name, chosen)
    sources = [f"{{path: {folder / name}, group: {name}}}" for name in ("text", "images")]
    options = [
        f"data.sources=[{', '.join(sources)}]",
        "data.groups={images: 6, text: 2}",
        "optimizer.min_lr=1e-2",  # the schedule does not depend on the number of steps
        "train.micro_batch_size=1",
    ]
    two, four = "train.steps=2", "train.steps=4"
    launches = {
        1: [("whole", four), ("stopped", two), ("stopped", four)],
        2: [("two ranks", four)],
    }
    for processes, wanted in launches.items():
        outputs = [(folder / name, [*options, steps]) for name, steps in wanted]
        done = runs_in_turn.launch(config, outputs, processes)
        assert done.returncode == 0, done.stderr[-5000:]
        (folder / f"{processes}.log").write_text(done.stdout + done.stderr)
    return folder


@pytest.mark.parametrize("name", ["whole", "stopped", "two ranks"])
def test_every_step_has_seen_its_numbers(runs, name):
    rows = tiny_run.rows(runs / name)
    seen = [[source["seen"] for source in row["sources"]] for row in rows]
    assert seen == [[2 * step, 6 * step] for step in (1, 2, 3, 4)]
    report = json.loads((runs / name / NAME).read_text())
    assert [(row["samples"], row["epochs"]) for row in report["sources"]] == [(20, 0.4), (40, 0.6)]


def test_stops_and_ranks_change_no_loss(runs):
    whole = tiny_run.figures(runs / "whole")
    assert tiny_run.figures(runs / "stopped") == whole
    for ours, theirs in zip(tiny_run.figures(runs / "two ranks"), whole, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_the_log_says_the_shares(runs):
    said = (runs / "1.log").read_text()
    assert f" 25.00% of the samples             20 samples  {runs / 'text'}" in said
    assert f" 75.00% of the samples             40 samples  {runs / 'images'}" in said
