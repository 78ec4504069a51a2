"""The benchmark of the data engine runs and reports every contest; its figures are not judged."""

import json
import subprocess
import sys

import pytest
import tool

pytestmark = pytest.mark.slow

BENCH = tool.TOOLS / "bench/data.py"


@pytest.fixture(scope="module")
def data():
    return tool.load("bench/data.py")


def test_every_contest_is_measured(tmp_path):
    options = ["--samples", "64", "--rounds", "1", "--memory", "100"]
    options += ["--json", tmp_path / "figures.json"]
    command = [sys.executable, BENCH, tmp_path / "scratch", *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    reading = [f"read {what} pixels" for what in ("512 x 384, 224", "512 x 384, 448")]
    reading.append("read 1280 x 960, 224 pixels")
    for contest in (*reading, "write", "index, webdataset's", "index, plain"):
        assert len(figures[contest]) >= 2
        for contender, seconds in figures[contest].items():
            assert len(seconds) == 1 and 0 < seconds[0] < 1
            assert f"| {contest} | {contender} |" in done.stdout
    changed, resampled = (figures["scaled_decoding"][what] for what in ("all", "resampling"))
    assert 0 < resampled["mean"] < changed["mean"] < 3 and abs(changed["bias"]) < 0.1
    assert abs(figures["scaled_decoding"]["centres"]["mean"]) < 0.2
    assert done.stdout.count("x webdataset + Pillow") == 3
    assert figures["memory"]["samples"] == 96 and len(figures["memory"]["worker_megabytes"]) == 3
    assert "a worker over 96 samples: " in done.stdout
    assert figures["order"]["samples"] == 400_000_000
    assert not (tmp_path / "scratch").exists()


@pytest.mark.parametrize("samples, points", [(64, 2), (350, 10), (640, 20), (10_000, 20)])
def test_the_points_of_memory_are_spread_over_all_samples(data, samples, points):
    steps = data.memory_steps(samples)
    assert len(steps) == points and steps[-1] == samples // data.BATCH
    gaps = {b - a for a, b in zip([0, *steps], steps, strict=False)}
    assert min(gaps) >= 1 and max(gaps) - min(gaps) <= 1


def test_too_few_samples_for_memory_are_refused(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["data.py", str(tmp_path / "scratch"), "--memory", "63"])
    with pytest.raises(SystemExit):
        data.main()
    assert "--memory 63: two batches, 64 samples, are the least" in capsys.readouterr().err
    assert not (tmp_path / "scratch").exists()
