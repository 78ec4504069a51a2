"""Metrics: an interval without a usable sample, and reasons of bad samples."""

import json

import pytest

from megatron_owl2.config.load import load_config
from megatron_owl2.training.metrics import data_report
from megatron_owl2.training.metrics.console import format_console_line
from megatron_owl2.training.metrics.loader_metrics import LOADER_METRICS, Interval


def test_an_interval_without_a_usable_sample_is_reported():
    interval = Interval(seconds=2.0, reads=0, ranks=1, tokens=0)
    totals = {metric.name: 8.0 if metric.name == "positions" else 0.0 for metric in LOADER_METRICS}
    row = {m.reported_as: m.report(totals[m.name], interval) for m in LOADER_METRICS}
    assert row["read_milliseconds"] is None and row["decode_milliseconds"] is None
    assert row["padding_share"] == 1 and row["tokens_per_second"] == 0
    counts = {m.name: 0 for m in LOADER_METRICS if m.over_run} | {"bad_samples": 4}
    losses = {"loss": None, "image_loss": None, "text_loss": None}
    others = {"step": 1, "seconds": 2.0, "grad_norm": 0.0, "lr": 0.1, "samples_per_second": 0.0}
    row |= losses | others | counts | {"mfu": None, "skipped_steps": 0}
    line = format_console_line(row, load_config("examples/tiny/finetune.yaml"), 0)
    assert "loss -  grad norm" in line and "bad samples 4" in line


@pytest.mark.parametrize("key", ["plain", "it's", 'so "called"', "'both\""])
def test_a_reason_is_without_the_sample(tmp_path, key):
    row = {"slot": 0, "source": 0, "dataset": "data/set", "shard": "a.tar", "offset": 512}
    reasons = ("caption is empty", f"sample {key!r} (.jpg, .json): caption is empty")
    lines = [json.dumps(row | {"reason": f"data/set/a.tar at byte 512: {r}"}) for r in reasons]
    (tmp_path / "bad_samples.rank0.jsonl").write_text("\n".join(lines) + "\n")
    totals = {"seen/0": 3, "bad/0": 2, "shortened/0": 1}
    source = {"path": "data/set", "samples": 5}
    text = data_report.write_data_report(tmp_path, [source], totals, 0)
    (written,) = json.loads((tmp_path / data_report.NAME).read_text())["sources"]
    assert written["reasons"] == {"caption is empty": 2} and written["shortened"] == 1
    assert "3 samples, 0.60 epochs, 1 shortened, 2 bad  data/set" in text
