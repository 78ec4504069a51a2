"""What conversion refuses, and how: every problem named, nothing half done, no traceback."""

import json
import pickle
import resource
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hf_dirs import (
    CLIP,
    DATA,
    LLAMA,
    OWL2,
    TOOLS,
    editable,
    export,
    parts_config,
    run_tool,
    small_tokenizer,
)
from safetensors.torch import load_file, save_file

from megatron_owl2.config.load import save_config
from megatron_owl2.convert import hf_config
from megatron_owl2.convert.hf_weights import export_hf
from megatron_owl2.convert.megatron_io import write_checkpoint
from megatron_owl2.convert.safetensors_io import TensorReader
from megatron_owl2.convert.sources import from_checkpoint, from_llama_and_clip, from_owl2
from megatron_owl2.convert.verify.verify import Verification
from megatron_owl2.errors import CheckpointError, ConfigError, ConversionError
from megatron_owl2.training.checkpoint import save_load
from megatron_owl2.training.checkpoint.index import read_index


def test_all_misfits_are_listed(tmp_path):
    broken = editable(OWL2, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    lost = tensors.pop("model.norm.weight")
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:500].contiguous()
    tensors["model.extra.bias"] = lost
    count = "model.vision_model.embeddings.cls_token"
    tensors[count] = torch.ones(tensors[count].shape, dtype=torch.int64)
    save_file(tensors, broken / "model.safetensors")
    with pytest.raises(ConversionError) as refusal:
        from_owl2(broken)
    for line in (
        "missing: model.norm.weight",
        "unexpected: model.extra.bias",
        "shape: lm_head.weight is (500, 64), wanted (512, 64)",
        f"dtype: {count} holds I64, wanted floating-point numbers",
    ):
        assert line in str(refusal.value)


