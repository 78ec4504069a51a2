"""Directories as transformers, peft, git and text editors leave them, read again."""

import codecs
import json
import shutil
from pathlib import Path

import pytest
import torch
from exported import export, grouped_model, load, offline
from hf_dirs import small_tokenizer, tensors_of
from safetensors.torch import save_file
from transformers import AutoProcessor

from megatron_owl2.convert.safetensors_io import TensorReader
from megatron_owl2.convert.sources import from_released
from megatron_owl2.errors import ConversionError
from megatron_owl2.inference.loading import load_model

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 460616\n"


@pytest.fixture(scope="module", autouse=True)
def no_network(tmp_path_factory):
    yield from offline(tmp_path_factory.getbasetemp() / "modules")


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("foreign")
    return export(grouped_model(), folder / "owl 2.0-7b.v1", small_tokenizer(folder))


def test_dots_spaces_and_the_folder_itself_are_names_like_others(exported, monkeypatch):
    monkeypatch.chdir(exported)
    inputs = {"input_ids": torch.tensor([[1, 5, 9]])}
    named, here = load(exported), load(Path("."))
    assert type(here).__name__ == type(named).__name__
    assert torch.equal(here(**inputs).logits, named(**inputs).logits)
    assert load_model(Path(".")).config == from_released(exported).config.model


@pytest.fixture
def directory(exported, tmp_path) -> Path:
    return shutil.copytree(exported, tmp_path / "my owl.v2")


def test_what_transformers_saves_again_is_the_same(exported, tmp_path):
    saved, before = tmp_path / "saved", from_released(exported)
    load(exported).save_pretrained(saved, max_shard_size="100KB")
    AutoProcessor.from_pretrained(exported, trust_remote_code=True).save_pretrained(saved)
    after = from_released(saved)
    assert (saved / "model.safetensors.index.json").exists()
    assert after.config.model == before.config.model
    assert Path(after.config.data.tokenizer) == saved / "tokenizer.model"
    for name, tensor in before.tensors.items():
        assert torch.equal(after.tensors[name].read(), tensor.read()), name
    (saved / "model.safetensors.index.json").unlink()
    wanted = "model-00001-of-.* is a part of them: fetch model.safetensors.index.json and all parts"
    with pytest.raises(ConversionError, match=wanted):
        from_released(saved)


def test_resized_embeddings_are_read(exported, tmp_path):
    model = load(exported)
    model.resize_token_embeddings(323)
    model.save_pretrained(tmp_path / "resized")
    whole = from_released(tmp_path / "resized")
    assert whole.config.model.decoder.vocab_size == 323
    assert torch.equal(
        whole.tensors["embedding.weight"].read()[:323], model.get_input_embeddings().weight
    )


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
@pytest.mark.parametrize(
    "name", ["config.json", "preprocessor_config.json", "processor_config.json"]
)
def test_settings_that_an_editor_saved_are_read(directory, exported, name, encoding):
    (directory / name).write_text((directory / name).read_text(), encoding=encoding)
    assert from_released(directory).config.model == from_released(exported).config.model
    assert load_model(directory).config == from_released(exported).config.model


def test_an_index_with_a_byte_order_mark_is_read(directory):
    index = json.dumps({"weight_map": dict.fromkeys(tensors_of(directory), "all.safetensors")})
    (directory / "model.safetensors").rename(directory / "all.safetensors")
    (directory / "model.safetensors.index.json").write_bytes(codecs.BOM_UTF8 + index.encode())
    assert from_released(directory).build()


def test_weights_without_metadata_and_in_bin_files_are_read(directory, exported):
    tensors = tensors_of(directory)
    save_file(tensors, directory / "model.safetensors")  # without "format"
    assert tensors_of(directory).keys() == tensors.keys() and from_released(directory).build()
    (directory / "model.safetensors").unlink()
    torch.save(tensors, directory / "pytorch_model.bin")
    found, wanted = (
        from_released(path).tensors["final_norm.weight"] for path in (directory, exported)
    )
    assert torch.equal(found.read(), wanted.read())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("consolidated.00.pth", r"consolidated.00.pth is not read: save the model with transfor"),
        ("owl.gguf", "owl.gguf is not read: save the model with transformers"),
        ("diffusion.safetensors", "diffusion.safetensors is not read: save the model"),
        ("pytorch_model-00002-of-00003.bin", "fetch pytorch_model.bin.index.json and all parts"),
        ("adapter_model.safetensors", "is an adapter: merge it into its model with peft"),
        ("notes.txt", r"pytorch_model.bin\[.index.json\]$"),
    ],
)
def test_weights_of_another_kind_are_named_with_the_remedy(directory, name, message):
    (directory / "model.safetensors").rename(directory / name)
    with pytest.raises(ConversionError, match=f"holds no weights; looked for .*{message}"):
        TensorReader(directory)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_pointer_of_git_is_named(directory, name):
    (directory / "model.safetensors").unlink()
    (directory / name).write_text(POINTER)
    with pytest.raises(ConversionError, match=rf"{name} is a Git LFS pointer; .*git lfs pull"):
        from_released(directory)


def test_an_adapter_is_not_left_out(directory):
    (directory / "adapter_config.json").write_text("{}")
    for read in (from_released, load_model):
        with pytest.raises(ConversionError, match="holds an adapter: merge it into its model"):
            read(directory)
    (directory / "config.json").unlink()
    with pytest.raises(ConversionError, match="holds an adapter: merge it into its model"):
        load_model(directory)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "config.json is not valid JSON"),
        ("[]", "config.json must hold an object"),
        ('{"model_type": "llava"}', "model_type is 'llava', wanted 'mplug_owl2'"),
    ],
)
def test_a_damaged_or_foreign_export_is_not_taken_for_a_checkpoint(directory, text, message):
    (directory / "config.json").write_text(text)
    with pytest.raises(ConversionError, match=message):
        load_model(directory)
