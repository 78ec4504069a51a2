"""The proof tool as users start it: one process, tensor, sequence and pipeline parallel."""

import json
import math

import pytest
import torch
from hf_dirs import run_tool
from paths import DATA, TOOLS
from processes import run_ranks
from safetensors.torch import load_file, save_file

from megatron_owl2.convert.megatron_io import write_checkpoint
from megatron_owl2.convert.sources import from_released
from megatron_owl2.convert.verify.verify import verify
from megatron_owl2.errors import ConfigError, ConversionError

pytestmark = pytest.mark.distributed

OFFICIAL = DATA / "official_tiny"
META = json.loads((OFFICIAL / "meta.json").read_text())
COUNTS = "images_per_placeholder"
TOOL = TOOLS / "verify_checkpoint.py"


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    directory = tmp_path_factory.mktemp("verify") / "ckpt"
    whole = from_released(OFFICIAL / "hf_ckpt")
    write_checkpoint(directory, whole.tensors, whole.config)
    return directory


@pytest.fixture(scope="module")
def reference():
    tensors = load_file(OFFICIAL / "reference.safetensors")
    return {n.removeprefix("batch/"): t for n, t in tensors.items() if n.startswith("batch/")}


@pytest.fixture
def inputs(reference):
    return {n: reference[n] for n in ("input_ids", "attention_mask", "labels", "images")}


def test_two_ranks_compute_what_the_official_code_computes(converted, reference, inputs, tmp_path):
    """The function below the tool does so under every parallelism in test_official_parity.py, and
    the tool itself under PP 2 in test_compare.py."""
    overrides = ["parallel.tensor=2", "parallel.sequence=true", "parallel.recompute=full"]
    save_file(inputs, tmp_path / "inputs.safetensors")
    files = ["--inputs", tmp_path / "inputs.safetensors", "--output", tmp_path / "out.safetensors"]
    done = run_ranks(2, TOOL, "--checkpoint", converted, *files, "--gradients", *overrides)
    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / "out.safetensors")
    check(found, reference, gradients=True)


def check(found, reference, gradients):
    valid = reference["expanded_attention_mask"]
    assert found["logits"].shape == reference["logits"].shape
    torch.testing.assert_close(
        found["logits"][valid], reference["logits"][valid], atol=1e-4, rtol=0
    )
    torch.testing.assert_close(found["loss"], reference["loss"], atol=1e-5, rtol=0)
    names = {name.removeprefix("grad.") for name in found.keys() - {"logits", "loss"}}
    statistics = META["grad_stats_all_params"] if gradients else {}
    assert names == statistics.keys()
    official = load_file(OFFICIAL / "grads_batch.safetensors")
    for name, statistic in statistics.items():
        gradient = found[f"grad.{name}"]
        if name.endswith("attention.key.bias"):  # zero in exact arithmetic
            assert gradient.norm() < 1e-5
            continue
        assert gradient.double().norm().item() == pytest.approx(statistic["l2"], rel=1e-4), name
        if name in official:
            assert (gradient - official[name]).norm() < 1e-4 * official[name].norm(), name


def test_one_process(converted, reference, inputs):
    check(verify(converted, inputs), reference, gradients=False)
    check(verify(converted, inputs, gradients=True), reference, gradients=True)


