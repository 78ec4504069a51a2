"""Directories of mPLUG-Owl (version 1): to checkpoints and back, adapters, trainer checkpoints."""

import dataclasses
import json
import logging
import re
import shutil

import pytest
import torch
from hf_dirs import ABSTRACTOR, CLIP, LLAMA, OWL2
from paths import DATA
from safetensors.torch import load_file, save_file
from tool import run

from megatron_owl2.config.load import load_config
from megatron_owl2.config.schema import ModelConfig, RunConfig
from megatron_owl2.convert.adapters import export_adapter, read_adapter
from megatron_owl2.convert.hf_config import read_clip, read_llama, read_model
from megatron_owl2.convert.hf_weights import export_hf
from megatron_owl2.convert.layouts import layout_of
from megatron_owl2.convert.megatron_io import write_checkpoint
from megatron_owl2.convert.sources import from_checkpoint, from_llama_and_clip, from_released
from megatron_owl2.convert.verify.compare import compare
from megatron_owl2.errors import ConversionError
from megatron_owl2.mcore import setup

OFFICIAL = DATA / "official_v1_tiny"
IMAGE, VIDEO, ADAPTER = (OFFICIAL / n for n in ("hf_ckpt", "hf_ckpt_video", "lora_adapter"))
PREFIX = "base_model.model."


@pytest.fixture(autouse=True)
def leave_the_groups():
    yield
    setup.shutdown()


def tensors_of(directory):
    """All tensors of a directory but what every reader computes itself."""
    found = load_file(directory / "model.safetensors")
    return {name: tensor for name, tensor in found.items() if not name.endswith("inv_freq")}


def assert_bitwise(found, wanted):
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[n].view(torch.uint8), wanted[n].view(torch.uint8)) for n in wanted)


@pytest.mark.parametrize("directory", [IMAGE, VIDEO])
def test_a_released_directory_comes_back_bit_by_bit(directory, tmp_path):
    source = from_released(directory)
    write_checkpoint(tmp_path / "ckpt", source.tensors, source.config)
    again = from_checkpoint(tmp_path / "ckpt")
    export_hf(again.tensors, again.config.model, tmp_path / "out", layout="owl1")
    assert_bitwise(tensors_of(tmp_path / "out"), tensors_of(directory))
    assert read_model(tmp_path / "out") == read_model(directory) == again.config.model


def test_every_setting_comes_from_the_directory():
    model = read_model(VIDEO)
    assert (model.template, model.tokenization) == ("owl1", "official_inference")
    assert model.decoder.modality_split == [] and model.abstractor.positions == "none"
    assert model.vision.temporal and not read_model(IMAGE).vision.temporal
    assert model.abstractor.ffn_size == 256  # of 192: two thirds, up to a multiple of 256
    assert layout_of(model) == "owl1"


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("text_config", {"model_type": "bloom"}, "text_config.model_type is 'bloom'"),
        ("text_config", {"hidden_act": "gelu"}, "text_config.hidden_act is 'gelu'"),
        ("vision_config", {"num_hidden_layers": None}, "missing|unexpected"),  # the class's 24
        ("visual_abstractor_config", {"hidden_size": 32}, "hidden_size is 32"),
        ("visual_abstractor_config", {"attention_probs_dropout_prob": 2}, "from 0 to 1"),
        ("visual_abstractor_config", {"attention_probs_dropout_prob": 1}, "must be below 1"),
    ],
)
def test_another_model_is_refused_with_the_setting(section, values, message, tmp_path):
    shutil.copytree(IMAGE, tmp_path / "in")
    path = tmp_path / "in" / "config.json"
    tree = json.loads(path.read_text())
    tree[section] |= values
    path.write_text(json.dumps(tree))
    with pytest.raises(ConversionError, match=message):
        from_released(tmp_path / "in")


