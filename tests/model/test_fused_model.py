"""Whole models with fused elementwise operations against those with torch's, and their choice."""

import json
from dataclasses import replace

import prepared  # noqa: F401
import pytest
import torch
from processes import run_ranks

from megatron_owl2.config.machine import check_machine
from megatron_owl2.config.schema import (
    AbstractorConfig,
    DecoderConfig,
    KernelConfig,
    ModelConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
    VisionConfig,
)
from megatron_owl2.data.image_tokens import target_index
from megatron_owl2.errors import ConfigError
from megatron_owl2.mcore import setup
from megatron_owl2.mcore.parallel import ParallelContext
from megatron_owl2.model.kernels.elementwise import build_elementwise
from megatron_owl2.model.kernels.fused import FusedElementwise
from megatron_owl2.model.kernels.plain import PlainElementwise
from megatron_owl2.model.owl2 import Owl2

pytestmark = [pytest.mark.distributed, pytest.mark.versions]

pytest.importorskip("triton", reason="needs Triton")
if not setup.on_cpu():
    pytest.skip("the compiled kernels are tested in tests/gpu", allow_module_level=True)

SIZES = {"hidden_size": 16, "num_heads": 4, "ffn_size": 20}


def run_config(elementwise: str, **parallel) -> RunConfig:
    vision = VisionConfig(image_size=28, num_layers=1, **SIZES)
    abstractor = AbstractorConfig(num_queries=2, num_layers=1, num_heads=4, ffn_size=20)
    # Of 30 rows of the vocabulary three are no word's.
    decoder = DecoderConfig(num_layers=2, num_kv_heads=2, vocab_size=27, vocab_multiple=6, **SIZES)
    return RunConfig(
        model=ModelConfig(vision=vision, abstractor=abstractor, decoder=decoder, init_std=0.1),
        parallel=ParallelConfig(**parallel),
        kernels=KernelConfig(elementwise=elementwise),
        train=TrainConfig(precision="fp32"),
    )


def batch() -> tuple[torch.Tensor, ...]:
    """Two rows of six tokens, the first with an image."""
    generator = torch.Generator().manual_seed(2)
    tokens, labels = torch.randint(27, (2, 2, 6), generator=generator)
    labels[:, :2] = -100
    image = torch.randn(1, 3, 28, 28, generator=generator)
    modality = torch.zeros(2, 6, dtype=torch.int64)
    modality[0, 1:4] = 1
    rows = modality.bool().t().flatten().nonzero().flatten()
    return tokens, image, rows, modality, torch.arange(6).expand(2, 6), labels


def loss_and_gradients(config: RunConfig) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    context = ParallelContext(config, setup.initialize(config.parallel))
    model = Owl2(context, config.model)
    *inputs, labels = batch()
    losses = model(*inputs, labels, target_index(labels))
    losses.sum().backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"loss": losses.detach(), **found}


def assert_same(config: RunConfig, tolerance: float) -> int:
    """Compares the run with fused operations with that of torch's; returns how many tensors."""
    plain = replace(config, kernels=KernelConfig(elementwise="plain"))
    expected, ours = loss_and_gradients(plain), loss_and_gradients(config)
    assert ours.keys() == expected.keys()
    norms = {name: float(tensor.float().norm()) for name, tensor in expected.items()}
    least = 1e-3 * max(norms.values())  # the biases of keys have no gradient but noise
    for name, tensor in ours.items():
        error = float((tensor.float() - expected[name].float()).norm())
        assert error < tolerance * max(norms[name], least), name
    return len(ours)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_loss_and_gradients_are_those_of_torch_under_recomputation(recompute):
    assert assert_same(run_config("fused", recompute=recompute), 1e-5) > 60


def test_loss_and_gradients_are_those_of_torch_under_tensor_and_sequence_parallelism():
    done = run_ranks(2, __file__)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) > 60


@pytest.mark.parametrize(
    "name, expected",
    [("auto", PlainElementwise), ("plain", PlainElementwise), ("fused", FusedElementwise)],
)
def test_the_switch_chooses_and_auto_is_plain_without_a_gpu(name, expected):
    config = run_config(name)
    context = ParallelContext(config, setup.initialize(config.parallel))
    assert type(build_elementwise(context)) is expected


def test_fused_kernels_are_refused_without_a_gpu():
    with pytest.raises(ConfigError, match="kernels.elementwise=fused needs a GPU"):
        check_machine(run_config("fused"))
    check_machine(run_config("auto"))


if __name__ == "__main__":
    compared = assert_same(run_config("fused", tensor=2, sequence=True), 1e-5)
    if torch.distributed.get_rank() == 0:
        print(json.dumps(compared))
    setup.shutdown()
