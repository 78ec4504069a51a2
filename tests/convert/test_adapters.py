"""Adapters on their way out and in: merged, as a directory of peft, and back."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from exported import load, offline
from hf_dirs import OWL2, assert_same, run_tool, small_tokenizer, tensors_of
from safetensors.torch import load_file, save_file

import megatron_owl2
from megatron_owl2.config.lora import is_adapter, selected
from megatron_owl2.config.schema import LoraConfig
from megatron_owl2.convert.adapters import export_adapter, read_adapter
from megatron_owl2.convert.hf_weights import export_hf
from megatron_owl2.convert.lazy_tensor import LazyTensor, of_model
from megatron_owl2.convert.megatron_io import write_checkpoint
from megatron_owl2.convert.sources import SourceModel, from_checkpoint, from_released, weight_shapes
from megatron_owl2.convert.verify.verify import Verification
from megatron_owl2.errors import ConfigError, ConversionError
from megatron_owl2.inference.engine import Generator
from megatron_owl2.inference.loading import load_model
from megatron_owl2.mcore import setup
from megatron_owl2.model.position_tables import NAMES as TABLES

EVERY = LoraConfig(["*"], rank=3, alpha=12.0)
SOME = LoraConfig(["*.query", "*.value_*", "*.1.mlp.down"], rank=2, alpha=8.0, dropout=0.05)
ADAPTER = "adapter_model.safetensors"


@pytest.fixture(scope="module", autouse=True)
def without_network(tmp_path_factory):
    yield from offline(tmp_path_factory.getbasetemp() / "modules")


def adapted(lora: LoraConfig) -> SourceModel:
    """The tiny released model with random adapters."""
    whole = from_released(OWL2)
    whole.config.stage.lora = lora
    torch.manual_seed(5)
    shapes = {n: s for n, s in weight_shapes(whole.config).items() if is_adapter(n)}
    made = {name: torch.randn(shape) * 0.2 for name, shape in shapes.items()}
    lazy = {name: torch.nn.Parameter(tensor) for name, tensor in made.items()}
    tensors = of_model(torch.nn.ParameterDict({n.replace(".", "/"): p for n, p in lazy.items()}))
    found = {name.replace("/", "."): tensor for name, tensor in tensors.items()}
    return SourceModel(whole.config, whole.tensors | found)


def inputs() -> dict[str, torch.Tensor]:
    """Two rows: an image among text, and text."""
    torch.manual_seed(6)
    config = from_released(OWL2).config.model
    modality = torch.zeros(2, 20, dtype=torch.int64)
    modality[0, 3 : 3 + config.tokens_per_image] = 1
    size = config.vision.image_size
    return {
        "input_ids": torch.randint(3, config.decoder.vocab_size, (2, 20)),
        "modality": modality,
        "pixel_values": torch.randn(1, 3, size, size),
    }


def our_logits(source: SourceModel) -> torch.Tensor:
    given, model = inputs(), source.build().eval()
    rows = given["modality"].t().flatten().nonzero().flatten()
    positions = torch.arange(20).expand(2, -1)
    with torch.no_grad():
        logits = model(
            given["input_ids"], given["pixel_values"], rows, given["modality"], positions
        )
    setup.shutdown()
    return logits


def their_logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs()).logits


def assert_close(ours: torch.Tensor, expected: torch.Tensor) -> None:
    scale = expected.abs().max()
    assert (ours - expected).abs().max() <= 1e-5 * scale


@pytest.mark.parametrize("lora", [EVERY, SOME], ids=["every", "some"])
def test_a_merged_export_and_peft_compute_what_the_adapted_model_does(tmp_path, lora):
    peft = pytest.importorskip("peft")
    source = adapted(lora)
    expected, plain = our_logits(source), from_released(OWL2)
    assert (expected - our_logits(plain)).abs().max() > 0.1
    model = source.config.model
    export_hf(source.merged().tensors, model, tmp_path / "merged")
    assert_close(their_logits(load(tmp_path / "merged")), expected)
    assert_close(our_logits(source.merged()), expected)
    export_hf(plain.tensors, model, tmp_path / "base")
    export_adapter(source.tensors, model, lora, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "adapter")
    assert_close(their_logits(theirs), expected)
    assert len(theirs.targeted_module_names) == len(selected(lora, model.decoder))
    again = from_released(tmp_path / "base", adapter=tmp_path / "adapter")
    stored = again.config.stage.lora
    assert selected(stored, model.decoder) == selected(lora, model.decoder)
    assert replace(stored, targets=lora.targets) == lora
    assert again.tensors.keys() == source.tensors.keys()
    assert torch.equal(our_logits(again), expected)


def test_adapters_answer_as_the_merged_model_does(tmp_path):
    """In a checkpoint, or beside an export or a checkpoint of the model without them."""
    source, plain = adapted(EVERY), from_released(OWL2)
    model, tokenizer = source.config.model, small_tokenizer(tmp_path)
    for one in (source, plain):
        one.config.data.tokenizer = str(tokenizer)
    export_hf(source.merged().tensors, model, tmp_path / "merged", tokenizer=tokenizer)
    export_hf(plain.tensors, model, tmp_path / "base", tokenizer=tokenizer)
    write_checkpoint(tmp_path / "adapted", source.tensors, source.config)
    write_checkpoint(tmp_path / "plain", plain.tensors, plain.config)
    export_adapter(source.tensors, model, EVERY, tmp_path / "adapter")
    pixels = torch.rand(3, *[model.vision.image_size] * 2)
    case = [[1, 5, -200, 9], [1, 40, 41]], [[pixels], []], 8, 8
    answers = {}
    for name, adapter in (
        ("merged", None),
        ("adapted", None),
        ("base", tmp_path / "adapter"),
        ("plain", tmp_path / "adapter"),
        ("unadapted", None),
    ):
        path = tmp_path / (name if name != "unadapted" else "plain")
        answers[name] = Generator(load_model(path, adapter=adapter)).generate_ids(*case)
        setup.shutdown()
    without = answers.pop("unadapted")
    assert all(ids == answers["merged"] for ids in answers.values())
    assert without != answers["merged"]


def test_adapters_of_a_narrow_model_are_merged_as_wide_as_asked(tmp_path, capsys):
    """Small ones would mostly vanish in the model's own 16 bits."""
    source, tokenizer = adapted(EVERY), small_tokenizer(tmp_path)
    source.config.data.tokenizer, model = str(tokenizer), source.config.model

    def of(dtype):
        return {
            name: tensor
            if is_adapter(name) or name in TABLES
            else LazyTensor.of(tensor.read().bfloat16().to(dtype))
            for name, tensor in source.tensors.items()
        }

    narrow, wide = of(torch.bfloat16), of(torch.float32)
    write_checkpoint(tmp_path / "ckpt", narrow, source.config)
    export_hf(SourceModel(source.config, wide).merged().tensors, model, tmp_path / "wide")
    command = ["convert_to_hf", "--checkpoint", tmp_path / "ckpt", "--output"]
    for output, more in (("own", []), ("asked", ["--dtype", "float32"])):
        assert run_tool(*command, tmp_path / output, *more, capsys=capsys)[0] == 0
    weight = "model.layers.0.mlp.up_proj.weight"
    assert tensors_of(tmp_path / "own")[weight].dtype == torch.bfloat16
    assert_same(tensors_of(tmp_path / "asked"), expected := tensors_of(tmp_path / "wide"))
    assert not torch.equal(expected[weight], expected[weight].bfloat16().float())

    plain = {name: tensor for name, tensor in narrow.items() if not is_adapter(name)}
    export_hf(plain, model, tmp_path / "base", tokenizer=tokenizer)
    export_adapter(narrow, model, EVERY, tmp_path / "adapter")
    own = load_model(tmp_path / "ckpt").model
    beside = load_model(tmp_path / "base", adapter=tmp_path / "adapter").model
    shutil.copy(tokenizer, tmp_path / "wide" / "tokenizer.model")
    for name, wanted in load_model(tmp_path / "wide").model.named_parameters():
        assert torch.equal(own.get_parameter(name), wanted), name
        assert torch.equal(beside.get_parameter(name), wanted), name
    setup.shutdown()


