"""The counted traffic of elementwise operations, plain and fused, against sums by hand."""

from dataclasses import replace

import prepared  # noqa: F401
import pytest
import torch
from small_configs import STAGE_1, run_config

from megatron_owl2.config.schema import KernelConfig, RunConfig
from megatron_owl2.planner import activations
from megatron_owl2.planner.fake_process_groups import fake_process_groups
from megatron_owl2.planner.memory_traffic import LayerTraffic, TrafficCounter, layer_traffic


def counted(config: RunConfig, elementwise: str) -> dict[str, LayerTraffic]:
    return layer_traffic(replace(config, kernels=KernelConfig(elementwise=elementwise)))


@pytest.fixture(scope="module")
def full_size() -> dict[str, dict[str, LayerTraffic]]:
    """The 7B model with 16 rows of 256 tokens."""
    config = RunConfig()
    config.train.micro_batch_size = 16
    return {kind: counted(config, kind) for kind in ("plain", "fused")}


def test_fused_operations_move_less_than_0_45_of_the_bytes(full_size):
    plain, fused = (full_size[kind]["decoder"].total for kind in ("plain", "fused"))
    assert 5e9 < plain.bytes < 7e9
    assert fused.bytes <= 0.45 * plain.bytes
    assert fused.kernels <= 0.45 * plain.kernels
    for part, share in (("vision_model", 0.5), ("head", 0.2), ("abstractor", 1.0)):
        plain, fused = (full_size[kind][part].total for kind in ("plain", "fused"))
        assert fused.bytes <= share * plain.bytes


def test_bytes_of_a_fused_decoder_layer_are_those_by_hand(full_size):
    """Sums of inputs and outputs of the kernels, in bytes."""
    rows, vision, h, ffn = 16 * 256, 16 * 65, 4096, 11008
    x, gated, kv, tables = (2 * n for n in (rows * h, rows * ffn, vision * 2 * h, 2 * rows * 128))
    index, weights = 8 * vision, 2 * h * 2
    norm = 2 * x + rows + weights
    # The vision rows are read from the projection and written over the text's.
    qkv = 6 * x + 3 * kv - kv + tables + index
    gather = 2 * vision * h * 2 + index
    residual, swiglu = 3 * x, 3 * gated
    assert full_size["fused"]["decoder"].forward.bytes == (
        2 * norm + gather + qkv + 2 * residual + swiglu
    )
    assert full_size["fused"]["decoder"].forward.kernels == 2 + 1 + 2 + 2 + 1


@pytest.mark.parametrize(
    "settings",
    [{}, {"recompute": "full"}, {"trainable": STAGE_1}, {"tensor": 2, "sequence": True}],
    ids=str,
)
def test_every_configuration_gains(settings):
    config = run_config(**settings)
    plain, fused = (counted(config, kind)["decoder"].total for kind in ("plain", "fused"))
    assert 0 < fused.bytes < 0.6 * plain.bytes


def test_recomputation_adds_a_forward_pass():
    none, full = (
        counted(run_config(recompute=kind), "fused")["decoder"] for kind in ("none", "full")
    )
    assert full.forward == none.forward
    again = full.backward.bytes - none.backward.bytes
    # The last residual sum is not needed again.
    assert 0.8 * none.forward.bytes < again <= none.forward.bytes


def test_tensor_and_sequence_parallelism_split_the_traffic():
    one = counted(run_config(), "fused")["decoder"].total.bytes
    two = counted(run_config(tensor=2, sequence=True), "fused")["decoder"].total.bytes
    assert 0.5 * one < two < 0.75 * one


def count(function, *inputs: torch.Tensor) -> TrafficCounter:
    with (
        fake_process_groups(run_config().parallel, 1, 0) as groups,
        TrafficCounter(torch.nn.Identity(), groups) as counter,
    ):
        function(*inputs)
    return counter


def meta(*shape: int) -> torch.Tensor:
    return torch.empty(shape, device="meta")


@pytest.mark.parametrize(
    "function, shapes, size, kernels",
    [
        (lambda x, y: x + y, [(10, 8), (10, 8)], 3 * 320, 1),
        (lambda x, y: x + y, [(10, 8), (8,)], 2 * 320 + 32, 1),
        (lambda x, y: x + y.expand(10, 8), [(10, 8), (1, 8)], 2 * 320 + 32, 1),
        (lambda x: x.add_(1), [(10, 8)], 2 * 320, 1),
        (lambda x: torch.exp(x, out=x), [(10, 8)], 2 * 320, 1),
        (lambda x: x.view(80).unflatten(0, (8, 10)).t()[:5], [(10, 8)], 0, 0),
        (lambda x: torch.empty_like(x), [(10, 8)], 0, 0),
        (lambda x: torch.zeros_like(x), [(10, 8)], 320, 1),
        (lambda x, y: x.copy_(y), [(10, 8), (10, 8)], 2 * 320, 1),
        (lambda x: x.chunk(2, -1)[0].clone(), [(10, 8)], 320, 1),
        (lambda x, y: torch.cat([x, y]), [(10, 8), (5, 8)], 2 * 480, 1),
        (lambda x, y: x @ y, [(32, 32), (32, 32)], 0, 0),
        (lambda x, y: x @ y, [(2, 32), (32, 32)], 4 * (64 + 1024 + 64), 1),
    ],
)
def test_an_operation_counts_what_it_reads_and_writes(function, shapes, size, kernels):
    counter = count(function, *(meta(*shape) for shape in shapes))
    assert (counter.moved.bytes, counter.moved.kernels) == (size, kernels)
    assert counter.gemms == (1 if shapes == [(32, 32), (32, 32)] else 0)


def test_the_planned_memory_knows_that_fused_operations_keep_less():
    """Neither the activated gates of SwiGLU nor the projected vision rows; of quick-GELU the input
    alone, and no softmax in fp32."""
    config = run_config(hidden=512)
    kept = {}
    for kind in ("plain", "fused"):
        chosen = replace(config, kernels=KernelConfig(elementwise=kind))
        (cost,) = activations.measure_activations(chosen, [2])
        kept[kind] = cost.kept
    rows = 2 * config.data.sequence_length
    activated = rows * config.model.decoder.ffn_size * 2
    projected = 2 * config.model.tokens_per_image * 2 * config.model.decoder.hidden_size * 2
    assert kept["plain"]["decoder"] - kept["fused"]["decoder"] == activated + projected
    gates = 2 * (16 + 1) * config.model.vision.ffn_size * 2
    assert kept["plain"]["vision_model"] - kept["fused"]["vision_model"] == gates
    softmax = rows * config.model.decoder.vocab_size * 4
    assert kept["plain"]["head"] - kept["fused"]["head"] > 0.5 * softmax
