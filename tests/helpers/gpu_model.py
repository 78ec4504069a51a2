"""Decoder layers and micro-batches of real widths for the GPU tests."""

import pytest
import torch

from megatron_owl2.config.machine import check_machine
from megatron_owl2.config.schema import RunConfig
from megatron_owl2.errors import ConfigError
from megatron_owl2.mcore import setup
from megatron_owl2.mcore.parallel import ParallelContext
from megatron_owl2.model.decoder import DecoderLayer, rotary_tables
from megatron_owl2.model.kernels import build_kernels
from megatron_owl2.model.modality import Modality


def config(**sections) -> RunConfig:
    """A run in bf16 with decoder layers of 1,024 channels; `sections` are section=dict."""
    run = RunConfig()
    run.train.precision = "bf16"
    decoder = run.model.decoder
    decoder.hidden_size, decoder.num_layers, decoder.ffn_size = 1024, 2, 2816
    decoder.num_heads = decoder.num_kv_heads = 8
    for section, values in sections.items():
        for key, value in values.items():
            setattr(getattr(run, section), key, value)
    return run


def skip_unless_it_runs(run: RunConfig) -> None:
    """Skip a test of kernels that this machine has not, for the reason that a run would be told."""
    try:
        check_machine(run)
    except ConfigError as error:
        pytest.skip(str(error))


def layer(run: RunConfig, weights: dict | None = None) -> DecoderLayer:
    """One decoder layer on the GPU under the run's kernels, with given weights if any."""
    torch.manual_seed(0)
    context = ParallelContext(run, setup.initialize(run.parallel))
    built = DecoderLayer(context, build_kernels(context), run.model, 0).to(setup.device())
    if weights is not None:
        missing, unexpected = built.load_state_dict(weights, strict=False)
        assert not unexpected and all("_extra_state" in name for name in missing)
    return built


def inputs(run: RunConfig, vision: int, rows: int = 2, length: int = 256):
    """Hidden states, modality with `vision` visual positions per row, and rotary tables."""
    device = setup.device()
    size = run.model.decoder.hidden_size
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(length, rows, size, generator=generator).to(device, torch.bfloat16)
    is_vision = torch.zeros(length, rows, 1, dtype=torch.bool, device=device)
    begin = min(3, length - vision)
    is_vision[begin : begin + vision] = True
    position = torch.arange(length, device=device)
    modality = Modality(is_vision, is_vision.flatten().nonzero().flatten())
    rotary = rotary_tables(position.expand(rows, -1), run.model.decoder, torch.bfloat16)
    return x.requires_grad_(), modality, rotary


def forward_backward(built, x, modality, rotary, around=None):
    """Output, gradient to the input and gradients of all parameters, fp32."""
    if around is None:
        out = built(x, modality, rotary, None, None)
    else:
        with around:
            out = built(x, modality, rotary, None, None)
    weight = torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out)
    (out.float() * weight).sum().backward()
    gradients = {name: p.grad.float() for name, p in built.named_parameters()}
    return out.float(), x.grad.float(), gradients


def relative(ours: torch.Tensor, expected: torch.Tensor) -> float:
    return float((ours - expected).norm() / expected.norm())
