"""Settings that no model can have: each refused at once, by file, key, value and what is wanted."""

import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from exported import grouped_model, offline
from hf_dirs import ABSTRACTOR as ABSTRACTOR_SIZES
from hf_dirs import CLIP, LLAMA, OWL2, editable, export, small_tokenizer, tensors_of
from safetensors.torch import save_file
from transformers import AutoProcessor

from megatron_owl2.config.schema import AbstractorConfig, ModelConfig, VisionConfig
from megatron_owl2.config.validate_model import validate_model
from megatron_owl2.convert import hf_config
from megatron_owl2.convert import sources as assemble
from megatron_owl2.convert.sources import from_llama_and_clip, from_released
from megatron_owl2.data.tokenizer import Tokenizer
from megatron_owl2.errors import ConfigError, ConversionError
from megatron_owl2.model.position_tables import NAMES as TABLES

COUNT = "a number, whole and from 1 to 16777216"
LAYERS = "a number, whole and from 1 to 1000"
POSITIVE = "a number, finite and above 0"
SPREAD = "a number, finite and not below 0"
WITH_DEFAULT = ("num_key_value_heads", "rope_theta", "initializer_range")
READ = {OWL2: hf_config.read_model, LLAMA: hf_config.read_llama, CLIP: hf_config.read_clip}
VIT, ABSTRACTOR = "visual_config.visual_model.", "visual_config.visual_abstractor."
BAD_COUNTS = [0, -5, 2**62, 10**400, 1.5, True, "x", [4], {}, None]
BAD_NUMBERS = [-1, -1e-6, math.nan, math.inf, 10**400, True, "x", [1.0], {}, None]


@pytest.fixture(scope="module", autouse=True)
def without_network(tmp_path_factory):
    yield from offline(tmp_path_factory.getbasetemp() / "modules")


def changed(source: Path, destination: Path, key: str, value: object) -> Path:
    """A copy of a directory whose config.json has another value under the dotted key."""
    directory = editable(source, destination)
    file = directory / "config.json"
    tree = json.loads(file.read_text())
    *sections, last = key.split(".")
    inner = tree
    for section in sections:
        inner = inner[section]
    inner[last] = value
    file.write_text(json.dumps(tree))
    return directory


def refusal(directory: Path, source: Path) -> str:
    with pytest.raises(ConversionError) as refused:
        READ[source](directory)
    return str(refused.value)


@pytest.mark.parametrize(
    ("source", "key", "wanted"),
    [
        (OWL2, "vocab_size", COUNT),
        (OWL2, "num_attention_heads", COUNT),
        (OWL2, "num_hidden_layers", LAYERS),
        (OWL2, "max_position_embeddings", COUNT),
        (OWL2, "rms_norm_eps", POSITIVE),
        (OWL2, "rope_theta", POSITIVE),
        (OWL2, "initializer_range", SPREAD),
        (OWL2, VIT + "patch_size", COUNT),
        (OWL2, VIT + "num_hidden_layers", LAYERS),
        (OWL2, VIT + "layer_norm_eps", POSITIVE),
        (OWL2, ABSTRACTOR + "num_attention_heads", COUNT),
        (OWL2, ABSTRACTOR + "num_hidden_layers", LAYERS),
        (OWL2, ABSTRACTOR + "num_learnable_queries", COUNT),
        (LLAMA, "intermediate_size", COUNT),
        (LLAMA, "num_key_value_heads", COUNT),
        (LLAMA, "rope_parameters.rope_theta", POSITIVE),
        (CLIP, "vision_config.hidden_size", COUNT),
        (CLIP, "vision_config.layer_norm_eps", POSITIVE),
    ],
)
def test_numbers_no_model_has(tmp_path, source, key, wanted):
    whole = wanted in (COUNT, LAYERS)
    bad = [*(BAD_COUNTS if whole else BAD_NUMBERS), *([20000] if wanted == LAYERS else [])]
    if wanted == POSITIVE:
        bad.append(0)
    for index, value in enumerate(bad):
        if value is None and key.split(".")[-1] in WITH_DEFAULT:
            continue
        directory = changed(source, tmp_path / str(index), key, value)
        shown = key.replace("rope_parameters.", "")
        said = f"{directory / 'config.json'}: {shown} is {value!r}, wanted {wanted}"
        assert refusal(directory, source) == said


