"""The split norms, keys and values against both branches computed everywhere, then selected."""

import json
import os
from itertools import combinations

import prepared  # noqa: F401
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import run_ranks
from torch.distributed.tensor.debug import CommDebugMode

from megatron_owl2.config.schema import (
    MODALITY_SPLIT,
    DecoderConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
)
from megatron_owl2.config.validate_model import validate_model
from megatron_owl2.errors import ConfigError
from megatron_owl2.mcore import setup
from megatron_owl2.mcore.parallel import ParallelContext
from megatron_owl2.model.decoder import DecoderLayer, rotary_tables
from megatron_owl2.model.kernels import build_kernels, plain
from megatron_owl2.model.kernels.local import LocalKernels
from megatron_owl2.model.modality import Modality, ModalityNorm, ModalityQKV

pytestmark = pytest.mark.distributed

EPS = 1e-6


@pytest.fixture(scope="module", autouse=True)
def process_group():
    setup.initialize(ParallelConfig())


def run_config(decoder=None, precision="fp32", **parallel) -> RunConfig:
    config = RunConfig(parallel=ParallelConfig(**parallel), train=TrainConfig(precision=precision))
    config.model.decoder = DecoderConfig(num_layers=1, vocab_size=8, **(decoder or {}))
    config.model.init_std = 0.1
    return config


def parallel_context(config: RunConfig) -> ParallelContext:
    parallel = config.parallel
    return ParallelContext(config, setup.initialize(parallel))


def modality_of(is_vision: torch.Tensor) -> Modality:
    """From bool [s, b]."""
    return Modality(is_vision.unsqueeze(-1), is_vision.flatten().nonzero().flatten())


