"""Checkpoints that conversion refuses: damaged, hostile, or of another model."""

import json
import pickle
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from hf_dirs import OWL2
from safetensors.torch import save_file

from megatron_owl2.config.load import save_config
from megatron_owl2.convert.safetensors_io import TensorReader
from megatron_owl2.convert.sources import from_checkpoint, from_released
from megatron_owl2.convert.verify.verify import Verification
from megatron_owl2.errors import CheckpointError, ConfigError, ConversionError
from megatron_owl2.training.checkpoint import directories, save_load
from megatron_owl2.training.checkpoint.index import read_index


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
    model = from_released(OWL2).build()
    with pytest.raises(CheckpointError, match="cannot be read"):
        save_load.load_weights(converted, [model])
    largest.unlink()
    with pytest.raises(CheckpointError, match=f"{largest.name} is missing"):
        from_checkpoint(converted)


def test_a_checkpoint_runs_no_code(converted, tmp_path):
    class Hostile:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "owned",))

    model = from_released(OWL2).build()
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
    model = from_released(OWL2).build()
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


def test_a_checkpoint_of_another_model_is_refused_with_all_differences(converted):
    config = directories.read_config(converted)
    config.model.decoder.vocab_size = 500
    config.model.vision.num_layers = 1
    save_config(config, converted / "run.yaml")
    with pytest.raises(CheckpointError) as refusal:
        from_checkpoint(converted)
    message = str(refusal.value)
    assert "shape: output_layer.weight is (512, 64) in the checkpoint, (504, 64)" in message
    assert "up to a multiple of model.decoder.vocab_multiple, which is 1 for a" in message
    assert "unexpected: vision_model.layers.1.linear_fc1.bias (192,)" in message


def test_settings_that_no_model_has_are_refused_in_a_checkpoint(converted):
    config = directories.read_config(converted)
    config.model.vision.patch_size = 0
    save_config(config, converted / "run.yaml")
    for read in (from_checkpoint, Verification):
        with pytest.raises(ConfigError, match="model.vision.patch_size is 0"):
            read(converted)
