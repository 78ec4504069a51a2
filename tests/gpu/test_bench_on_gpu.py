"""The benchmark of the training step runs what this GPU can and says why of the rest."""

import json
import subprocess
import sys

import pytest
from paths import TOOLS

pytestmark = pytest.mark.gpu

TOOL = TOOLS / "bench" / "step.py"


def test_every_kernel_is_measured_or_refused_with_a_reason(tmp_path):
    output = tmp_path / "figures.json"
    options = ["--tiny", "--layers", "1", "--seconds", "0", "--peak-tflops", "1", "--json", output]
    done = subprocess.run([sys.executable, TOOL, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(output.read_text())["results"]
    measured = {(row["stage"], row["kernels"]) for row in rows if "flops" in row}
    refused = {(row["stage"], row["kernels"]) for row in rows if "refused" in row}
    assert not measured & refused
    assert measured | refused == {
        (stage, kernels)
        for stage in "12"
        for kernels in ("local", "te", "te-tensorwise", "te-delayed", "te-blockwise", "te-mxfp8")
    }
    assert measured >= {("1", "local"), ("2", "local")}
    for row in rows:
        if "refused" in row:
            assert "transformer_engine" in row["refused"] or "does not run here" in row["refused"]
            continue
        assert row["peak_gib"] > 0 and row["mfu"] == pytest.approx(row["tflops"])