def test_text_needs_no_images(converted, inputs):
    row = META["batch_order"].index("text_only")
    text = {n: inputs[n][row : row + 1] for n in ("input_ids", "labels")}
    expected = load_file(OFFICIAL / "reference.safetensors")
    found = verify(converted, text)
    torch.testing.assert_close(
        found["logits"], expected["single_text_only/logits"], atol=1e-4, rtol=0
    )
    torch.testing.assert_close(found["loss"], expected["single_text_only/loss"], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": None}, "must hold input_ids"),
        ({"images": None}, r"normalised floats \[6, 3, 56, 56\].* found none"),
        ({"images": torch.zeros(5, 3, 56, 56)}, r"found torch.float32 \[5, 3, 56, 56\]"),
        ({"images": torch.zeros(6, 3, 56, 56, dtype=torch.uint8)}, "found torch.uint8"),
        ({"labels": None}, "gradients need labels"),
        ({"labels": torch.full((5, 21), -100)}, "nothing to predict"),
        ({"labels": torch.full((5, 21), 512)}, "labels must be below 512"),
        ({"attention_mask": torch.ones(5, 20)}, r"attention_mask is \[5, 20\]"),
        ({"attention_mask": torch.ones(5, 21).tril(-1)}, "right padding"),
        (
            {
                "input_ids": torch.ones(5, 257, dtype=torch.int64),
                "attention_mask": None,
                "labels": torch.ones(5, 257, dtype=torch.int64),
            },
            "257 positions, the decoder has 256",
        ),
        ({"input_ids": torch.full((5, 21), 600)}, "600, which is neither below 512 nor -200"),
        ({"input_ids": torch.ones(5, 21)}, r"input_ids must be .* found torch.float32 \[5, 21\]"),
        ({"input_ids": torch.ones(5, 21, dtype=torch.uint8)}, "found torch.uint8"),
        ({"input_ids": torch.ones(21, dtype=torch.int64)}, r"found torch.int64 \[21\]"),
        ({"input_ids": torch.ones(0, 0, dtype=torch.int64)}, r"found torch.int64 \[0, 0\]"),
        ({"input_ids": torch.ones(1, 0, dtype=torch.int64)}, r"found torch.int64 \[1, 0\]"),
        ({"labels": torch.ones(5, 21)}, r"labels must be .* found torch.float32 \[5, 21\]"),
        (
            {"labels": torch.ones(5, 20, dtype=torch.int32)},
            r"labels is \[5, 20\], input_ids \[5, 21",
        ),
        ({COUNTS: torch.tensor(1)}, rf"{COUNTS} must be .* found torch.int64 \[\]"),
        ({COUNTS: torch.ones(6)}, rf"{COUNTS} must be .* found torch.float32 \[6\]"),
        ({COUNTS: torch.ones(5, dtype=torch.int64)}, "6 placeholders and text-only rows, but 5"),
        ({COUNTS: torch.tensor([1, 1, 0, 1, 1, 1])}, rf"{COUNTS} holds 0, which is not from 1 to"),
        ({COUNTS: torch.tensor([1, -1, 1, 1, 1, 1])}, rf"{COUNTS} holds -1, which is not from 1"),
        ({COUNTS: torch.tensor([1, 1, 1, 1, 1, 10**12])}, "holds 1000000000000, which is not from"),
        ({"images": torch.full((6, 3, 56, 56), math.nan)}, "images hold NaN or infinity"),
        ({"images": torch.full((6, 3, 56, 56), math.inf)}, "images hold NaN or infinity"),
        (
            {"images": torch.full((6, 3, 56, 56), 1e300, dtype=torch.float64)},
            "hold NaN or infinity",
        ),
    ],
)
def test_inputs_that_do_not_fit_are_refused(converted, inputs, change, message):
    inputs = {n: t for n, t in (inputs | change).items() if t is not None}
    with pytest.raises(ConversionError, match=message):
        verify(converted, inputs, gradients=True)


def test_narrow_integers_are_as_good(converted, reference, inputs):
    inputs |= {name: inputs[name].int() for name in ("input_ids", "labels")}
    inputs[COUNTS] = torch.ones(6, dtype=torch.int32)
    check(verify(converted, inputs, gradients=True), reference, gradients=True)


def test_the_inputs_are_not_overwritten(converted, inputs, tmp_path, capsys):
    file, link = tmp_path / "inputs.safetensors", tmp_path / "link.safetensors"
    save_file(inputs, file)
    link.symlink_to(file)
    before = file.read_bytes()
    for output in (file, link):
        arguments = ("--checkpoint", converted, "--inputs", file, "--output", output)
        status, _, complaint = run_tool("verify_checkpoint", *arguments, capsys=capsys)
        assert status == 2 and f"--output {output} is the file of the inputs" in complaint
    assert file.read_bytes() == before and link.is_symlink()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_images_may_have_any_precision(converted, inputs, dtype):
    images = inputs["images"].to(torch.bfloat16)
    found = [verify(converted, inputs | {"images": images.to(d)}) for d in (dtype, torch.float32)]
    assert torch.equal(found[0]["logits"], found[1]["logits"])


def test_parallel_sizes_of_more_processes_are_refused(converted, inputs):
    with pytest.raises(ConfigError, match="1 processes, but parallel.tensor \\(2\\)"):
        verify(converted, inputs, ["parallel.tensor=2"])