def test_damaged_and_hostile_files_are_refused(tmp_path):
    cut = editable(OWL2, tmp_path / "cut")
    whole = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(whole[:-1000])
    with pytest.raises(ConversionError, match="model.safetensors is damaged"):
        TensorReader(cut)

    class Hostile:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "owned",))

    hostile = tmp_path / "hostile"
    hostile.mkdir()
    torch.save({"lm_head.weight": Hostile()}, hostile / "pytorch_model.bin")
    with pytest.raises(ConversionError, match="cannot be read as plain tensors"):
        TensorReader(hostile)
    assert not (tmp_path / "owned").exists()
    torch.save({"lm_head.weight": torch.ones(4)}, hostile / "pytorch_model.bin")
    short = (hostile / "pytorch_model.bin").read_bytes()[:-100]
    (hostile / "pytorch_model.bin").write_bytes(short)
    with pytest.raises(ConversionError, match="pytorch_model.bin"):
        TensorReader(hostile)

    with pytest.raises(ConversionError, match="holds no weights"):
        TensorReader(DATA)
    for file, message in (
        ("../hostile/pytorch_model.bin", "not a file beside it"),
        ("model-00001-of-00001.safetensors", "is missing, but the index names it"),
    ):
        index = {"weight_map": {"lm_head.weight": file}}
        (cut / "model.safetensors").unlink(missing_ok=True)
        (cut / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(ConversionError, match=message):
            TensorReader(cut)


def test_an_index_must_be_true(tmp_path):
    save_file({"there": torch.ones(1)}, tmp_path / "a.safetensors")
    index = {"weight_map": {"there": "a.safetensors", "not there": "a.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConversionError, match="not there: not there in a.safetensors"):
        TensorReader(tmp_path)


@pytest.mark.parametrize(
    ("source", "change", "message"),
    [
        (LLAMA, {"hidden_act": "gelu"}, "hidden_act is 'gelu', this model only has 'silu'"),
        (LLAMA, {"tie_word_embeddings": True}, "tie_word_embeddings is True"),
        (LLAMA, {"head_dim": 16}, "head_dim is 16, this model only has 8"),
        (LLAMA, {"rope_parameters": {"rope_type": "llama3", "factor": 8}}, "rope_scaling is"),
        (LLAMA, {"vocab_size": "many"}, "vocab_size is 'many', wanted a number"),
        (LLAMA, {"model_type": "qwen2"}, "model_type is 'qwen2', wanted 'llama'"),
        (CLIP, {"vision_config": {"hidden_act": "gelu"}}, "hidden_act is 'gelu'"),
        (OWL2, {"visual_config": None}, "must hold visual_model and visual_abstractor"),
    ],
)
def test_other_architectures_are_refused(tmp_path, source, change, message):
    read = {LLAMA: hf_config.read_llama, CLIP: hf_config.read_clip, OWL2: hf_config.read_owl2}
    with pytest.raises(ConversionError, match=message):
        read[source](editable(source, tmp_path / "other", **change))


def test_older_llama_settings_are_read(tmp_path):
    old = editable(LLAMA, tmp_path / "old", rope_parameters=None, rope_theta=77.0)
    tree = json.loads((old / "config.json").read_text())
    del tree["num_key_value_heads"]
    (old / "config.json").write_text(json.dumps(tree))
    decoder = hf_config.read_llama(old)
    assert (decoder.rope_theta, decoder.num_kv_heads) == (77.0, 4)


def test_a_configuration_of_another_model_is_refused_with_all_differences():
    config = parts_config()
    config.model.decoder.norm_eps = 1e-6
    config.model.decoder.max_positions = 65
    config.model.vision.num_layers = 3
    with pytest.raises(ConversionError) as refusal:
        from_llama_and_clip(LLAMA, CLIP, config=config)
    for line in (
        f"model.decoder.norm_eps: 1e-06 in the configuration, 1e-05 in {LLAMA}",
        f"model.decoder.max_positions: 65 in the configuration, 64 in {LLAMA}",
        f"model.vision.num_layers: 3 in the configuration, 2 in {CLIP}",
    ):
        assert line in str(refusal.value)


def test_a_tokenizer_with_more_pieces_than_the_embedding_is_refused(tmp_path):
    tokenizer = small_tokenizer(tmp_path)
    with pytest.raises(ConversionError, match="has 320 pieces, but the model embeds 64"):
        from_llama_and_clip(LLAMA, CLIP, config=parts_config(), tokenizer=tokenizer)


def test_a_failed_export_leaves_nothing(tmp_path):
    model = from_owl2(OWL2).build()
    with torch.no_grad():
        model.final_norm.weight[3] = 1e6
    with pytest.raises(ConversionError, match="model.norm.weight .* too large for torch.float16"):
        export(model, tmp_path / "out", dtype=torch.float16)
    with torch.no_grad():
        model.final_norm.weight[3] = float("nan")
    with pytest.raises(ConversionError, match="model.norm.weight .* not finite"):
        export(model, tmp_path / "out")
    with pytest.raises(ConversionError, match="/dev/null/out cannot be written"):
        export(model, "/dev/null/out")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing(tmp_path):
    """A limit on the size of files stands for the disk that fills up while a tensor is written."""
    whole = from_owl2(OWL2)
    write_checkpoint(tmp_path / "ckpt", whole.tensors, whole.config)
    for tool, source in (
        ("convert_from_hf", ["--owl2", OWL2]),
        ("convert_to_hf", ["--checkpoint", tmp_path / "ckpt"]),
    ):
        command = [sys.executable, TOOLS / f"{tool}.py", *source, "--output", tmp_path / "out"]
        limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (100_000, 100_000))
        done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit)
        assert done.returncode == 2, done.stderr
        assert "out" in done.stderr and "File too large" in done.stderr
        assert "Traceback" not in done.stderr
        assert [p.name for p in tmp_path.iterdir()] == ["ckpt"]


@pytest.fixture
def converted(tmp_path):
    whole = from_owl2(OWL2)
    write_checkpoint(tmp_path / "ckpt", whole.tensors, whole.config)
    return tmp_path / "ckpt"


def test_no_room_is_known_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    whole = from_owl2(OWL2)
    with pytest.raises(CheckpointError, match="no room .* needs 0.0 GiB"):
        write_checkpoint(tmp_path / "ckpt", whole.tensors, whole.config)
    with pytest.raises(ConversionError, match="no room .* needs 0.0 GiB"):
        export_hf(whole.tensors, whole.config.model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_checkpoint_is_refused(converted):
    largest = max(converted.glob("*.distcp"), key=lambda path: path.stat().st_size)
    data = largest.read_bytes()
    largest.write_bytes(data[:-100])
    with pytest.raises(CheckpointError, match=f"{largest.name} is cut off at"):
        from_checkpoint(converted)
    largest.write_bytes(bytes(len(data)))
    whole = from_checkpoint(converted)
    with pytest.raises(CheckpointError, match="cannot be read"):
        whole.build()
    model = from_owl2(OWL2).build()
    with pytest.raises(CheckpointError, match="cannot be read"):
        save_load.load_weights(converted, [model])
    largest.unlink()
    with pytest.raises(CheckpointError, match=f"{largest.name} is missing"):
        from_checkpoint(converted)


def test_a_checkpoint_runs_no_code(converted, tmp_path):
    class Hostile:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "owned",))

    model = from_owl2(OWL2).build()
    index = (converted / ".metadata").read_bytes()
    (converted / ".metadata").write_bytes(pickle.dumps(Hostile()))
    for read in (from_checkpoint, partial(save_load.load_weights, chunks=[model])):
        with pytest.raises(CheckpointError, match="which no index needs"):
            read(converted)
    (converted / ".metadata").write_bytes(index)
    torch.save({"hidden": Hostile()}, converted / "common.pt")
    with pytest.raises(CheckpointError, match="cannot be read"):
        save_load.load_weights(converted, [model])
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("name", ["metadata.json", "common.pt", ".metadata"])
def test_a_damaged_or_missing_companion_is_refused(converted, name):
    model = from_owl2(OWL2).build()
    (converted / name).write_bytes((converted / name).read_bytes()[:-20])
    with pytest.raises(CheckpointError, match="cannot be read|is damaged") as refusal:
        save_load.load_weights(converted, [model])
    assert "\n" not in str(refusal.value)
    (converted / name).unlink()
    with pytest.raises(CheckpointError, match=f"not a complete checkpoint: {name} missing"):
        from_checkpoint(converted)