@pytest.mark.parametrize(
    ("source", "key", "value", "message"),
    [
        (OWL2, "visual_config", 3, "visual_config is 3, wanted an object"),
        (OWL2, VIT[:-1], [1], VIT[:-1] + " is [1], wanted an object"),
        (OWL2, ABSTRACTOR[:-1], "x", ABSTRACTOR[:-1] + " is 'x', wanted an object"),
        (OWL2, VIT + "hidden_act", "gelu", VIT + "hidden_act is 'gelu', this model only has"),
        (OWL2, VIT + "image_size", 60, "model.vision.image_size (60) is not divisible"),
        (CLIP, "vision_config.image_size", 7 * 2**20, "position tables of 26388279068184 numbers"),
        (OWL2, VIT + "num_attention_heads", 5, "model.vision.num_heads (5) does not divide"),
        (OWL2, ABSTRACTOR + "grid_size", None, "grid_size is 32, this model only has 4"),
        (OWL2, ABSTRACTOR + "grid_size", 0, "grid_size is 0, this model only has 4"),
        (OWL2, ABSTRACTOR + "grid_size", "x", "grid_size is 'x', this model only has"),
        (OWL2, ABSTRACTOR + "encoder_hidden_size", [48], "encoder_hidden_size is [48], this model"),
        (CLIP, "vision_config", 3, "vision_config is 3, wanted an object"),
        (CLIP, "vision_config.num_attention_heads", 5, "num_heads (5) does not divide"),
        (LLAMA, "rope_parameters", [1], "rope_parameters is [1], wanted an object"),
        (LLAMA, "rope_parameters", 0, "rope_parameters is 0, wanted an object"),
        (LLAMA, "rope_parameters", {"type": "linear", "factor": 2}, "rope_scaling is {'type': 'l"),
        (LLAMA, "rope_parameters.partial_rotary_factor", 0.5, "partial_rotary_factor is 0.5, this"),
        (LLAMA, "partial_rotary_factor", 0.5, "partial_rotary_factor is 0.5, this model only has"),
        (LLAMA, "sliding_window", 4096, "sliding_window is 4096, this model only has None"),
        (LLAMA, "num_key_value_heads", 3, "num_heads (4) is not a multiple of num_kv_heads (3)"),
        (LLAMA, "num_attention_heads", 32, "head size must be even"),
    ],
)
def test_settings_of_another_model(tmp_path, source, key, value, message):
    directory = changed(source, tmp_path / "other", key, value)
    if key == "num_attention_heads":
        directory = changed(directory, tmp_path / "again", "head_dim", None)
    said = refusal(directory, source)
    assert said.startswith(f"{directory / 'config.json'}: ") and message in said


@pytest.mark.parametrize(
    ("source", "key", "value", "ours"),
    [
        (OWL2, "num_hidden_layers", 1000, ("decoder", "num_layers", 1000)),
        (OWL2, "max_position_embeddings", 2**24, ("decoder", "max_positions", 2**24)),
        (OWL2, "num_key_value_heads", None, ("decoder", "num_kv_heads", 4)),
        (OWL2, "rope_theta", 500000, ("decoder", "rope_theta", 500000.0)),
        (OWL2, "rope_theta", None, ("decoder", "rope_theta", 10000.0)),
        (OWL2, "sliding_window", None, ("decoder", "num_layers", 2)),
        (OWL2, "partial_rotary_factor", 1.0, ("decoder", "num_layers", 2)),
        (OWL2, "torch_dtype", ["?"], ("decoder", "num_layers", 2)),  # the tensors say it
    ],
)
def test_settings_at_the_edge_are_read(tmp_path, source, key, value, ours):
    model = READ[source](changed(source, tmp_path / "edge", key, value))
    section, name, wanted = ours
    assert getattr(getattr(model, section), name) == wanted


