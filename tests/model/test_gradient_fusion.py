"""GEMMs of weight gradients that add to the optimizer's buffers leave the gradients they should.

apex's kernel is played by torch; the autograd functions and gradient buffers are megatron-core's.
"""

from types import SimpleNamespace

import pytest
import tiny_run
import torch
from megatron.core.tensor_parallel import layers

from megatron_owl2.config.load import load_config
from megatron_owl2.mcore import parallel, setup
from megatron_owl2.mcore.parallel import ParallelContext
from megatron_owl2.model.owl2 import build
from megatron_owl2.training import optimizer as optim
from megatron_owl2.training import parameter_groups
from megatron_owl2.training.step import forward_backward

pytestmark = pytest.mark.slow

FROZEN = "stage.trainable=['vision_model.*','abstractor.*','*.linear_kv_vision.weight','*vision']"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tiny_run.make(tmp_path_factory.mktemp("fusion"))
    config = load_config(path)
    batches = list(tiny_run.batches(config, 1, limit_samples=4))
    assert {bool(batch.modality.any()) for batch in batches} == {True, False}
    return path, batches


@pytest.fixture
def kernel(monkeypatch):
    """Weight gradients added to a buffer, by shape."""
    added = []

    def add(inputs, gradient, buffer):
        added.append(buffer.shape)
        buffer.addmm_(gradient.t(), inputs)

    played = SimpleNamespace(wgrad_gemm_accum_fp32=add)
    monkeypatch.setattr(layers, "fused_weight_gradient_mlp_cuda", played, raising=False)
    monkeypatch.setattr(layers, "_grad_accum_fusion_available", True)
    monkeypatch.setattr(parallel, "fused_gradients_found", lambda: True)
    return added


def gradients(run, overrides, *, fused):
    path, batches = run
    config = load_config(path, ["train.micro_batch_size=1", *overrides])
    torch.manual_seed(0)
    context = ParallelContext(config, setup.initialize(config.parallel), fuses_gradients=fused)
    chunks = build(context, config.model, 1)
    parameter_groups.freeze(config, chunks)
    wrapped = optim.wrap_ddp(chunks, overlap=config.parallel.overlap)
    wrapped[0].zero_grad_buffer()
    forward_backward(config, wrapped, iter(batches), len(batches))
    return {n: p.main_grad.clone() for n, p in chunks[0].named_parameters() if p.requires_grad}


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("stage", ["stage.trainable=['*']", FROZEN], ids=["all", "frozen"])
@pytest.mark.parametrize("overlap", ["true", "false"])
def test_the_gradients_are_the_same(run, kernel, recompute, stage, overlap):
    options = [f"parallel.recompute={recompute}", stage, f"parallel.overlap={overlap}"]
    same_gradients(run, kernel, options)


@pytest.mark.parametrize("part", ["vision_model", "abstractor", "decoder"])
def test_layers_above_frozen_parameters_have_their_gradients(run, kernel, part):
    same_gradients(run, kernel, ["parallel.recompute=full", f"stage.trainable=['{part}.layers.*']"])


def same_gradients(run, kernel, options):
    expected = gradients(run, options, fused=False)
    assert not kernel
    found = gradients(run, options, fused=True)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6, msg=name)
    assert kernel
