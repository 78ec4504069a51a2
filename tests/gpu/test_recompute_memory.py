"""Activation memory of the decoder under every kind of recomputation."""

import gpu_model
import pytest
import torch

from megatron_owl2.mcore import setup
from megatron_owl2.mcore.parallel import ParallelContext
from megatron_owl2.model.decoder import Decoder

pytestmark = pytest.mark.gpu


def kept(backend: str, recompute: str) -> int:
    """Bytes of a forward pass through two layers that its backward pass needs."""
    run = gpu_model.config(kernels={"backend": backend}, parallel={"recompute": recompute})
    torch.manual_seed(0)
    context = ParallelContext(run, setup.initialize(run.parallel))
    decoder = Decoder(context, run.model, 0, 2).to(setup.device())
    x, modality, _ = gpu_model.inputs(run, 65, length=2048)
    positions = torch.arange(len(x), device=x.device).expand(x.shape[1], -1)
    decoder(x, modality, positions).sum().backward()  # workspaces are there from now on
    decoder.zero_grad(set_to_none=True)
    x.grad = None
    before = torch.cuda.memory_allocated()
    out = decoder(x, modality, positions)
    found = torch.cuda.memory_allocated() - before - out.numel() * out.element_size()
    out.sum().backward()
    return found


@pytest.mark.parametrize("backend", ["local", "transformer_engine"])
def test_the_more_is_computed_again_the_less_is_kept(backend):
    if backend != "local":
        pytest.importorskip("transformer_engine.pytorch", exc_type=Exception)
    none, selective, full = (kept(backend, kind) for kind in ("none", "selective", "full"))
    assert full < selective < none
    hidden = 2 * 2048 * 1024 * 2  # what enters a layer: rows, positions, channels, bytes
    assert full < 3.5 * hidden, "of both layers it is what enters them, and little beside"