def test_an_adapter_of_peft_comes_in(tmp_path):
    peft = pytest.importorskip("peft")
    whole = from_released(OWL2)
    export_hf(whole.tensors, whole.config.model, tmp_path / "base")
    torch.manual_seed(7)
    wanted = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=r"model\.layers\.\d+\.(mlp\.up_proj|self_attn\.k_proj\.multiway\.1)",
        init_lora_weights=False,  # random, B as well
    )
    theirs = peft.get_peft_model(load(tmp_path / "base"), wanted).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    source = from_released(tmp_path / "base", adapter=tmp_path / "adapter")
    assert source.config.stage.lora == LoraConfig(["*.attention.key_vision", "*.mlp.up"], 4, 6.0)
    assert_close(our_logits(source), their_logits(theirs))


def test_the_commands_keep_apart_merge_and_bring_back(tmp_path, capsys):
    source = adapted(SOME)
    tokenizer = small_tokenizer(tmp_path)
    source.config.data.tokenizer = str(tokenizer)
    checkpoint = tmp_path / "ckpt"
    write_checkpoint(checkpoint, source.tensors, source.config)
    code, _, _ = run_tool(
        "convert_to_hf",
        *("--checkpoint", checkpoint, "--output", tmp_path / "adapter", "--adapter"),
        capsys=capsys,
    )
    assert code == 0
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        ADAPTER,
    ]
    command = ["convert_from_hf", "--owl2", OWL2, "--adapter", tmp_path / "adapter"]
    command += ["--tokenizer", tokenizer, "--output", tmp_path / "again"]
    code, out, _ = run_tool(*command, capsys=capsys)
    assert code == 0 and "rank=2 alpha=8 dropout=0.05" in out
    for path in (checkpoint, tmp_path / "again"):
        found = from_checkpoint(path)
        assert_same(
            {name: tensor.read() for name, tensor in found.tensors.items()},
            {name: tensor.read() for name, tensor in source.tensors.items()},
        )
    run_tool(
        *("convert_to_hf", "--checkpoint", tmp_path / "again", "--output", tmp_path / "merged"),
        capsys=capsys,
    )
    export_hf(source.merged().tensors, source.config.model, tmp_path / "expected")
    assert_same(tensors_of(tmp_path / "merged"), tensors_of(tmp_path / "expected"))
    answers = [
        megatron_owl2.load(tmp_path / name).generate("bad", max_new_tokens=8)
        for name in ("again", "merged")
    ]
    assert answers[0] == answers[1]
    setup.shutdown()
    with pytest.raises(ConfigError, match="verify their merge"):
        Verification(checkpoint)