def test_what_a_directory_leaves_out_is_the_released_classes_default(tmp_path):
    shutil.copytree(IMAGE, tmp_path / "in")
    path = tmp_path / "in" / "config.json"
    tree = json.loads(path.read_text())
    del tree["visual_abstractor_config"]["attention_probs_dropout_prob"]
    path.write_text(json.dumps(tree))
    assert read_model(tmp_path / "in").abstractor.attention_dropout == 0.1


def test_a_peft_adapter_comes_in_and_goes_out_bit_by_bit(tmp_path):
    source = from_released(IMAGE, adapter=ADAPTER)
    lora = source.config.stage.lora
    assert (lora.rank, lora.alpha) == (8, 32)
    assert lora.targets == ["*.attention.query", "*.attention.value_text"]
    write_checkpoint(tmp_path / "ckpt", source.tensors, source.config)
    again = from_checkpoint(tmp_path / "ckpt")
    export_adapter(again.tensors, again.config.model, again.config.stage.lora, tmp_path / "out")
    found, wanted = (
        load_file(d / "adapter_model.safetensors") for d in (tmp_path / "out", ADAPTER)
    )
    assert_bitwise(found, wanted)
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert settings["task_type"] is None and settings["lora_alpha"] == 32
    merged = load_file(OFFICIAL / "reference_lora.safetensors")
    export_hf(again.merged().tensors, again.config.model, tmp_path / "merged", layout="owl1")
    for name, tensor in tensors_of(tmp_path / "merged").items():
        if (key := f"merged_weight/{name}") in merged:
            torch.testing.assert_close(tensor, merged[key], atol=1e-6, rtol=0)


def trainer_checkpoint(folder, change=lambda tensors: None):
    """A LoRA checkpoint as the released trainer leaves it."""
    tensors = {PREFIX + n: t for n, t in load_file(IMAGE / "model.safetensors").items()}
    for name, tensor in load_file(ADAPTER / "adapter_model.safetensors").items():
        tensors[name.removesuffix(".weight") + ".default.weight"] = tensor
    change(tensors)
    folder.mkdir()
    torch.save(tensors, folder / "pytorch_model.bin")
    return folder


def test_a_trainer_checkpoint_gives_its_adapters_and_says_so(tmp_path, caplog):
    checkpoint = trainer_checkpoint(tmp_path / "checkpoint-20")
    with caplog.at_level(logging.WARNING):
        source = from_released(IMAGE, adapter=checkpoint, adapter_alpha=32)
    assert "transformers loads as a random model" in caplog.text and "8 adapter" in caplog.text
    wanted = from_released(IMAGE, adapter=ADAPTER)
    assert source.config.stage.lora == wanted.config.stage.lora
    assert source.tensors.keys() == wanted.tensors.keys()
    for name, tensor in wanted.tensors.items():
        assert torch.equal(source.tensors[name].read(), tensor.read())


def rename(old, new):
    def change(tensors):
        for name in [name for name in tensors if old in name]:
            tensors[name.replace(old, new)] = tensors.pop(name)

    return change


def only_adapters(tensors):
    for name in [name for name in tensors if ".lora_" not in name]:
        del tensors[name]


@pytest.mark.parametrize(
    "change",
    [
        rename(".default.", ".tuned."),
        rename(".default.", "."),
        rename("q_proj.weight", "q_proj.base_layer.weight"),
        only_adapters,
    ],
)
def test_later_trainers_checkpoints_are_read_too(change, tmp_path):
    checkpoint = trainer_checkpoint(tmp_path / "checkpoint-20", change)
    source = from_released(IMAGE, adapter=checkpoint, adapter_alpha=32)
    wanted = from_released(IMAGE, adapter=ADAPTER)
    assert source.config.stage.lora == wanted.config.stage.lora
    assert all(
        torch.equal(source.tensors[name].read(), tensor.read())
        for name, tensor in wanted.tensors.items()
    )