def unturned(x: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotary tables that leave heads of `size` for tokens x [s, b, ...] as they are."""
    return torch.ones(*x.shape[:2], 1, size), torch.zeros(*x.shape[:2], 1, size)


def random_parameters(module: torch.nn.Module):
    for parameter in module.parameters():
        parameter.data = torch.randn_like(parameter) * 0.3


def close(ours, reference):
    for a, b in zip(ours, reference, strict=True):
        torch.testing.assert_close(a.double(), b.double(), atol=1e-5, rtol=1e-5)


def outputs_and_gradients(outputs, *inputs):
    """The outputs and the gradients of a weighted sum of them, which must all exist."""
    torch.manual_seed(1)
    loss = sum((out * torch.randn_like(out.float())).sum() for out in outputs)
    return [*outputs, *torch.autograd.grad(loss, inputs)]


@st.composite
def batches(draw):
    """bool [s, b]: no vision row, all of them, or any."""
    s, b = draw(st.integers(1, 7)), draw(st.integers(1, 3))
    rows = st.lists(st.booleans(), min_size=s * b, max_size=s * b)
    chosen = draw(st.one_of(st.just([False] * s * b), st.just([True] * s * b), rows))
    return torch.tensor(chosen).view(s, b)


def slow_norm(x, is_vision, text, vision):
    normed = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()
    return torch.where(is_vision.unsqueeze(-1), normed * vision, normed * text)


@settings(max_examples=50)
@given(is_vision=batches(), size=st.sampled_from([1, 8, 30]), seed=st.integers(0, 99))
def test_norm_is_both_norms_everywhere_then_selected(is_vision, size, seed):
    torch.manual_seed(seed)
    norm = ModalityNorm(parallel_context(run_config()), size, EPS, split=True)
    random_parameters(norm)
    x = torch.randn(*is_vision.shape, size, requires_grad=True)
    inputs = (x, norm.weight_text, norm.weight_vision)
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    close(
        outputs_and_gradients([norm(x, modality_of(is_vision))], *inputs),
        outputs_and_gradients([slow_norm(wide[0], is_vision, *wide[1:])], *wide),
    )


@settings(max_examples=50)
@given(
    is_vision=batches(),
    groups=st.integers(1, 3),
    sharing=st.integers(1, 3),
    head_size=st.sampled_from([2, 6]),
    seed=st.integers(0, 99),
)
def test_keys_and_values_are_both_projections_everywhere_then_selected(
    is_vision, groups, sharing, head_size, seed
):
    torch.manual_seed(seed)
    heads, size = groups * sharing, groups * sharing * head_size
    config = run_config({"hidden_size": size, "num_heads": heads, "num_kv_heads": groups})
    here = parallel_context(config)
    qkv = ModalityQKV(here, build_kernels(here), config.model.decoder, config.model.init_std, 0)
    x = torch.randn(*is_vision.shape, size, requires_grad=True)
    inputs = (x, qkv.linear_qkv.weight, qkv.linear_kv_vision.weight)

    shared = inputs[1].view(groups, sharing + 2, head_size, size)
    split = inputs[2].view(groups, 2, head_size, size)
    query = torch.einsum("sbi,gpdi->sbgpd", x, shared[:, :-2]).flatten(2, 3)
    key, value = (
        torch.where(
            is_vision[..., None, None],
            torch.einsum("sbi,gdi->sbgd", x, split[:, part]),
            torch.einsum("sbi,gdi->sbgd", x, shared[:, sharing + part]),
        )
        for part in (0, 1)
    )
    close(
        outputs_and_gradients(qkv(x, modality_of(is_vision), unturned(x, head_size)), *inputs),
        outputs_and_gradients([query, key, value], *inputs),
    )


@pytest.mark.parametrize("split", [True, False])
def test_norm_in_bf16_rounds_where_llama_rounds(split):
    torch.manual_seed(0)
    norm = ModalityNorm(parallel_context(run_config(precision="bf16")), 64, EPS, split=split)
    random_parameters(norm)
    x = torch.randn(20, 2, 64).bfloat16().requires_grad_()
    is_vision = torch.rand(20, 2) < 0.5
    weight = norm.weight_text
    if split:
        weight = torch.where(is_vision.unsqueeze(-1), norm.weight_vision, weight)
    normed = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + EPS)
    llama, late = weight * normed.bfloat16(), (weight * normed).bfloat16()
    ours = norm(x, modality_of(is_vision))
    assert torch.equal(ours, llama)
    assert not torch.equal(ours, late)
    inputs = [x, *norm.parameters()]
    for a, b in zip(
        outputs_and_gradients([ours], *inputs), outputs_and_gradients([llama], *inputs), strict=True
    ):
        assert a.dtype == b.dtype == torch.bfloat16
        torch.testing.assert_close(a, b, atol=0.02, rtol=0.02)


def test_backward_by_formula_and_by_fused_kernels_agree():
    torch.manual_seed(0)
    x, grad = torch.randn(2, 20, 3, 64)
    close(plain.renormalize_fused(x, grad, EPS), plain.renormalize_by_formula(x, grad, EPS))


@pytest.mark.parametrize("precision, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_norm_keeps_no_tensor_but_its_input_for_the_backward_pass(precision, dtype):
    norm = ModalityNorm(parallel_context(run_config(precision=precision)), 64, EPS, split=True)
    x = torch.randn(20, 2, 64, dtype=dtype, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        norm(x, modality_of(torch.rand(20, 2) < 0.5))
    fresh = [t for t in kept if t.numel() >= 20 * 2 * 64 and t.data_ptr() != x.data_ptr()]
    assert any(t.data_ptr() == x.data_ptr() for t in kept)
    assert fresh == []


def layer_of(split) -> DecoderLayer:
    sizes = {"hidden_size": 24, "num_heads": 6, "num_kv_heads": 2, "ffn_size": 40}
    config = run_config({**sizes, "modality_split": list(split)})
    here = parallel_context(config)
    return DecoderLayer(here, build_kernels(here), config.model, 0)


VISION = {
    "input_norm": "input_norm.weight_vision",
    "key_value": "attention.qkv.linear_kv_vision.weight",
    "mlp_norm": "pre_mlp_norm.weight_vision",
}
SUBSETS = [split for n in range(4) for split in combinations(MODALITY_SPLIT, n)]


def text_part(tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """What corresponds to the vision weight `name` among the text's (a view)."""
    if name != VISION["key_value"]:
        return tensors[name.replace("vision", "text")]
    return tensors["attention.qkv.linear_qkv.weight"].view(2, 5, 4, 24)[:, 3:]


@pytest.mark.parametrize("split", SUBSETS, ids=lambda split: "+".join(split) or "none")
def test_what_is_not_split_is_the_text_weight_for_both(split):
    """The layer equals the fully split one that holds the text's weights twice."""
    torch.manual_seed(0)
    ours, full = layer_of(split), layer_of(MODALITY_SPLIT)
    random_parameters(ours)
    weights, of_full = dict(ours.named_parameters()), dict(full.named_parameters())
    missing = {VISION[name] for name in MODALITY_SPLIT if name not in split}
    assert of_full.keys() - weights.keys() == missing
    for name, parameter in of_full.items():
        source = text_part(weights, name) if name in missing else weights[name]
        parameter.data = source.detach().reshape(parameter.shape).clone()

    is_vision = torch.rand(5, 2) < 0.5
    position_ids = torch.arange(5).expand(2, 5)
    sizes = DecoderConfig(hidden_size=24, num_heads=6)
    rotary = rotary_tables(position_ids, sizes, torch.float32)
    x = torch.randn(5, 2, 24)
    weighting = torch.randn(5, 2, 24)
    outputs = []
    for layer in (ours, full):
        outputs.append(layer(x, modality_of(is_vision), rotary, None, None))
        (outputs[-1] * weighting).sum().backward()
    expected = {name: parameter.grad for name, parameter in of_full.items()}
    for name in missing:
        part = text_part(expected, name)
        part += expected.pop(name).view(part.shape)
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)
    close([weights[name].grad for name in expected], expected.values())