def test_adapters_of_shared_keys_are_written_for_both_modalities(tmp_path):
    source = adapted(EVERY)
    model = source.config.model
    model.decoder.modality_split = ["input_norm", "mlp_norm"]
    export_adapter(source.tensors, model, EVERY, tmp_path / "adapter")
    written = load_file(tmp_path / "adapter" / ADAPTER)
    name = "base_model.model.model.layers.0.self_attn.k_proj.multiway.{}.lora_A.weight"
    assert torch.equal(written[name.format(0)], written[name.format(1)])
    lora, found = read_adapter(tmp_path / "adapter", model)
    assert selected(lora, model.decoder) == selected(EVERY, model.decoder)
    assert not any("vision" in target for target in found)
    written[name.format(1)] = written[name.format(1)] + 1
    save_file(written, tmp_path / "adapter" / ADAPTER)
    with pytest.raises(ConversionError, match="different: .*multiway.1.lora_A"):
        read_adapter(tmp_path / "adapter", model)


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [(float("nan"), None, "is not finite"), (1e6, torch.float16, "is too large for torch.float16")],
)
def test_an_adapter_that_is_not_finite_is_not_written(tmp_path, value, dtype, message):
    source = adapted(SOME)
    name = next(name for name in source.tensors if is_adapter(name))
    damaged = source.tensors[name].read().clone()
    damaged[0, 1] = value
    tensors = source.tensors | {name: LazyTensor.of(damaged)}
    with pytest.raises(ConversionError, match=f"base_model.*lora_.* holds a value that {message}"):
        export_adapter(tensors, source.config.model, SOME, tmp_path / "out", dtype=dtype)
    assert list(tmp_path.iterdir()) == []