def altered_index(converted: Path, change) -> None:
    index = read_index(converted)
    change(index)
    (converted / ".metadata").write_bytes(pickle.dumps(index))


def test_an_index_that_covers_half_a_weight_is_refused(converted):
    def halve(index):
        entry = index.state_dict_metadata["output_layer.weight"]
        entry.chunks[0].sizes = torch.Size([256, 64])

    altered_index(converted, halve)
    with pytest.raises(CheckpointError, match="output_layer.weight is not whole: 16,384 of 32,768"):
        from_checkpoint(converted)


def test_an_index_without_the_place_of_a_weight_is_refused(converted):
    def lose(index):
        place = next(p for p in index.storage_data if p.fqn == "final_norm.weight")
        del index.storage_data[place]

    altered_index(converted, lose)
    with pytest.raises(CheckpointError, match="final_norm.weight is not whole: 0 of 64"):
        from_checkpoint(converted)


def test_weights_are_floating_point_numbers(converted):
    def change(index):
        entry = index.state_dict_metadata["final_norm.weight"]
        index.state_dict_metadata["final_norm.weight"] = replace(
            entry, properties=replace(entry.properties, dtype=torch.int8)
        )

    altered_index(converted, change)
    with pytest.raises(CheckpointError, match="final_norm.weight holds torch.int8, no weights"):
        from_checkpoint(converted)


