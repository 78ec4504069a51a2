"""The gradient norm without kernels of Transformer Engine or apex."""

import pytest
import torch
from megatron.core.optimizer import clip_grads
from megatron.core.utils import local_multi_tensor_l2_norm

from megatron_owl2.mcore import gradients


@pytest.mark.parametrize("sizes", [[1], [3, 1000, 17], [64] * 40])
def test_the_norm_is_the_one_of_megatron_core(monkeypatch, sizes):
    monkeypatch.setattr(clip_grads, "l2_norm_impl", local_multi_tensor_l2_norm)
    gradients.install_norm()
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(n, generator=generator) * 10 ** (i % 5 - 2) for i, n in enumerate(sizes)]
    (found, _), (expected, _) = (
        norm(0, None, [tensors], False)
        for norm in (clip_grads.l2_norm_impl, local_multi_tensor_l2_norm)
    )
    assert found.shape == (1,) and found.dtype == torch.float32
    assert torch.allclose(found, expected, rtol=1e-6, atol=0)
    exact = sum(float(tensor.double().square().sum()) for tensor in tensors) ** 0.5
    assert float(found) == pytest.approx(exact, rel=1e-6)


def test_a_better_kernel_stays(monkeypatch):
    kernel = object()
    monkeypatch.setattr(clip_grads, "l2_norm_impl", kernel)
    gradients.install_norm()
    assert clip_grads.l2_norm_impl is kernel
