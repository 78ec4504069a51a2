"""The benchmark of the split projections: its three layers compute the same, and it reports."""

import json

import pytest
import tool
import torch
from processes import run_ranks

from megatron_owl2.config.schema import DecoderConfig

pytestmark = pytest.mark.slow

DECODER = DecoderConfig(hidden_size=32, num_heads=4, num_kv_heads=4, ffn_size=48)


@pytest.fixture(scope="module")
def bench():
    return tool.load("bench/modality.py")


def output_and_gradient(step, layer):
    step.clear(layer)
    return step.run(layer).detach(), step.x.grad


def test_ours_and_gather_scatter_agree_in_every_gradient(bench):
    step = bench.Step(bench.Shape(5, 12), DECODER, "float32")
    layers = bench.build(DECODER, "float32")
    assert bench.disagreement(step, layers) < 1e-5
    with torch.no_grad():
        layers["gather-scatter"].value[1][3, 2] += 0.1
    assert bench.disagreement(step, layers) > 1e-3


@pytest.mark.parametrize("vision", [0, 5])
def test_all_three_agree_where_no_token_is_visual_and_only_there(bench, vision):
    torch.manual_seed(0)
    step = bench.Step(bench.Shape(vision, 12), DECODER, "float32")
    layers = bench.build(DECODER, "float32")
    ours, unsplit, scattered = (output_and_gradient(step, layer) for layer in layers.values())
    torch.testing.assert_close(ours, scattered, atol=1e-5, rtol=1e-5)
    differ = (ours[0] - unsplit[0]).abs().max() > 1e-4
    assert differ == (vision > 0)
    if vision == 0:
        torch.testing.assert_close(ours, unsplit, atol=1e-5, rtol=1e-5)


def test_unsplit_shares_the_weights_of_ours(bench):
    layers = bench.build(DECODER, "float32")
    of_ours = dict(layers["ours"].named_parameters())
    of_unsplit = dict(layers["unsplit"].named_parameters())
    assert all(of_unsplit[name] is of_ours[name] for name in of_unsplit)
    assert len(of_ours) - len(of_unsplit) == 3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_command_line_reports_every_shape(tmp_path, dtype):
    sizes = ["--hidden-size", "32", "--heads", "4", "--ffn", "48", "--shape", "3/8", "65/256"]
    output = tmp_path / "bench.json"
    options = ["--dtype", dtype, "--seconds", "0", "--json", output]
    done = run_ranks(1, tool.TOOLS / "bench" / "modality.py", *sizes, *options)
    assert done.returncode == 0, done.stderr
    written = json.loads(output.read_text())
    assert (written["torch"], written["dtype"]) == (torch.__version__, dtype)
    small, paper = written["results"]
    assert small["rounds"] == 3 and small["disagreement"] < 0.03
    assert small["extra_arithmetic"] == pytest.approx(2 * 32 * 3 / ((4 * 32 + 3 * 48) * 8))
    assert paper["target"] == {"unsplit": 0.08, "gather-scatter": 0.03}
    for result in (small, paper):
        times = result["times"]
        first, last = (
            [a / b - 1 for a, b in zip(times["ours"], times[o], strict=True)]
            for o in ("unsplit", "gather-scatter")
        )
        assert result["cost"]["unsplit"] == [sorted(first)[1], min(first), max(first)]
        assert result["cost"]["gather-scatter"] == [sorted(last)[1], min(last), max(last)]
    assert "| 65/256 | unsplit |" in done.stdout and "| +8% |" in done.stdout
    assert "3/8: 3 rounds" in done.stderr


@pytest.mark.parametrize("wrong", [["--shape", "9/5"], ["--shape", "x"], ["--heads", "3"]])
def test_wrong_sizes_are_refused(bench, capsys, wrong):
    with pytest.raises(SystemExit) as stop:
        bench.main(wrong)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert "like 65/256" in said or "num_heads (3) does not divide" in said