@pytest.mark.parametrize("wrong", [["input_norm", "input_norm"], ["value"], ["key_value", "norm"]])
def test_unknown_and_repeated_names_are_refused(wrong):
    config = run_config({"modality_split": wrong})
    with pytest.raises(ConfigError, match="modality_split.*input_norm, key_value, mlp_norm"):
        validate_model(config.model)
    config.model.decoder.modality_split = ["mlp_norm", "input_norm"]
    validate_model(config.model)


def test_one_gather_and_one_reduce_scatter_serve_all_projections():
    done = run_ranks(2, __file__)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "forward": {"_allgather_base_": 1},
        "backward": {"_reduce_scatter_base_": 1},
    }


def count_collectives():
    """Two ranks: the collectives of a split norm and its projections under sequence parallelism."""
    config = run_config(
        {"hidden_size": 24, "num_heads": 6, "num_kv_heads": 2}, tensor=2, sequence=True
    )
    here = parallel_context(config)
    norm = ModalityNorm(here, 24, EPS, split=True)
    qkv = ModalityQKV(here, build_kernels(here), config.model.decoder, 0.1, 0)
    x = torch.randn(3, 2, 24, requires_grad=True)
    is_vision = torch.rand(2, 6, generator=torch.Generator().manual_seed(0)) < 0.5
    rows = is_vision.t().flatten().nonzero().flatten()
    split = Modality.of(is_vision, rows, here)
    counts = {}
    with CommDebugMode() as forward:
        outputs = qkv(norm(x, split), split, unturned(torch.empty(6, 2), 4))
    with CommDebugMode() as backward:
        sum(out.sum() for out in outputs).backward()
    for name, mode in (("forward", forward), ("backward", backward)):
        counts[name] = {str(op).split(".")[-1]: n for op, n in mode.get_comm_counts().items()}
    if torch.distributed.get_rank() == 0:
        print(json.dumps(counts))
    setup.shutdown()


if __name__ == "__main__":
    count_collectives()


class SixteenRows(LocalKernels):
    """Kernels as FP8 ones are: the rows of a GEMM are a multiple of 16, and not none."""

    gemm_row_alignment = 16

    class ColumnLinear(LocalKernels.ColumnLinear):
        def forward(self, x):
            assert x.flatten(0, -2).shape[0] % 16 == 0 and x.numel()
            return super().forward(x)


@pytest.mark.parametrize("vision", [0, 1, 16, 21])
def test_rows_that_fill_up_a_gemm_change_nothing(vision):
    config = run_config({"hidden_size": 32, "num_heads": 4, "num_kv_heads": 2})
    here = parallel_context(config)
    found = []
    for library in (build_kernels(here), SixteenRows()):
        torch.manual_seed(0)
        qkv = ModalityQKV(here, library, config.model.decoder, config.model.init_std, 0)
        torch.manual_seed(1)
        x = torch.randn(16, 2, config.model.decoder.hidden_size, requires_grad=True)
        rows = torch.randperm(32)[:vision]
        is_vision = torch.zeros(32, dtype=torch.bool).index_fill(0, rows, True).view(16, 2, 1)
        outputs = qkv(x, Modality(is_vision, rows), unturned(x, 8))
        sum((n + 1) * part.square().sum() for n, part in enumerate(outputs)).backward()
        found.append([*outputs, x.grad, *(p.grad for p in qkv.parameters())])
    for ours, expected in zip(*found, strict=True):
        assert torch.allclose(ours, expected, atol=1e-6)


def test_one_process_does_not_look_like_a_rank_to_those_it_starts(monkeypatch):
    told = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    for name in told:
        monkeypatch.delenv(name, raising=False)
    setup.shutdown()
    setup.initialize(ParallelConfig())
    assert not [name for name in told if name in os.environ]