def test_a_spread_of_zero_is_read(tmp_path):
    assert hf_config.read_model(changed(OWL2, tmp_path / "a", "initializer_range", 0)).init_std == 0


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("vision.patch_size", 0, COUNT),
        ("vision.image_size", -14, COUNT),
        ("vision.num_layers", 20000, LAYERS),
        ("vision.norm_eps", 0.0, POSITIVE),
        ("vision.position_init_std", -0.1, SPREAD),
        ("abstractor.num_heads", 0, COUNT),
        ("abstractor.norm_eps", math.nan, POSITIVE),
        ("decoder.num_kv_heads", 0, COUNT),
        ("decoder.num_layers", -1, LAYERS),
        ("decoder.vocab_size", 2**62, COUNT),
        ("decoder.norm_eps", -1.0, POSITIVE),
        ("decoder.rope_theta", math.inf, POSITIVE),
        ("init_std", math.nan, SPREAD),
        ("image_mean", [0.5, 0.5], "three numbers, finite"),
        ("image_mean", [0.5, math.inf, 0.5], "three numbers, finite"),
        ("image_std", [0.5, 0.0, 0.5], "three numbers, finite and above 0"),
        ("image_std", [0.5, math.nan, 0.5], "three numbers, finite and above 0"),
    ],
)
def test_run_configurations_no_model_has(key, value, wanted):
    model = ModelConfig()
    validate_model(model)
    *sections, name = key.split(".")
    setattr(getattr(model, sections[0]) if sections else model, name, value)
    with pytest.raises(ConfigError) as refused:
        validate_model(model)
    assert str(refused.value) == f"model.{key} is {value!r}; it must be {wanted}"


def test_position_tables_have_a_limit():
    model = ModelConfig(vision=VisionConfig(image_size=14 * 511, hidden_size=1024))
    validate_model(model)
    model.abstractor = AbstractorConfig(num_queries=2**20)
    with pytest.raises(ConfigError, match="position tables of 1341130752 numbers"):
        validate_model(model)


@pytest.mark.parametrize("file", ["preprocessor_config.json", "processor_config.json"])
def test_image_statistics_no_image_has(tmp_path, file):
    for key, value in (
        ("image_std", [0.1, 0, 0.1]),
        ("image_std", [0.1, math.nan, 0.1]),
        ("image_mean", [0.1, math.inf, 0.1]),
        ("image_mean", [0.1, True, 0.1]),
        ("image_mean", [0.1, 0.1]),
        ("image_mean", "x"),
    ):
        tree = {key: value}
        nested = {"image_processor": tree} if file == "processor_config.json" else tree
        (tmp_path / file).write_text(json.dumps(nested))
        with pytest.raises(ConversionError) as refused:
            hf_config.read_image_settings(tmp_path)
        place = "image_processor." if file == "processor_config.json" else ""
        assert f"{file}: {place}{key} is {value!r}, wanted three numbers" in str(refused.value)
    (tmp_path / file).unlink()
    (tmp_path / file).mkdir()
    with pytest.raises(ConversionError, match=f"{file} .*Is a directory"):
        hf_config.read_image_settings(tmp_path)


def test_the_image_statistics_of_a_saved_processor_are_kept(tmp_path):
    model = grouped_model()
    directory = tmp_path / "out"
    export(model, directory, tokenizer=small_tokenizer(tmp_path))
    processor = AutoProcessor.from_pretrained(directory, trust_remote_code=True)
    export(model, tmp_path / "saved")
    (tmp_path / "saved" / "preprocessor_config.json").unlink()
    processor.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / "preprocessor_config.json").exists()
    found = from_released(tmp_path / "saved").config.model
    assert (found.image_mean, found.image_std) == ([0.2, 0.3, 0.4], [0.25, 0.2, 0.3])

    processor.save_pretrained(directory)  # both files are there and say the same
    assert hf_config.read_model(directory) == model.model
    file = directory / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"image_std": [0.3, 0.2, 0.3]}))
    with pytest.raises(ConversionError) as refused:
        hf_config.read_model(directory)
    said = str(refused.value)
    assert f"{file} has image_std [0.3, 0.2, 0.3], but" in said
    assert "processor_config.json image_std [0.25, 0.2, 0.3]; keep what" in said


