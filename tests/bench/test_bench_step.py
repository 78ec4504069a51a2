"""The benchmark of the training step: the paper's shapes, sums that add up, rows that refuse."""

import json
import statistics

import pytest
import tool
import torch
from processes import run_ranks

from megatron_owl2.config.validate_parallel import validate_parallel
from megatron_owl2.mcore import setup
from megatron_owl2.model.flops import Load, training_flops

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bench():
    return tool.load("bench/step.py")


@pytest.mark.parametrize(
    ("stage", "length", "size", "rows"), [("1", 256, 224, 16), ("2", 2048, 448, 1)]
)
def test_shapes_are_the_papers_and_every_kernel_takes_them(bench, stage, length, size, rows):
    for kernels in bench.KERNELS:
        config = bench.settings(stage, kernels, "full", 2, tiny=False)
        model = config.model
        assert (config.data.sequence_length, config.train.micro_batch_size) == (length, rows)
        assert model.vision.image_size == size and model.vision.num_layers == 24
        assert model.decoder.hidden_size == 4096 and model.decoder.num_layers == 2
        assert config.train.precision == "bf16" and config.parallel.recompute == "full"
        validate_parallel(config, world_size=1)


def test_every_row_is_full_and_has_its_image(bench):
    config = bench.settings("1", "local", "none", 1, tiny=True)
    batch = bench.full_batch(config)
    assert batch.tokens.shape == (2, 32) and batch.image.shape == (2, 3, 28, 28)
    assert batch.lengths.tolist() == [32, 32]
    seen = batch.modality.t().flatten()[batch.vision_token_index]
    assert seen.all() and len(seen) == int(batch.modality.sum()) == 2 * 5
    text = batch.tokens[:, 1:][batch.loss_mask[:, :-1].bool()]
    assert text.equal(batch.labels[:, :-1][batch.loss_mask[:, :-1].bool()])


def test_what_is_measured_is_a_training_step(bench):
    step = bench.Step(bench.settings("1", "local", "full", 1, tiny=True))
    (chunk,), (part,) = step.wrapped, step.optimizer.chained_optimizers
    for count in (1, 2):
        assert all(duration > 0 for duration in step.milliseconds())
        assert {int(state["step"]) for state in part.optimizer.state.values()} == {count}
    for name, parameter in chunk.module.named_parameters():
        assert hasattr(parameter, "main_grad") == (name in step.trained), name
        if parameter.ndim > 1 and name in step.trained:
            assert parameter.main_grad.norm() > 0, name
    assert "decoder.layers.0.mlp.linear_fc1.weight" not in step.trained
    setup.shutdown()


def test_command_line_reports_every_combination(bench, tmp_path):
    output = tmp_path / "figures.json"
    options = ["--kernels", "local", "te-blockwise", "--recompute", "none", "full"]
    options += ["--layers", "1", "--seconds", "0", "--peak-tflops", "2", "--json", output]
    done = run_ranks(1, tool.TOOLS / "bench" / "step.py", "--tiny", *options)
    assert done.returncode == 0, done.stderr
    written = json.loads(output.read_text())
    assert written["torch"] == torch.__version__ and written["device"] in done.stdout
    rows = {(r["stage"], r["kernels"], r["recompute"]): r for r in written["results"]}
    if setup.on_cpu():
        for stage in "12":
            refused = rows.pop((stage, "te-blockwise", "any"))
            assert "needs a GPU" in refused["refused"]
            assert f"| {stage} | te-blockwise | any | kernels.backend" in done.stdout
        assert rows.keys() == {(s, "local", r) for s in "12" for r in ("none", "full")}
    for (stage, kernels, recompute), row in rows.items():
        times = row["forward_backward_milliseconds"]
        assert len(times) >= 3 and len(row["update_milliseconds"]) == len(times)
        assert row["tflops"] == pytest.approx(row["flops"] / statistics.median(times) / 1e9)
        assert row["mfu"] == row["tflops"] / 2
        assert (row["peak_gib"] is None) == setup.on_cpu()
        assert row["flops"] == rows[stage, kernels, "none"]["flops"]
        assert (
            f"| {stage} | {kernels} | {recompute} | {statistics.median(times):.1f}" in done.stdout
        )
    whole = bench.Step(bench.settings("2", "local", "none", 1, tiny=True))
    assert whole.trained == {name for name, _ in whole.wrapped[0].module.named_parameters()}
    targets = sum(int(batch.loss_mask.sum()) for batch in whole.batches)
    load = Load(images=8, tokens=256, vision_tokens=40, targets=targets, pairs=8 * 32 * 33 // 2)
    expected = sum(training_flops(whole.config.model, load, whole.trained).values())
    assert rows["2", "local", "none"]["flops"] == expected
    assert rows["1", "local", "none"]["flops"] < expected


def test_a_combination_that_fails_is_a_row_and_loses_no_other(bench, tmp_path, monkeypatch, capsys):
    output = tmp_path / "figures.json"
    written = []  # by the time that a row is begun

    def measure(config, seconds, peak):
        written.append(json.loads(output.read_text())["results"] if output.exists() else [])
        if config.parallel.recompute == "none":
            raise RuntimeError("no kernel for\n  a | b")
        figures = {"forward_backward_milliseconds": [1.0], "update_milliseconds": [1.0]}
        return figures | {"flops": 1.0, "tflops": 1.0, "mfu": None, "peak_gib": None}

    monkeypatch.setattr(bench, "measure", measure)
    options = ["--tiny", "--kernels", "local", "--recompute", "none", "full"]
    assert bench.main([*options, "--json", str(output)]) == 0
    results = json.loads(output.read_text())["results"]
    assert [(row["stage"], row["recompute"], "flops" in row) for row in results] == [
        ("1", "none", False),
        ("1", "full", True),
        ("2", "none", False),
        ("2", "full", True),
    ]
    assert results[0]["refused"] == "failed: RuntimeError: no kernel for a | b"
    assert written == [results[:count] for count in range(4)]
    assert [*tmp_path.iterdir()] == [output]
    said = capsys.readouterr()
    assert r"| 1 | local | none | failed: RuntimeError: no kernel for a \| b |" in said.out
    assert "Traceback" in said.err and "in measure" in said.err


def test_a_device_that_is_lost_takes_no_measured_row_with_it(bench, monkeypatch):
    def lost():
        raise RuntimeError("CUDA error: device lost")

    monkeypatch.setattr(bench, "measure", lambda *_: {"flops": 1.0})
    monkeypatch.setattr(torch.cuda, "empty_cache", lost)
    config = bench.settings("1", "local", "none", 1, tiny=True)
    assert bench.attempt(config, 0, None) == {"flops": 1.0}


@pytest.mark.skipif(not setup.on_cpu(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(bench, capsys):
    assert bench.main(["--stage", "1"]) == 1
    assert "no CUDA device here" in capsys.readouterr().err