def test_an_adapter_file_without_settings_needs_its_alpha_alone(tmp_path):
    (tmp_path / "in").mkdir()
    shutil.copy(ADAPTER / "adapter_model.bin", tmp_path / "in")
    source = from_released(IMAGE, adapter=tmp_path / "in", adapter_alpha=32)
    assert source.config.stage.lora == from_released(IMAGE, adapter=ADAPTER).config.stage.lora
    with pytest.raises(ConversionError, match="without adapter_config.json.*--adapter-alpha ALPHA"):
        read_adapter(tmp_path / "in", source.config.model)
    with pytest.raises(ConversionError, match="tells its alpha in adapter_config.json; leave out"):
        from_released(IMAGE, adapter=ADAPTER, adapter_alpha=7)


def damage(tensors):
    tensors[PREFIX + "query_tokens"][0, 0, 0] += 1


def drop(tensors):
    for name in [name for name in tensors if ".lora_" in name]:
        del tensors[name]


def second(tensors):
    for name in [name for name in tensors if ".lora_" in name]:
        tensors[name.replace(".default.", ".other.")] = tensors[name]


@pytest.mark.parametrize(
    ("change", "alpha", "message"),
    [
        (lambda tensors: None, None, "tells their alpha .the released training script .* has 32"),
        (damage, 32.0, "was not trained from .*1 of its frozen weights differ.*query_tokens"),
        (lambda t: t.pop(PREFIX + "query_tokens"), 32.0, "1 are missing, such as query_tokens"),
        (drop, 32.0, "LoRA matrices of one adapter; it has no names with .lora_A"),
        (second, 32.0, "of one adapter; it has those of default, other"),
    ],
)
def test_a_trainer_checkpoint_that_tells_too_little_is_refused(change, alpha, message, tmp_path):
    checkpoint = trainer_checkpoint(tmp_path / "checkpoint-20", change)
    with pytest.raises(ConversionError, match=message):
        from_released(IMAGE, adapter=checkpoint, adapter_alpha=alpha)


def test_a_trainer_checkpoint_is_no_model(tmp_path):
    checkpoint = trainer_checkpoint(tmp_path / "checkpoint-20")
    for config in (False, True):  # as it is, and with the settings that users add to it
        if config:
            shutil.copy(IMAGE / "config.json", checkpoint)
        with pytest.raises(
            ConversionError, match="whole PeftModel.*random.*--owl1 MODEL --adapter"
        ):
            from_released(checkpoint)


def test_a_start_from_llama_and_clip(tmp_path):
    config = RunConfig(model=ModelConfig(vision=read_clip(CLIP), decoder=read_llama(LLAMA)))
    config.model.abstractor = dataclasses.replace(ABSTRACTOR, positions="none")
    config.model.decoder.modality_split = []
    config.model.template = "owl1"
    source = from_llama_and_clip(LLAMA, CLIP, config=config)
    assert not [name for name in source.tensors if "positions" in name or "vision" in name[8:]]
    export_hf(source.tensors, source.config.model, tmp_path / "out", layout="llama")
    assert_bitwise(tensors_of(tmp_path / "out"), tensors_of(LLAMA))
    # This LLaMA shares keys among heads, which the released classes of version 1 cannot.
    with pytest.raises(ConversionError, match="model.decoder.num_kv_heads is less"):
        export_hf(source.tensors, source.config.model, tmp_path / "owl1", layout="owl1")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--owl2", IMAGE), "model_type is 'mplug-owl', wanted 'mplug_owl2'.*--owl1 reads it"),
        (("--owl1", OWL2), "model_type is 'mplug_owl2', wanted 'mplug-owl'.*--owl2 reads it"),
        (("--owl1", IMAGE, "--owl2", OWL2), "give --owl2 or --owl1"),
        (("--owl1", IMAGE, "--adapter-alpha", "32"), "--adapter-alpha goes with --adapter"),
    ],
)
def test_directories_of_the_other_version_are_refused(arguments, message, tmp_path):
    done = run("convert_from_hf", *arguments, "--output", tmp_path / "ckpt")
    assert done.returncode in (1, 2)
    assert re.search(message, done.stderr.replace("\n", " "))
    assert not (tmp_path / "ckpt").exists()


