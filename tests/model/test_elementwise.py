"""The fused elementwise operations against torch's, their kernels run by Triton's interpreter."""

import numpy as np
import pytest
import torch
from elementwise_cases import Case, alone, cases, rotary

from megatron_owl2.model.kernels.fused import FusedElementwise
from megatron_owl2.model.kernels.plain import PlainElementwise

pytestmark = pytest.mark.versions
interpreter = pytest.importorskip("triton.runtime.interpreter", reason="needs Triton")
if torch.cuda.is_available():
    pytest.skip("the compiled kernels are tested in tests/gpu", allow_module_level=True)

PLAIN, FUSED = PlainElementwise(), FusedElementwise()
NAMES = [case.name for case in cases(torch.float32)]
# Rows of 1, an odd number, and a column more than a block of the kernels.
SHAPES = {
    "small": {},
    "odd": {"s": 1, "b": 1, "hidden": 1, "groups": 1, "sharing": 1, "size": 2, "ffn": 3},
    "blocks": {"s": 2, "b": 1, "hidden": 1025, "groups": 3, "size": 32, "ffn": 1025, "vocab": 4097},
}


@pytest.fixture(autouse=True)
def rounds_as_a_gpu_does(monkeypatch):
    """The interpreter cuts bits off where GPUs round bf16 to the nearest."""
    triton = interpreter.tl
    cast = interpreter.InterpreterBuilder.cast_impl

    def rounded(self, source, target):
        if source.dtype.scalar == triton.float32 and target.scalar == triton.bfloat16:
            numbers = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16()
            data = numbers.view(torch.uint16).numpy()
            return interpreter.TensorHandle(data, target.scalar)
        return cast(self, source, target)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "cast_impl", rounded)


def case(name: str, dtype: torch.dtype, **shape: int) -> Case:
    return next(case for case in cases(dtype, **shape) if case.name == name)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_fused_is_plain_in_fp32(name, shape):
    given = case(name, torch.float32, **SHAPES[shape])
    for ours, expected in zip(
        given.outputs_and_gradients(FUSED), given.outputs_and_gradients(PLAIN), strict=True
    ):
        torch.testing.assert_close(ours, expected, atol=3e-6, rtol=3e-6)


@pytest.mark.parametrize("name", NAMES)
def test_in_bf16_fused_rounds_once(name):
    """Within half a unit in the last place of what fp32 gives, but for the norm: it rounds twice,
    and its weights' gradients are sums over rounded rows."""
    given = case(name, torch.bfloat16, vocab=200, ffn=60)
    wide = Case(given.name, given.call, tuple(x.float() for x in given.inputs))
    roundings, absolute = (2, 1e-2) if "norm" in name else (1, 2e-5)
    for ours, exact in zip(
        given.outputs_and_gradients(FUSED), wide.outputs_and_gradients(PLAIN), strict=True
    ):
        loss = name == "cross entropy" and ours.dim() == 2
        assert ours.dtype == (torch.float32 if loss else torch.bfloat16)
        torch.testing.assert_close(ours.float(), exact, rtol=roundings * 2**-8, atol=absolute)


@pytest.mark.parametrize("name", ["norm by modality", "norm"])
def test_the_norm_in_bf16_rounds_where_llama_rounds(name):
    given = case(name, torch.bfloat16, hidden=200)
    assert torch.equal(given.outputs_and_gradients(FUSED)[0], given.outputs_and_gradients(PLAIN)[0])


@pytest.mark.parametrize("name", NAMES)
def test_no_rows_are_no_error(name):
    given = case(name, torch.float32, s=0)
    gradients = given.outputs_and_gradients(FUSED)[-len(given.inputs) :]
    for gradient, x in zip(gradients, given.inputs, strict=True):
        assert gradient.shape == x.shape and not gradient.any()


