"""Hugging Face directories to our model and back: values, names and settings."""

import json
import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import RLock

import pytest
import torch
import transformers
from hf_dirs import (
    CLIP,
    DATA,
    LLAMA,
    OWL2,
    editable,
    export,
    parts_config,
    run_tool,
    small_tokenizer,
    tensors_of,
)
from paths import HELPERS
from processes import run_ranks
from safetensors.torch import load_file, save_file

from megatron_owl2.config.load import save_config
from megatron_owl2.convert import hf_config
from megatron_owl2.convert.hf_weights import export_hf
from megatron_owl2.convert.lazy_tensor import LazyTensor
from megatron_owl2.convert.mapping import Interleave, LeadingOnes, constants, rules
from megatron_owl2.convert.megatron_io import write_checkpoint
from megatron_owl2.convert.sources import from_checkpoint, from_llama_and_clip, from_owl2
from megatron_owl2.errors import ConversionError
from megatron_owl2.model.layer_stack import weights
from megatron_owl2.model.modality import Modality
from megatron_owl2.model.position_tables import NAMES as TABLES
from megatron_owl2.training.checkpoint import save_load


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]):
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def is_table(name: str) -> bool:
    return name.endswith(("q_pos_embed", "k_pos_embed"))


def text_logits(model, ids, modality):
    rows, positions = modality.nonzero(as_tuple=True)
    split = Modality.of(modality, positions * len(ids) + rows, model.context)
    position_ids = torch.arange(ids.shape[1]).expand_as(ids)
    with torch.no_grad():
        x = model.decoder(model.embedding(ids).transpose(0, 1), split, position_ids)
        return model.output_layer(model.final_norm(x)).transpose(0, 1)


@pytest.mark.parametrize(
    ("transform", "shapes"),
    [
        (Interleave(2, (3, 1, 1)), [(12, 5), (4, 5), (4, 5)]),
        (Interleave(1, (1, 1)), [(6, 2), (6, 2)]),
        (Interleave(3, (1, 1, 1)), [(6,), (6,), (6,)]),
        (LeadingOnes(2), [(7,)]),
    ],
)
def test_split_undoes_join(transform, shapes):
    parts = [torch.randn(shape) for shape in shapes]
    for part, again in zip(parts, transform.split(transform.join(parts)), strict=True):
        assert torch.equal(part, again)


def test_query_rows_stand_before_the_key_and_value_they_share():
    query, key, value = torch.arange(8), torch.arange(10, 14), torch.arange(20, 24)
    joined = Interleave(2, (2, 1, 1)).join([query, key, value])  # 4 heads of 2, 2 groups
    assert joined.tolist() == [0, 1, 2, 3, 10, 11, 20, 21, 4, 5, 6, 7, 12, 13, 22, 23]


def test_every_parameter_and_every_tensor_has_one_rule():
    model = from_owl2(OWL2).build()
    table = rules("owl2", model.model)
    assert sorted(rule.ours for rule in table) == sorted(weights(model))
    tables = {rule.ours for rule in table if rule.constant}
    assert weights(model).keys() - tables == {name for name, _ in model.named_parameters()}
    theirs = [name for rule in table for name in rule.theirs]
    stored = {n for n in tensors_of(OWL2) if not n.endswith("inv_freq")}
    assert sorted(theirs) == sorted(stored)


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
    whole = from_owl2(released(tmp_path / "in", dtype, files))
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
    whole = from_owl2(OWL2)
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


def test_the_parallel_layout_of_a_checkpoint_leaves_no_trace(tmp_path):
    whole = from_owl2(OWL2)
    write_checkpoint(tmp_path / "one", whole.tensors, whole.config)
    script, layout = HELPERS / "resave.py", ["2", "2"]
    done = run_ranks(4, script, tmp_path / "one", tmp_path / "four", *layout)
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
    whole = from_owl2(OWL2)
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
    whole = from_owl2(OWL2)
    whole.config.model.image_mean = [0.1, 0.2, 0.3]
    export_hf(whole.tensors, whole.config.model, tmp_path / "out")
    assert hf_config.read_owl2(tmp_path / "out") == whole.config.model
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


def test_the_image_statistics_of_a_clip_are_kept(tmp_path):
    clip = editable(CLIP, tmp_path / "clip")
    statistics = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (clip / "preprocessor_config.json").write_text(json.dumps(statistics))
    assert hf_config.read_image_statistics(clip) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    (clip / "preprocessor_config.json").write_text(json.dumps({"image_mean": 0.5}))
    with pytest.raises(ConversionError, match="image_mean is 0.5, wanted three numbers"):
        hf_config.read_image_statistics(clip)