@pytest.mark.parametrize(
    ("directory", "layout", "reason"),
    [
        (IMAGE, "owl2", "its abstractor has position tables.*its layout is owl1"),
        (OWL2, "owl1", "one branch for both modalities.*its layout is owl2"),
    ],
)
def test_checkpoints_of_the_other_version_are_refused(directory, layout, reason, tmp_path):
    source = from_released(directory)
    with pytest.raises(ConversionError, match=reason):
        export_hf(source.tensors, source.config.model, tmp_path / "out", layout=layout)
    assert not (tmp_path / "out").exists()


def test_a_model_between_the_versions_has_no_layout():
    model = from_released(OWL2).config.model
    model.abstractor.positions = "none"
    with pytest.raises(ConversionError, match="no layout .* owl2: .*; owl1: "):
        layout_of(model)


def test_a_configuration_of_the_other_version_is_refused_with_its_keys():
    config = RunConfig(model=from_released(IMAGE).config.model)
    config.model.abstractor.positions = "sincos"
    config.model.decoder.modality_split = ["key_value"]
    with pytest.raises(ConversionError, match="(?s)abstractor.positions.*decoder.modality_split"):
        from_released(IMAGE, config=config)


def test_dropout_is_no_part_of_a_proof(tmp_path):
    source = from_released(IMAGE)
    source.config.model.abstractor.attention_dropout = 0.5
    write_checkpoint(tmp_path / "ckpt", source.tensors, source.config)
    export_hf(source.tensors, source.config.model, tmp_path / "out", layout="owl1")
    assert read_model(tmp_path / "out").abstractor.attention_dropout == 0.5
    setup.shutdown()
    results = list(compare(tmp_path / "ckpt", tmp_path / "out"))
    assert len(results) == 12 and all(result.passed for result in results)


def test_a_checkpoint_is_proved_against_the_released_video_variant(tmp_path):
    source = from_released(VIDEO)
    source.config.model.tokenization = "turns"  # a run may choose its own
    write_checkpoint(tmp_path / "ckpt", source.tensors, source.config)
    setup.shutdown()
    results = list(compare(tmp_path / "ckpt", VIDEO))
    assert all(result.passed for result in results)
    assert [result.check for result in results][-1] == "video, visual tokens"


def test_a_weight_of_the_video_variant_that_is_missing_is_named(tmp_path):
    shutil.copytree(VIDEO, tmp_path / "in")
    tensors = load_file(VIDEO / "model.safetensors")
    del tensors["temporal_query_tokens"]
    save_file(tensors, tmp_path / "in" / "model.safetensors")
    with pytest.raises(ConversionError, match="(?s)missing: temporal_query_tokens$"):
        from_released(tmp_path / "in")


def test_the_recipe_is_the_released_model():
    config = load_config(DATA.parents[1] / "examples" / "owl1_7b" / "finetune.yaml")
    from megatron_owl2.config.lora import selected
    from megatron_owl2.convert.mapping import rules
    from megatron_owl2.convert.sources import weight_shapes

    assert len(selected(config.stage.lora, config.model.decoder)) == 64
    shapes = weight_shapes(config)
    adapters = sum(torch.Size(s).numel() for n, s in shapes.items() if ".lora_" in n)
    assert adapters == 4_194_304
    plain = {n: s for n, s in shapes.items() if ".lora_" not in n}
    assert sum(torch.Size(shape).numel() for shape in plain.values()) == 7_123_068_928
    table = rules("owl1", config.model)
    assert {rule.ours for rule in table} == plain.keys()
    assert len({name for rule in table for name in rule.theirs}) == 722
    config.model.vision.temporal = True
    assert sum(torch.Size(s).numel() for s in weight_shapes(config).values()) == (
        7_152_633_856 + adapters
    )
