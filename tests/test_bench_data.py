"""The benchmark of the data engine runs and reports every contest; its figures are not judged."""

import json
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).parent.parent / "tools" / "bench" / "data.py"


def test_every_contest_is_measured(tmp_path):
    options = ["--samples", "64", "--rounds", "1", "--json", tmp_path / "figures.json"]
    command = [sys.executable, BENCH, tmp_path / "scratch", *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    reading = ("read, 224 pixels", "read, 448 pixels")
    for contest in (*reading, "write", "index, webdataset's", "index, plain"):
        assert len(figures[contest]) >= 2
        for contender, seconds in figures[contest].items():
            assert len(seconds) == 1 and 0 < seconds[0] < 1
            assert f"| {contest} | {contender} |" in done.stdout
    assert figures["order"]["samples"] == 400_000_000
    assert not (tmp_path / "scratch").exists()
