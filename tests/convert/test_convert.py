"""The released model to a checkpoint and back: bits, settings, file sizes and memory."""

import json
import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import RLock

import pytest
import torch
from hf_dirs import (
    CLIP,
    LLAMA,
    OWL2,
    assert_same,
    editable,
    is_table,
    parts_config,
    run_tool,
    small_tokenizer,
    tensors_of,
)
from paths import HELPERS
from processes import run_ranks
from safetensors.torch import save_file

from megatron_owl2.config.load import save_config
from megatron_owl2.convert import hf_config
from megatron_owl2.convert.hf_weights import export_hf
from megatron_owl2.convert.lazy_tensor import LazyTensor
from megatron_owl2.convert.mapping import constants
from megatron_owl2.convert.megatron_io import write_checkpoint
from megatron_owl2.convert.sources import from_checkpoint, from_released
from megatron_owl2.model.position_tables import NAMES as TABLES
from megatron_owl2.training.checkpoint import directories

pytestmark = pytest.mark.distributed


def released(directory: Path, dtype: torch.dtype, files: str) -> Path:
    """The tiny official model in `dtype`: one safetensors file, one .bin, or .bin shards as the
    released converter writes them, without the tables that the model computes."""
    name = str(dtype).removeprefix("torch.")
    source = editable(OWL2, directory, torch_dtype=name)
    tensors = {n: t if is_table(n) else t.to(dtype) for n, t in tensors_of(OWL2).items()}
    (source / "model.safetensors").unlink()
    if files == "safetensors":
        save_file(tensors, source / "model.safetensors")
    elif files == "bin":
        torch.save(tensors, source / "pytorch_model.bin")
    else:
        kept = [n for n in tensors if not is_table(n) and not n.endswith("inv_freq")]
        index = {}
        for number in (1, 2, 3):
            part = {n: tensors[n] for n in kept[number - 1 :: 3]}
            index |= dict.fromkeys(part, f"pytorch_model-{number}-of-3.bin")
            torch.save(part, source / f"pytorch_model-{number}-of-3.bin")
        (source / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    return source


@pytest.mark.parametrize("files", ["safetensors", "bin", "bin shards"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_there_and_back_is_bitwise(tmp_path, dtype, files):
    whole = from_released(released(tmp_path / "in", dtype, files))
    assert whole.config.train.precision == ("bf16" if dtype is torch.bfloat16 else "fp32")
    write_checkpoint(tmp_path / "ckpt", whole.tensors, whole.config)
    whole = from_checkpoint(tmp_path / "ckpt")
    assert {t.dtype for n, t in whole.tensors.items() if n not in TABLES} == {dtype}
    export_hf(whole.tensors, whole.config.model, tmp_path / "out")
    wanted = {n: t for n, t in tensors_of(OWL2).items() if not n.endswith("inv_freq")}
    wanted = {n: t if is_table(n) else t.to(dtype) for n, t in wanted.items()}
    if files == "bin shards":  # which had no tables
        made = constants(whole.config.model)
        wanted |= {n: made[TABLES["k_pos" in n]] for n in wanted if is_table(n)}
    assert_same(tensors_of(tmp_path / "out"), wanted)
    tree = json.loads((tmp_path / "out" / "config.json").read_text())
    assert tree["torch_dtype"] == str(dtype).removeprefix("torch.")
    sizes = {(tmp_path / "out" / f).stat().st_mode for f in ("model.safetensors", "config.json")}
    assert len(sizes) == 1  # whoever may read the one may read the other


def test_shards_have_the_size_that_was_asked_for(tmp_path):
    whole = from_released(OWL2)
    out = tmp_path / "out"
    options = {"dtype": torch.bfloat16, "max_shard_bytes": 200_000}
    export_hf(whole.tensors, whole.config.model, out, **options)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    shards = sorted(out.glob("model-*.safetensors"))
    assert len(shards) > 2 and set(index["weight_map"].values()) == {s.name for s in shards}
    assert all(shard.stat().st_size < 220_000 for shard in shards)
    found = tensors_of(out)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in found.values())
    assert found.keys() == {n for n in tensors_of(OWL2) if not n.endswith("inv_freq")}
    assert not (out / "tokenizer.model").exists()


def test_the_parallel_sizes_of_a_checkpoint_leave_no_trace(tmp_path):
    whole = from_released(OWL2)
    write_checkpoint(tmp_path / "one", whole.tensors, whole.config)
    script, sizes = HELPERS / "resave.py", ["2", "2"]
    done = run_ranks(4, script, tmp_path / "one", tmp_path / "four", *sizes)
    assert done.returncode == 0, done.stderr
    for name in ("one", "four"):
        whole = from_checkpoint(tmp_path / name)
        export_hf(whole.tensors, whole.config.model, tmp_path / f"{name} hf")
    assert_same(tensors_of(tmp_path / "four hf"), tensors_of(tmp_path / "one hf"))


class Watched:
    """LazyTensors that know how many bytes of what they handed out are still in use."""

    def __init__(self, tensors: dict[str, LazyTensor]):
        self.alive, self.most = 0, 0
        self.counting = RLock()  # tensors are read in one thread and freed in another
        self.tensors = {n: replace(t, read=partial(self.read, t)) for n, t in tensors.items()}

    def read(self, tensor: LazyTensor) -> torch.Tensor:
        fresh = tensor.read().clone()
        with self.counting:
            self.alive += fresh.nbytes
            self.most = max(self.most, self.alive)
        weakref.finalize(fresh, self.forget, fresh.nbytes)
        return fresh

    def forget(self, size: int) -> None:
        with self.counting:
            self.alive -= size


def test_few_tensors_are_in_memory_at_a_time(tmp_path):
    whole = from_released(OWL2)
    largest = max(t.nbytes for t in whole.tensors.values())
    total = sum(t.nbytes for t in whole.tensors.values())
    watched = Watched(whole.tensors)
    write_checkpoint(tmp_path / "ckpt", watched.tensors, whole.config)
    assert watched.most <= 3 * largest < total / 3
    whole = from_checkpoint(tmp_path / "ckpt")
    watched = Watched(whole.tensors)
    export_hf(watched.tensors, whole.config.model, tmp_path / "out")
    assert watched.most <= 3 * largest


def test_released_settings_survive(tmp_path):
    whole = from_released(OWL2)
    whole.config.model.image_mean = [0.1, 0.2, 0.3]
    export_hf(whole.tensors, whole.config.model, tmp_path / "out")
    assert hf_config.read_model(tmp_path / "out") == whole.config.model
    official = json.loads((OWL2 / "config.json").read_text())
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    pairs = [(written, official)]
    pairs += [
        (written["visual_config"][k], official["visual_config"][k])
        for k in written["visual_config"]
    ]
    for ours, theirs in pairs:
        for key in ours.keys() & theirs.keys() - {"torch_dtype", "visual_config"}:
            assert ours[key] == theirs[key], key
    assert {"grid_size", "encoder_hidden_size"} <= pairs[2][0].keys()


def test_tools_convert_there_and_back(tmp_path, capsys):
    tokenizer = small_tokenizer(tmp_path)
    config = parts_config()
    config.model.image_mean = [0.5, 0.5, 0.5]
    save_config(config, tmp_path / "run.yaml")
    ckpt, out = tmp_path / "ckpt", tmp_path / "out"
    arguments = ("--language-model", LLAMA, "--vision-model", CLIP, "--output", ckpt)
    options = ("--config", tmp_path / "run.yaml")
    status, said, _ = run_tool("convert_from_hf", *arguments, *options, capsys=capsys)
    assert status == 0 and "no tokenizer.model" in said
    status, _, complaint = run_tool("convert_from_hf", *arguments, capsys=capsys)
    assert status == 2 and f"error: {ckpt} exists already" in complaint
    arguments = ("--checkpoint", ckpt, "--output", out, "--layout", "llama")
    assert run_tool("convert_to_hf", *arguments, capsys=capsys)[0] == 0
    assert_same(tensors_of(out), tensors_of(LLAMA))
    status, _, complaint = run_tool("convert_to_hf", *arguments, capsys=capsys)
    assert status == 2 and f"{out} exists already" in complaint
    assert directories.read_config(ckpt).model.image_mean == [0.5, 0.5, 0.5]

    ckpt, out = tmp_path / "owl2 ckpt", tmp_path / "owl2 out"
    arguments = ("--owl2", OWL2, "--tokenizer", tokenizer, "--output", ckpt)
    assert run_tool("convert_from_hf", *arguments, capsys=capsys)[0] == 0
    assert from_checkpoint(ckpt).config.data.tokenizer == str(ckpt / "tokenizer.model")
    arguments = ("--checkpoint", ckpt, "--output", out, "--dtype", "bfloat16")
    assert run_tool("convert_to_hf", *arguments, capsys=capsys)[0] == 0
    wanted = {n: t.bfloat16() for n, t in tensors_of(OWL2).items() if not n.endswith("inv_freq")}
    found = tensors_of(out)
    assert found.keys() == wanted.keys()
    for name in (n for n in wanted if not is_table(n)):
        assert torch.equal(found[name], wanted[name]), name
    assert (
        json.loads((out / "tokenizer_config.json").read_text())["tokenizer_class"]
        == "LlamaTokenizer"
    )