@pytest.mark.parametrize("name", NAMES)
def test_strides_of_inputs_and_gradients_do_not_matter(name):
    given = case(name, torch.float32, vocab=200, ffn=60)

    def spread(x: torch.Tensor) -> torch.Tensor:
        return torch.stack([x, x], -1)[..., 0]

    def call(operations, *inputs):
        found = given.call(operations, *(spread(x) for x in inputs))
        return tuple(map(spread, found)) if isinstance(found, tuple) else spread(found)

    strided = Case(name, call, given.inputs)
    for ours, expected in zip(
        strided.outputs_and_gradients(FUSED), given.outputs_and_gradients(PLAIN), strict=True
    ):
        torch.testing.assert_close(ours, expected, atol=3e-6, rtol=3e-6)


def test_gradients_of_attention_come_in_any_order_of_dimensions():
    """Attention returns [b, heads, s, d] for [s, b, heads, d]."""
    given = case("qkv by modality", torch.float32)

    def call(operations, *inputs):
        return tuple(part.permute(1, 2, 0, 3) for part in given.call(operations, *inputs))

    turned = Case("turned", call, given.inputs)
    for ours, expected in zip(
        turned.outputs_and_gradients(FUSED), turned.outputs_and_gradients(PLAIN), strict=True
    ):
        torch.testing.assert_close(ours, expected, atol=3e-6, rtol=3e-6)


def test_frozen_weights_have_no_gradient_and_vision_weights_do():
    given = case("norm by modality", torch.float32)
    found = {}
    for operations in (PLAIN, FUSED):
        x, text, vision = (tensor.detach().clone() for tensor in given.inputs)
        x.requires_grad_()
        vision.requires_grad_()
        given.call(operations, x, text, vision).square().sum().backward()
        assert text.grad is None
        found[operations] = x.grad, vision.grad
    for ours, expected in zip(found[FUSED], found[PLAIN], strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def kept(call, *inputs: torch.Tensor) -> set[int]:
    """Addresses of the tensors that a call keeps for its backward pass."""
    found = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: found.append(t) or t, lambda t: t):
        call(*(x.requires_grad_() for x in inputs))
    return {tensor.data_ptr() for tensor in found}


@pytest.mark.parametrize("name", ["norm by modality", "norm", "swiglu", "quick-GELU"])
def test_nothing_but_inputs_is_kept(name):
    given = case(name, torch.float32, ffn=60)
    large = kept(lambda *inputs: given.call(FUSED, *inputs), *given.inputs)
    assert given.inputs[0].data_ptr() in large
    assert len(large) <= len(given.inputs) + 1  # the indicator of the modality


def test_no_projection_is_kept_for_queries_keys_and_values():
    qkv, kv = torch.randn(6, 2, 5, 10), torch.randn(3, 2, 2, 10)
    tables, rows = rotary(3, 2, 10, torch.float32, "cpu"), torch.tensor([1, 3, 5])
    found = kept(lambda *inputs: FUSED.split_qkv(*inputs, rows, tables), qkv, kv)
    assert found == {rows.data_ptr(), *(table.data_ptr() for table in tables)}


def test_the_gradient_of_the_loss_takes_the_place_of_the_logits():
    x = torch.randn(4, 50, requires_grad=True)
    logits = x * 1
    seen = []
    logits.register_hook(lambda gradient: seen.append(gradient.data_ptr()))
    FUSED.cross_entropy(logits, torch.tensor([0, 7, 49, 3]), alone()).sum().backward()
    assert seen == [logits.data_ptr()]


def test_padding_of_the_vocabulary_and_ignored_labels():
    """Logits of -inf have no probability and no gradient; a label that is no word has no logit."""
    logits = torch.randn(3, 40)
    logits[:, 35:] = float("-inf")
    labels = torch.tensor([34, -100, 0])
    expected = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    expected[1] = logits[1].logsumexp(0)
    x = logits.clone().requires_grad_()
    loss = FUSED.cross_entropy(x * 1, labels, alone())
    torch.testing.assert_close(loss, expected)
    (gradient,) = torch.autograd.grad((loss * torch.tensor([1.0, 0.0, -2.0])).sum(), x)
    assert not gradient[:, 35:].any() and not gradient[1].any()
    probabilities = logits.softmax(-1)
    torch.testing.assert_close(gradient[0, 34], probabilities[0, 34] - 1)
    torch.testing.assert_close(gradient[2, 1:], -2 * probabilities[2, 1:])