def edit_settings(folder, **changed):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


def edit_tensors(folder, change):
    tensors = load_file(folder / ADAPTER)
    change(tensors)
    save_file(tensors, folder / ADAPTER)


def lose_one(tensors):
    del tensors[sorted(tensors)[0]]


def add_one(tensors):
    tensors["base_model.model.model.vision_model.x.lora_A.weight"] = torch.ones(2, 2)


def whole_numbers(tensors):
    tensors.update({name: tensor.int() for name, tensor in tensors.items()})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: edit_settings(f, use_dora=True), "use_dora is True"),
        (lambda f: edit_settings(f, rank_pattern={"q_proj": 4}), "rank_pattern is"),
        (lambda f: edit_settings(f, init_lora_weights="pissa"), "changes the weights of the model"),
        (lambda f: edit_settings(f, peft_type="IA3"), "peft_type is 'IA3'"),
        (lambda f: edit_settings(f, alora_invocation_tokens=[5]), "alora_invocation_tokens is"),
        (lambda f: edit_settings(f, layer_replication=[[0, 1]]), "layer_replication is"),
        (lambda f: edit_settings(f, lora_bias=True), "lora_bias is True"),
        (lambda f: edit_settings(f, of_tomorrow={"a": 1}), "of_tomorrow is"),
        (lambda f: edit_settings(f, r="two"), "r is 'two', wanted"),
        (lambda f: edit_settings(f, r=3), r"lora_A.weight is \(2, 64\), wanted \(3, 64\)"),
        (lambda f: edit_tensors(f, lose_one), "missing: base_model"),
        (lambda f: edit_tensors(f, add_one), "unexpected: base_model.model.model.vision_model.x"),
        (lambda f: edit_tensors(f, whole_numbers), "holds I32, wanted floating-point numbers"),
        (lambda f: edit_tensors(f, dict.clear), "holds no tensors"),
        (lambda f: (f / ADAPTER).unlink(), "holds no weights; looked for adapter_model"),
        (lambda f: (f / "adapter_config.json").unlink(), "without adapter_config.json"),
    ],
)
def test_a_foreign_or_damaged_adapter_is_refused(tmp_path, small_adapter, damage, message):
    folder = tmp_path / "adapter"
    shutil.copytree(small_adapter, folder)
    damage(folder)
    with pytest.raises(ConversionError, match=message):
        read_adapter(folder, from_released(OWL2).config.model)


@pytest.fixture(scope="module")
def small_adapter(tmp_path_factory):
    source = adapted(SOME)
    folder = tmp_path_factory.mktemp("small") / "adapter"
    export_adapter(source.tensors, source.config.model, SOME, folder)
    return folder


def test_a_model_without_adapters_has_none_to_write(tmp_path):
    whole = from_released(OWL2)
    with pytest.raises(ConversionError, match="has no adapters"):
        export_adapter(whole.tensors, whole.config.model, LoraConfig(), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert whole.merged().tensors.keys() == whole.tensors.keys()
