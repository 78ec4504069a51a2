"""A checkpoint against a Hugging Face directory: agreement under several parallel sizes, and
every way in which the two can differ."""

import json

import pytest
import torch
from hf_dirs import OWL2, TOOLS, editable, run_tool
from processes import run_ranks
from safetensors.torch import load_file, save_file

from megatron_owl2.convert.hf_weights import export_hf
from megatron_owl2.convert.lazy_tensor import LazyTensor
from megatron_owl2.convert.megatron_io import write_checkpoint
from megatron_owl2.convert.sources import from_released
from megatron_owl2.model.position_tables import NAMES as TABLES

pytestmark = pytest.mark.distributed

COMPUTED = [
    f"{inputs}, {what}"
    for inputs in ("text", "one image", "two images")
    for what in ("logits", "loss", "gradients")
]
ALL = ["settings", "keys", "weights", *COMPUTED]


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    directory = tmp_path_factory.mktemp("against") / "ckpt"
    whole = from_released(OWL2)
    write_checkpoint(directory, whole.tensors, whole.config)
    return directory


def failed(said: str) -> list[str]:
    """The checks that failed, of all that were made."""
    lines = [line.split(maxsplit=1) for line in said.splitlines()]
    assert {verdict for verdict, _ in lines} <= {"ok", "FAILED"}
    return [rest.split(":")[0] for verdict, rest in lines if verdict == "FAILED"]


def against(checkpoint, directory, capsys):
    arguments = ("--checkpoint", checkpoint, "--against", directory)
    return run_tool("verify_checkpoint", *arguments, capsys=capsys)


def test_the_directory_it_came_from_agrees(converted, capsys):
    status, said, _ = against(converted, OWL2, capsys)
    assert (status, failed(said)) == (0, [])
    assert [line.split(maxsplit=1)[1].split(":")[0] for line in said.splitlines()] == ALL
    assert "weights: all 102 equal bit by bit in float32" in said


def test_a_narrower_export_agrees_on_two_ranks(converted, tmp_path):
    whole = from_released(OWL2)
    export_hf(whole.tensors, whole.config.model, tmp_path / "out", dtype=torch.bfloat16)
    options = ["--checkpoint", converted, "--against", tmp_path / "out", "parallel.pipeline=2"]
    done = run_ranks(2, TOOLS / "verify_checkpoint.py", *options)
    assert done.returncode == 0, done.stderr
    assert failed(done.stdout) == [] and len(done.stdout.splitlines()) == len(ALL)
    assert "equal bit by bit in bfloat16, float32" in done.stdout


@pytest.mark.parametrize(("stored", "exported"), [("float16", "bfloat16"), ("bfloat16", "float16")])
def test_a_cast_to_the_other_16_bits_agrees(tmp_path, capsys, stored, exported):
    whole = from_released(OWL2)
    tensors = {
        name: tensor if name in TABLES else LazyTensor.of(tensor.read().to(getattr(torch, stored)))
        for name, tensor in whole.tensors.items()
    }
    write_checkpoint(tmp_path / "ckpt", tensors, whole.config)
    export_hf(tensors, whole.config.model, tmp_path / "out", dtype=getattr(torch, exported))
    status, said, _ = against(tmp_path / "ckpt", tmp_path / "out", capsys)
    assert (status, failed(said)) == (0, [])
    assert f"equal bit by bit in {exported}" in said


def test_one_changed_weight_is_found(converted, tmp_path, capsys):
    other = editable(OWL2, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    name = "model.layers.1.self_attn.v_proj.multiway.1.weight"
    tensors[name][3, 5] += 0.5
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    status, said, _ = against(converted, other, capsys)
    assert status == 1
    found = failed(said)
    assert found[0] == "weights" and not {"text, logits", "text, gradients"} & set(found)
    assert {"one image, logits", "two images, gradients"} <= set(found)
    changed = "attention.qkv.linear_kv_vision.weight (by 0.5)"
    assert f"1 differ: decoder.layers.1.{changed}" in said


def test_another_setting_is_found(converted, tmp_path, capsys):
    other = editable(OWL2, tmp_path / "other", rope_theta=500.0)
    status, said, _ = against(converted, other, capsys)
    assert status == 1 and "decoder.rope_theta is 10000.0 in the checkpoint, 500.0 there" in said
    assert {"settings", "text, logits", "one image, gradients"} <= set(failed(said))
    assert "weights" not in failed(said)


def test_other_prompts_and_pixels_are_found(converted, tmp_path, capsys):
    whole = from_released(OWL2)
    whole.config.model.template = "vicuna_v1"
    whole.config.model.image_mode = "pad"
    export_hf(whole.tensors, whole.config.model, tmp_path / "out")
    status, said, _ = against(converted, tmp_path / "out", capsys)
    assert (status, failed(said)) == (1, ["settings"])
    assert "template is owl2 in the checkpoint, vicuna_v1 there" in said
    assert "image_mode is stretch in the checkpoint, pad there" in said


@pytest.mark.parametrize(("exported", "found"), [(False, []), (True, ["settings"])])
def test_a_released_directory_leaves_the_template_to_the_run(tmp_path, capsys, exported, found):
    """Without a processor it says nothing of prompts; an export of the default says that one."""
    whole = from_released(OWL2)
    if exported:
        export_hf(whole.tensors, whole.config.model, tmp_path / "out")
    whole.config.model.template = "vicuna_v1"
    write_checkpoint(tmp_path / "ckpt", whole.tensors, whole.config)
    _, said, _ = against(tmp_path / "ckpt", tmp_path / "out" if exported else OWL2, capsys)
    assert failed(said) == found


def test_names_and_shapes_are_listed(converted, tmp_path, capsys):
    other = editable(OWL2, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    tensors["model.extra.weight"] = tensors.pop("model.norm.weight")
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:500].contiguous()
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    status, said, _ = against(converted, other, capsys)
    assert status == 1 and said.startswith("FAILED  keys: ")
    for problem in ("missing: model.norm", "unexpected: model.extra", "shape: lm_head"):
        assert problem in said
    assert "logits" not in said


def test_what_cannot_be_compared_is_an_error(converted, tmp_path, capsys):
    status, said, complaint = against(tmp_path / "nowhere", OWL2, capsys)
    assert (status, said) == (2, "") and "nowhere does not exist" in complaint
    arguments = ("--checkpoint", converted, "--against", OWL2, "--gradients")
    status, _, complaint = run_tool("verify_checkpoint", *arguments, capsys=capsys)
    assert status == 2 and "--against makes its own inputs" in complaint
    status, _, complaint = run_tool("verify_checkpoint", "--checkpoint", converted, capsys=capsys)
    assert status == 2 and "give either --against, or both" in complaint
    foreign, bare = tmp_path / "foreign", editable(OWL2, tmp_path / "bare")
    foreign.mkdir()
    (foreign / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (bare / "model.safetensors").unlink()
    for directory, message in (
        (tmp_path / "nowhere", "nowhere is not a directory"),
        (foreign, "model_type is 'llama', wanted 'mplug_owl2'"),
        (bare, "bare holds no weights"),
    ):
        status, said, complaint = against(converted, directory, capsys)
        assert (status, said) == (2, "") and message in complaint