@pytest.mark.parametrize("bare", [False, True])  # transformers 5 saves a CLIPVisionModel bare
def test_parts_compute_what_transformers_computes(tmp_path, bare):
    clip = CLIP
    if bare:
        tree = json.loads((CLIP / "config.json").read_text())["vision_config"]
        clip = editable(CLIP, tmp_path / "clip")
        (clip / "config.json").write_text(json.dumps(tree))
        stored = load_file(clip / "model.safetensors")
        prefix = "vision_model."
        vision = {n.removeprefix(prefix): t for n, t in stored.items() if n.startswith(prefix)}
        save_file(vision, clip / "model.safetensors")
    model = from_llama_and_clip(LLAMA, clip, config=parts_config()).build()
    reference = load_file(DATA / "hf_tiny" / "reference.safetensors")
    with torch.no_grad():
        features = model.vision_model(reference["pixels"]).transpose(0, 1)
    torch.testing.assert_close(features, reference["features"], atol=1e-4, rtol=1e-5)
    ids = reference["ids"]
    for modality in (torch.zeros_like(ids), torch.ones_like(ids)):  # both branches are the LLaMA's
        logits = text_logits(model, ids, modality)
        torch.testing.assert_close(logits, reference["logits"], atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_part_layouts_round_trip(tmp_path, dtype):
    model = from_llama_and_clip(LLAMA, CLIP, config=parts_config()).build()
    with torch.no_grad():  # the vision branch is not what a LLaMA export holds
        for name, parameter in model.named_parameters():
            if name.endswith(("linear_kv_vision.weight", "weight_vision")):
                parameter.zero_()
    for layout, source in (("llama", LLAMA), ("clip", CLIP)):
        export(model, tmp_path / layout, layout=layout, dtype=dtype)
        stored = tensors_of(source)
        wanted = {n: t.to(dtype) for n, t in stored.items() if not n.startswith(("text", "visual"))}
        wanted.pop("logit_scale", None)
        assert_same(tensors_of(tmp_path / layout), wanted)
    assert hf_config.read_llama(tmp_path / "llama") == model.model.decoder
    assert hf_config.read_clip(tmp_path / "clip") == model.model.vision


def test_what_the_modalities_share_is_written_to_both_branches(tmp_path):
    config = parts_config()
    config.model.decoder.modality_split = ["input_norm"]
    whole = from_llama_and_clip(LLAMA, CLIP, config=config)
    assert "decoder.layers.0.input_norm.weight_vision" in whole.tensors
    assert not any("linear_kv_vision" in n or "pre_mlp_norm.weight_v" in n for n in whole.tensors)
    with torch.no_grad():
        model = whole.build()
        model.decoder.layers.get_submodule("1").input_norm.weight_vision.add_(1)
    export(model, tmp_path / "out")
    found = tensors_of(tmp_path / "out")
    pairs = {n: n.replace(".1.weight", ".0.weight") for n in found if "multiway.1" in n}
    different = [n for n, same in pairs.items() if not torch.equal(found[n], found[same])]
    assert len(pairs) == 8 and different == ["model.layers.1.input_layernorm.multiway.1.weight"]
    again = from_owl2(tmp_path / "out", config=config).build()
    for name, parameter in model.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter), name
    config.model.decoder.modality_split = []
    with pytest.raises(ConversionError) as refusal:
        from_owl2(tmp_path / "out", config=config)
    assert str(refusal.value).count("different: ") == 1
    assert f"different: {different[0]} and {pairs[different[0]]}, which" in str(refusal.value)


def test_exports_load_in_transformers(tmp_path):
    model = from_llama_and_clip(LLAMA, CLIP, config=parts_config()).build()
    reference = load_file(DATA / "hf_tiny" / "reference.safetensors")
    for layout in ("llama", "clip"):
        export(model, tmp_path / layout, layout=layout, dtype=torch.float32)
    llama, report = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path / "llama", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    clip, report = transformers.CLIPVisionModel.from_pretrained(
        tmp_path / "clip", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    with torch.no_grad():
        logits = llama(reference["ids"]).logits
        hidden = clip(reference["pixels"]).last_hidden_state
        features = getattr(clip, "vision_model", clip).post_layernorm(hidden)
    torch.testing.assert_close(logits, reference["logits"])
    torch.testing.assert_close(features, reference["features"])


def test_the_seed_decides_the_abstractor():
    first, again, other = (
        from_llama_and_clip(LLAMA, CLIP, config=parts_config(), seed=seed)
        .tensors["abstractor.query_embeds"]
        .read()
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_another_image_size_resizes_the_positions():
    model = from_llama_and_clip(LLAMA, CLIP, config=parts_config(image_size=56)).build()
    table = load_file(CLIP / "model.safetensors")[
        "vision_model.embeddings.position_embedding.weight"
    ]
    resized = model.vision_model.position_embedding[0]
    assert resized.shape == (65, 24)
    assert torch.equal(resized[0], table[0])
    grid = resized[1:].view(8, 8, 24)
    # Far from the borders: row 3 of the fine grid lies a quarter of the way from row 1 to row 2 of
    # the coarse one, column 4 three quarters; the bicubic kernel (a = -0.75) has these weights.
    weights = torch.tensor([-0.10546875, 0.87890625, 0.26171875, -0.03515625])
    expected = torch.einsum("a,b,abc->c", weights, weights.flip(0), table[1:].view(4, 4, 24))
    torch.testing.assert_close(grid[3, 4], expected)


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
    assert save_load.read_config(ckpt).model.image_mean == [0.5, 0.5, 0.5]

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
