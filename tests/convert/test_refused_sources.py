"""Hugging Face directories that conversion refuses, every problem named."""

import json
from pathlib import Path

import pytest
import torch
from hf_dirs import CLIP, DATA, LLAMA, OWL2, editable, parts_config, run_tool, small_tokenizer
from safetensors.torch import load_file, save_file

from megatron_owl2.config.load import save_config
from megatron_owl2.convert import hf_config
from megatron_owl2.convert.safetensors_io import TensorReader
from megatron_owl2.convert.sources import from_llama_and_clip, from_released
from megatron_owl2.errors import ConversionError


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
        from_released(broken)
    for line in (
        "missing: model.norm.weight",
        "unexpected: model.extra.bias",
        "shape: lm_head.weight is (500, 64), wanted (512, 64)",
        f"dtype: {count} holds I64, wanted floating-point numbers",
    ):
        assert line in str(refusal.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("released", [True, False])
def test_weights_that_are_not_finite_are_refused(tmp_path, capsys, released, value):
    broken = editable(OWL2 if released else LLAMA, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][3] = value
    save_file(tensors, broken / "model.safetensors")
    source = ["--owl2", broken]
    if not released:
        save_config(parts_config(), tmp_path / "run.yaml")
        source = ["--language-model", broken, "--vision-model", CLIP]
        source += ["--config", tmp_path / "run.yaml"]
    arguments = (*source, "--output", tmp_path / "out")
    status, _, complaint = run_tool("convert_from_hf", *arguments, capsys=capsys)
    assert status == 2 and not (tmp_path / "out").exists()
    assert "out could not be written: final_norm.weight holds a value that is not" in complaint


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
    read = {LLAMA: hf_config.read_llama, CLIP: hf_config.read_clip, OWL2: hf_config.read_model}
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


@pytest.mark.parametrize(
    ("tool", "arguments", "message"),
    [
        ("convert_from_hf", ("--output", "x"), "give --owl2 or --owl1, or both"),
        (
            "convert_from_hf",
            ("--output", "x", "--owl2", "a", "--vision-model", "b"),
            "give --owl2 or --owl1",
        ),
        (
            "convert_from_hf",
            ("--output", "x", "--owl2", OWL2, "model.vision.image_size=112"),
            "section.key=value needs --config",
        ),
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
