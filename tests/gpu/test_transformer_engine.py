"""Transformer Engine's kernels against torch's, in bf16 and in every FP8 recipe of the GPU."""

import gpu_model
import pytest
import torch

from megatron_owl2.config.fp8 import FP8_RECIPES
from megatron_owl2.mcore import setup
from megatron_owl2.mcore.parallel import ParallelContext
from megatron_owl2.model.kernels import build_kernels

pytestmark = pytest.mark.gpu

pytest.importorskip(
    "transformer_engine.pytorch", reason="needs Transformer Engine", exc_type=Exception
)

RECIPES = tuple(FP8_RECIPES)
TE = {"kernels": {"backend": "transformer_engine"}}


def reference(vision):
    """The layer by torch in bf16, and what it computes."""
    run = gpu_model.config()
    built = gpu_model.layer(run)
    found = gpu_model.forward_backward(built, *gpu_model.inputs(run, vision))
    return built.state_dict(), found


@pytest.mark.parametrize("vision", [0, 65, 256])
def test_bf16_is_torchs(vision):
    weights, (out, grad, grads) = reference(vision)
    run = gpu_model.config(**TE)
    built = gpu_model.layer(run, weights)
    ours = gpu_model.forward_backward(built, *gpu_model.inputs(run, vision))
    assert gpu_model.relative(ours[0], out) < 0.01
    assert gpu_model.relative(ours[1], grad) < 0.02
    assert ours[2].keys() == grads.keys()
    for name, expected in grads.items():
        if expected.norm() > 0:
            assert gpu_model.relative(ours[2][name], expected) < 0.03, name
        else:
            assert ours[2][name].norm() == 0, name


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("vision", [0, 65])
def test_fp8_is_near_and_every_weight_has_a_gradient(recipe, vision):
    run = gpu_model.config(kernels={"backend": "transformer_engine", "fp8": recipe})
    gpu_model.skip_unless_it_runs(run)
    weights, (out, grad, grads) = reference(vision)
    built = gpu_model.layer(run, weights)
    context = ParallelContext(run, setup.initialize(run.parallel))
    chosen = build_kernels(context)
    around = chosen.fp8_context() if recipe == "delayed" else chosen.layer_fp8_context(0)
    ours = gpu_model.forward_backward(built, *gpu_model.inputs(run, vision), around)
    assert 1e-5 < gpu_model.relative(ours[0], out) < 0.1  # FP8 it is, not bf16 by another name
    assert gpu_model.relative(ours[1], grad) < 0.2
    for name, expected in grads.items():
        assert ours[2][name].isfinite().all(), name
        if expected.norm() > 0:
            assert gpu_model.relative(ours[2][name], expected) < 0.3, name


@pytest.mark.parametrize("recipe", ["none", *RECIPES])
@pytest.mark.parametrize("rows", [0, 1, 65, 128])
def test_any_number_of_vision_tokens_fills_up_gemms(recipe, rows):
    run = gpu_model.config(kernels={"backend": "transformer_engine", "fp8": recipe})
    gpu_model.skip_unless_it_runs(run)
    context = ParallelContext(run, setup.initialize(run.parallel))
    chosen = build_kernels(context)
    qkv = gpu_model.layer(run).attention.qkv
    x = torch.randn(rows, 1024, device=setup.device(), dtype=torch.bfloat16)
    with chosen.fp8_context(), chosen.layer_fp8_context(0):
        found = qkv._project_vision(qkv.linear_kv_vision, x)
    weight = qkv.linear_kv_vision.weight
    expected = (x @ weight.t()).view_as(found)
    found.sum().backward()
    gradient = x.float().sum(0).expand_as(weight)
    if rows == 0:
        assert found.numel() == 0 and weight.grad.norm() == 0
        return
    assert gpu_model.relative(found.float(), expected.float()) < 0.1
    assert gpu_model.relative(weight.grad.float(), gradient) < 0.1


def test_attention_with_fewer_heads_of_keys_is_torchs():
    found = {}
    for backend in ("local", "transformer_engine"):
        run = gpu_model.config(kernels={"backend": backend})
        run.model.decoder.num_kv_heads = 2
        context = ParallelContext(run, setup.initialize(run.parallel))
        core = build_kernels(context).attention(context, 0).to(setup.device())
        torch.manual_seed(3)
        parts = [
            torch.randn(256, 2, heads, 128, device=setup.device(), dtype=torch.bfloat16)
            for heads in (8, 2, 2)
        ]
        parts = [part.requires_grad_() for part in parts]
        out = core(*parts)
        (out.float() * torch.linspace(-1, 1, 1024, device=out.device)).sum().backward()
        found[backend] = [out, *(part.grad for part in parts)]
    for ours, expected in zip(found["transformer_engine"], found["local"], strict=True):
        assert gpu_model.relative(ours.float(), expected.float()) < 0.02


@pytest.mark.parametrize("fp8", ["none", "tensorwise", "delayed"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputation_gives_the_same_gradients(fp8, use_reentrant):
    run = gpu_model.config(kernels={"backend": "transformer_engine", "fp8": fp8})
    gpu_model.skip_unless_it_runs(run)
    found = {}
    for again in (False, True):
        built = gpu_model.layer(run)
        context = ParallelContext(run, setup.initialize(run.parallel))
        chosen = build_kernels(context)
        x, modality, rotary = gpu_model.inputs(run, 65)
        with chosen.fp8_context(), chosen.layer_fp8_context(0):
            arguments = (x, modality, rotary, None, None)
            if again:
                out = chosen.checkpoint(built, *arguments, use_reentrant=use_reentrant)
            else:
                out = built(*arguments)
        out.float().square().mean().backward()
        found[again] = {n: p.grad.float() for n, p in built.named_parameters()}
    for name, expected in found[False].items():
        assert gpu_model.relative(found[True][name], expected) < 1e-3, name
