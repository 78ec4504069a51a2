"""The compiled kernels of the elementwise operations against torch's, at sizes of real models."""

import gpu_model
import pytest
import torch
from elementwise_cases import Case, cases

from megatron_owl2.model.kernels.fused import FusedElementwise
from megatron_owl2.model.kernels.plain import PlainElementwise

pytestmark = pytest.mark.gpu

pytest.importorskip("triton", reason="needs Triton")

PLAIN, FUSED = PlainElementwise(), FusedElementwise()
SEVEN_B = {"hidden": 4096, "groups": 32, "sharing": 1, "size": 128, "ffn": 11008, "vocab": 32000}
SHAPES = {
    "7B": {"s": 256, "b": 2, **SEVEN_B},
    "7B, half of the heads": {"s": 255, "b": 1, **SEVEN_B, "groups": 16, "ffn": 5504},
    "odd": {"s": 3, "b": 1, "hidden": 1000, "groups": 3, "sharing": 5, "size": 80, "ffn": 1100},
}
NAMES = [case.name for case in cases(torch.float32)]


def case(name: str, dtype: torch.dtype, shape: str) -> Case:
    made = cases(dtype, "cuda", **SHAPES[shape])
    return next(case for case in made if case.name == name)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_fp32_is_torchs(name, shape):
    given = case(name, torch.float32, shape)
    for ours, expected in zip(
        given.outputs_and_gradients(FUSED), given.outputs_and_gradients(PLAIN), strict=True
    ):
        assert gpu_model.relative(ours, expected) < 1e-5


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_bf16_is_no_further_from_fp32_than_torchs(name, shape):
    given = case(name, torch.bfloat16, shape)
    wide = Case(given.name, given.call, tuple(x.float() for x in given.inputs))
    for ours, plain, exact in zip(
        given.outputs_and_gradients(FUSED),
        given.outputs_and_gradients(PLAIN),
        wide.outputs_and_gradients(PLAIN),
        strict=True,
    ):
        error = gpu_model.relative(ours.float(), exact)
        assert error < 1.1 * gpu_model.relative(plain.float(), exact) + 2**-9


@pytest.mark.parametrize("backend", ["local", "transformer_engine"])
def test_a_layer_is_that_of_torchs_operations(backend):
    if backend != "local":
        pytest.importorskip("transformer_engine.pytorch", exc_type=Exception)
    found = []
    for elementwise in ("plain", "fused"):
        run = gpu_model.config(kernels={"backend": backend, "elementwise": elementwise})
        built = gpu_model.layer(run)
        found.append(gpu_model.forward_backward(built, *gpu_model.inputs(run, 65)))
    (out, grad, grads), ours = found
    assert gpu_model.relative(ours[0], out) < 0.01
    assert gpu_model.relative(ours[1], grad) < 0.02
    for name, expected in grads.items():
        assert gpu_model.relative(ours[2][name], expected) < 0.03, name
