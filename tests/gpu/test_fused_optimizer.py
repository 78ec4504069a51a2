"""Checkpoints of the AdamW that Transformer Engine brings, of torch's, and of both in turn."""

import pytest
import stored
import tiny_run
from gpu_runs import FP32, train

from megatron_owl2.training.checkpoint import directories

pytestmark = pytest.mark.gpu

pytest.importorskip(
    "transformer_engine.pytorch", reason="needs Transformer Engine", exc_type=Exception
)

# One rate for all steps, so that the number of steps of a run does not change it.
OPTIONS = [*FP32, "optimizer.lr=1e-3", "optimizer.min_lr=1e-3"]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("optimizer")
    config = tiny_run.make(folder, 3)
    train(config, folder / "initial", "train.steps=1", *FP32, cpu=True)
    options = [*OPTIONS, f"stage.initial_checkpoint={folder / 'initial'}"]
    return config, options, train(config, folder / "whole", *options)


@pytest.mark.parametrize("first", ["gpu", "cpu"])
@pytest.mark.parametrize("then", ["gpu", "cpu"])
def test_a_run_goes_on_whichever_adamw_began_it(start, tmp_path, first, then):
    config, options, expected = start
    train(config, tmp_path, *options, "train.steps=2", cpu=first == "cpu")
    moments = stored.read(directories.resolve(tmp_path), stored.MOMENT)
    assert all(moment.isfinite().all() for moment in moments.values())
    assert any(moment.norm() > 0 for moment in moments.values())
    found = train(config, tmp_path, *options, cpu=then == "cpu")
    assert [step for step, *_ in found] == [1, 2, 3]
    for ours, reference in zip(found, expected, strict=True):
        assert ours == pytest.approx(reference, rel=2e-3)
