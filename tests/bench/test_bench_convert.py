"""The conversion benchmark on a tiny model: it runs the tools and compares what comes back."""

import json
import subprocess
import sys

import pytest
import yaml
from paths import TOOLS
from tiny_run import MODEL

pytestmark = pytest.mark.slow

BENCH = TOOLS / "bench" / "convert.py"


def test_both_directions_are_measured(tmp_path):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"model": MODEL}))
    options = ["--config", tmp_path / "run.yaml", "--json", tmp_path / "figures.json"]
    command = [sys.executable, BENCH, tmp_path / "scratch", *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["different_tensors"] == 0
    assert figures["bytes"] > 2 * figures["parameters"] > 0
    for direction in ("HF to Megatron", "Megatron to HF"):
        assert f"| {direction} |" in done.stdout
        found = figures["directions"][direction]
        assert found["seconds"][0] > 0 and found["copy_seconds"][0] > 0
        assert 50e6 < found["peak_bytes"][0] < 3e9
    assert not (tmp_path / "scratch").exists()