def test_tensors_that_the_index_does_not_place_are_refused(tmp_path):
    save_file({"one": torch.ones(1), "two": torch.ones(2)}, tmp_path / "a.safetensors")
    save_file({"one": torch.zeros(1)}, tmp_path / "b.safetensors")
    index = {"weight_map": {"one": "b.safetensors", "two": "a.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConversionError, match="not in the index: one in a.safetensors"):
        TensorReader(tmp_path)
    index["weight_map"]["one"] = ["a.safetensors"]
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConversionError, match="which is not a file beside it"):
        TensorReader(tmp_path)


def test_two_writers_of_one_output_do_not_meet(tmp_path):
    whole = from_owl2(OWL2)

    def overtaken() -> torch.Tensor:
        if not (tmp_path / "out").exists():
            export_hf(whole.tensors, whole.config.model, tmp_path / "out")
        return whole.tensors["final_norm.weight"].read()

    tensors = whole.tensors | {
        "final_norm.weight": replace(whole.tensors["final_norm.weight"], read=overtaken)
    }
    with pytest.raises(ConversionError, match="out cannot be written"):
        export_hf(tensors, whole.config.model, tmp_path / "out")
    assert TensorReader(tmp_path / "out").names()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_what_a_killed_writer_left_is_removed(tmp_path):
    abandoned = tmp_path / ".out.x1.partial"
    abandoned.mkdir()
    whole = from_owl2(OWL2)
    write_checkpoint(tmp_path / "out", whole.tensors, whole.config)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("tool", ["convert_from_hf", "convert_to_hf"])
def test_an_interrupted_tool_says_so_and_leaves_nothing(tmp_path, converted, tool, number):
    source = {"convert_from_hf": ["--owl2", OWL2], "convert_to_hf": ["--checkpoint", converted]}
    code = f"""
import os, runpy, sys
from megatron_owl2.convert import lazy_tensor, megatron_io, safetensors_io
read_ahead = lazy_tensor.read_ahead
def stopped(tensors):
    for count, pair in enumerate(read_ahead(tensors)):
        if count == 3:
            os.kill(os.getpid(), {int(number)})
        yield pair
megatron_io.read_ahead = safetensors_io.read_ahead = stopped
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    arguments = [TOOLS / f"{tool}.py", *source[tool], "--output", tmp_path / "out"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 130, done.stderr
    assert done.stderr.endswith("interrupted; nothing was written\n")
    assert "Traceback" not in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["ckpt"]


def test_a_checkpoint_of_another_model_is_refused_with_all_differences(converted):
    config = save_load.read_config(converted)
    config.model.decoder.vocab_size = 500
    config.model.vision.num_layers = 1
    save_config(config, converted / "run.yaml")
    with pytest.raises(CheckpointError) as refusal:
        from_checkpoint(converted)
    assert "shape: output_layer.weight is (512, 64) in the checkpoint, (500, 64)" in str(
        refusal.value
    )
    assert "unexpected: vision_model.layers.1.linear_fc1.bias (192,)" in str(refusal.value)


def test_settings_that_no_model_has_are_refused_in_a_checkpoint(converted):
    config = save_load.read_config(converted)
    config.model.vision.patch_size = 0
    save_config(config, converted / "run.yaml")
    for read in (from_checkpoint, Verification):
        with pytest.raises(ConfigError, match="model.vision.patch_size is 0"):
            read(converted)


def test_an_existing_output_is_refused(converted):
    whole = from_checkpoint(converted)
    with pytest.raises(CheckpointError, match="exists already"):
        write_checkpoint(converted, whole.tensors, whole.config)
    with pytest.raises(ConversionError, match="exists already"):
        export_hf(whole.tensors, whole.config.model, converted)


@pytest.mark.parametrize(
    ("tool", "arguments", "message"),
    [
        ("convert_from_hf", ("--output", "x"), "give either --owl2, or both"),
        ("convert_from_hf", ("--output", "x", "--owl2", "a", "--vision-model", "b"), "give either"),
        ("convert_from_hf", ("--output", "x", "--owl2", "nowhere"), "nowhere is not a directory"),
        ("convert_from_hf", ("--output", "/dev/null/x", "--owl2", OWL2), "error: "),
        ("convert_to_hf", ("--output", "x", "--checkpoint", "nowhere"), "nowhere does not exist"),
        ("convert_to_hf", ("--output", "x", "--checkpoint", "a", "--dtype", "int8"), "int8"),
    ],
)
def test_tools_refuse_without_a_traceback(tool, arguments, message, capsys):
    status, _, complaint = run_tool(tool, *arguments, capsys=capsys)
    assert status == 2 and message in complaint and "Traceback" not in complaint
    assert not Path("x").exists()