def test_a_processor_without_an_image_processor_says_nothing(tmp_path):
    file = tmp_path / "processor_config.json"
    file.write_text(json.dumps({"tokens_per_image": 5}))
    clip = ModelConfig()
    statistics = {"image_mean": clip.image_mean, "image_std": clip.image_std}
    assert hf_config.read_image_settings(tmp_path) == statistics | {"image_mode": "stretch"}
    file.write_text(json.dumps({"image_processor": {"image_mean": [0, 0, 0]}}))
    found = hf_config.read_image_settings(tmp_path)
    assert (found["image_mean"], found["image_std"]) == ([0, 0, 0], clip.image_std)
    assert {type(value) for value in found["image_mean"]} == {float}
    file.write_text(json.dumps({"image_processor": "MPLUGOwl2ImageProcessor"}))
    with pytest.raises(ConversionError, match="image_processor is 'MPLUG.*', wanted an object"):
        hf_config.read_image_settings(tmp_path)


def place(kind: str, path: Path) -> None:
    if kind == "directory":
        path.mkdir()
    else:
        target = {"unreadable": "/proc/self/mem", "lost": "nowhere", "circle": path.name}[kind]
        path.symlink_to(target)


@pytest.mark.parametrize("kind", ["directory", "unreadable", "lost", "circle"])
def test_tokenizers_that_are_no_files(tmp_path, kind):
    directory = editable(OWL2, tmp_path / "in")
    place(kind, directory / "tokenizer.model")
    place(kind, tmp_path / "given.model")
    with pytest.raises(ConversionError, match=str(directory / "tokenizer.model")):
        from_released(directory)
    with pytest.raises(ConversionError, match=str(tmp_path / "given.model")):
        from_released(OWL2, tokenizer=tmp_path / "given.model")
    with pytest.raises(OSError, match=str(tmp_path / "given.model")):
        Tokenizer(tmp_path / "given.model")


def test_a_tokenizer_name_that_the_disk_cannot_have():
    with pytest.raises(ConversionError, match="xxx cannot be read"):
        from_released(OWL2, tokenizer="x" * 5000)


def cast(source: Path, destination: Path, dtypes: list[torch.dtype], **config) -> Path:
    """A copy of a directory whose tensors have the dtypes in turn."""
    directory = editable(source, destination, **config)
    tensors = sorted(tensors_of(source).items())
    tensors = {n: t.to(dtypes[i % len(dtypes)]) for i, (n, t) in enumerate(tensors)}
    save_file(tensors, directory / "model.safetensors")
    return directory


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.parametrize(
    ("dtypes", "said", "precision"),
    [
        ([FP32], "bfloat16", "fp32"),
        ([BF16], "float32", "bf16"),
        ([BF16], None, "bf16"),
        ([BF16] * 20 + [FP32], "bfloat16", "fp32"),
        ([BF16, FP16], "bfloat16", "fp32"),
    ],
)
def test_the_precision_follows_from_the_tensors(tmp_path, dtypes, said, precision):
    whole = from_released(cast(OWL2, tmp_path / "in", dtypes, torch_dtype=said))
    assert whole.config.train.precision == precision


@pytest.mark.parametrize(
    ("llama", "clip", "precision"),
    [(BF16, BF16, "bf16"), (BF16, FP32, "fp32"), (FP32, BF16, "fp32")],
)
def test_the_precision_follows_from_both_parts(tmp_path, llama, clip, precision, monkeypatch):
    small = partial(ModelConfig, abstractor=ABSTRACTOR_SIZES)  # its heads divide the CLIP's width
    monkeypatch.setattr(assemble, "ModelConfig", small)
    llama = cast(LLAMA, tmp_path / "llama", [llama], dtype="bfloat16")
    clip = cast(CLIP, tmp_path / "clip", [clip], dtype="bfloat16")
    whole = from_llama_and_clip(llama, clip)
    assert whole.config.train.precision == precision
    made = {n: t.dtype for n, t in whole.tensors.items() if n.startswith("abstractor.")}
    assert {made.pop(name) for name in TABLES} == {FP32}
    random = set(made.values())
    assert random == {BF16 if precision == "bf16" else FP32}
