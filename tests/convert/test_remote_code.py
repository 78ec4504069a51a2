"""The model that an exported directory brings along, in transformers: against the official code's
recordings and in every way of loading."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from exported import ATTENTIONS, answers, batch, build, export, load, offline
from paths import DATA
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_owl2.convert.expand import expand
from megatron_owl2.convert.hf_config import read_model
from megatron_owl2.convert.hf_weights import load_hf_weights

OFFICIAL = DATA / "official_tiny"
META = json.loads((OFFICIAL / "meta.json").read_text())
TABLES = ("q_pos_embed", "k_pos_embed")


@pytest.fixture(scope="module", autouse=True)
def without_network(tmp_path_factory):
    yield from offline(tmp_path_factory.getbasetemp() / "modules")


@pytest.fixture(scope="module")
def reference():
    return load_file(OFFICIAL / "reference.safetensors")


@pytest.fixture(scope="module")
def official(tmp_path_factory) -> Path:
    """The official tiny model after a journey through ours."""
    model = build(read_model(OFFICIAL / "hf_ckpt"))
    load_hf_weights(OFFICIAL / "hf_ckpt", model)
    return export(model, tmp_path_factory.mktemp("official") / "export")


def case(reference, name: str) -> dict[str, torch.Tensor]:
    """The recorded inputs of the official code, for the exported one."""
    tensors = {k.split("/")[1]: v for k, v in reference.items() if k.startswith(name + "/")}
    counts, images = None, reference["batch/images"]
    if name.startswith("single_"):
        images = images[META["batch_image_slots"][name.removeprefix("single_")]]
    if name == "frames_list":
        counts = [len(rows) for rows in META["frames_list_image_rows"]]
        images = images[sum(META["frames_list_image_rows"], [])]
    ids, mask = tensors["input_ids"], tensors.get("attention_mask")
    e = expand(ids, 9, attention_mask=mask, images_per_placeholder=counts)
    images = images[e.image_order][: len(e.vision_token_index) // 9]
    return {
        "input_ids": e.tokens,
        "attention_mask": e.valid.long(),
        "modality": e.modality,
        "pixel_values": images if len(images) else None,
        "labels": tensors["expanded_labels"],
    }


CASES = ["batch", "frames_list", *(f"single_{name}" for name in META["batch_order"])]


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_logits_and_loss_of_the_official_code(official, reference, attention):
    model = load(official, attn_implementation=attention)
    assert model.config._attn_implementation == attention
    for name in CASES:
        inputs = case(reference, name)
        with torch.no_grad():
            out = model(**inputs)
            last = model(**inputs | {"labels": None}, logits_to_keep=2).logits
        kept = inputs["attention_mask"].bool()
        wanted = reference[f"{name}/logits"]
        torch.testing.assert_close(out.logits[kept], wanted[kept], atol=1e-4, rtol=0)
        loss = reference[f"{name}/loss"].squeeze()
        torch.testing.assert_close(out.loss, loss, atol=1e-5, rtol=0)
        torch.testing.assert_close(last, out.logits[:, -2:])


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("checkpointing", [None, True, False])
def test_gradients_of_the_official_code(official, reference, checkpointing):
    model = load(official).train()
    if checkpointing is not None:  # with torch's reentrant or its newer implementation
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
        vision = model.model.vision_model.embeddings
        vision.register_forward_hook(lambda *args: args[-1].requires_grad_())
    calls = []
    model.model.layers[1].self_attn.register_forward_hook(lambda *args: calls.append(1))
    model(**case(reference, "batch"), use_cache=False).loss.backward()
    assert len(calls) == (1 if checkpointing is None else 2)
    parameters = dict(model.named_parameters())
    wanted = load_file(OFFICIAL / "grads_batch.safetensors")
    assert len(wanted) == 29
    for name, gradient in wanted.items():
        difference = (parameters[name].grad - gradient).norm()
        assert difference <= 1e-4 * gradient.norm(), name
    for name, parameter in parameters.items():
        norm = META["grad_stats_all_params"][name]["l2"]
        assert parameter.grad.norm().item() == pytest.approx(norm, rel=1e-3, abs=1e-5), name


@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_ids_of_the_official_code(official, reference, use_cache):
    model = load(official)
    for name, recorded in META["generation"].items():
        slots = META["batch_image_slots"][name] if name != "text_only" else []
        shown = [reference["batch/images"][i] for i in slots]
        inputs = batch(9, [recorded["prompt_ids"]], [shown])
        out = answers(model, inputs, max_new_tokens=16, use_cache=use_cache)
        assert out == [recorded["new_ids"]], name


def copy(directory: Path, destination: Path, tensors: dict[str, torch.Tensor]) -> Path:
    shutil.copytree(directory, destination)
    save_file(tensors, destination / "model.safetensors", metadata={"format": "pt"})
    return destination


def test_every_key_is_known_with_and_without_constants(official, reference, tmp_path, capfd):
    exported = load_file(official / "model.safetensors")
    released = load_file(OFFICIAL / "hf_ckpt" / "model.safetensors")
    assert {n for n in exported if n.endswith(TABLES)} and set(exported) < set(released)
    bare = {n: t for n, t in exported.items() if not n.endswith(TABLES)}
    inputs = case(reference, "batch")
    wanted = load(official)(**inputs).logits
    for i, tensors in enumerate((exported, bare, released)):
        directory = copy(official, tmp_path / str(i), tensors)
        model, info = load(directory, output_loading_info=True)
        assert not any(info.values()), info
        assert set(model.state_dict()) == set(bare)
        assert torch.equal(model(**inputs).logits, wanted)
    printed = capfd.readouterr()
    assert not any(word in printed.out + printed.err for word in ("newly", "MISSING", "UNEXPECTED"))


def test_the_layout_stays_the_official_one(official):
    theirs = json.loads((OFFICIAL / "hf_ckpt" / "config.json").read_text())
    written = json.loads((official / "config.json").read_text())
    assert set(theirs) - set(written) == {"pretraining_tp", "transformers_version"}  # generic
    pairs = [(theirs, written)]
    pairs += [
        (theirs["visual_config"][name], written["visual_config"][name])
        for name in theirs["visual_config"]
    ]
    for official_tree, tree in pairs:
        shared = official_tree.keys() & tree.keys() - {"visual_config"}
        assert {key: tree[key] for key in shared} == {key: official_tree[key] for key in shared}
        assert tree.keys() - official_tree.keys() <= {"auto_map", "mlp_bias"}
    shapes = {n: t.shape for n, t in load_file(official / "model.safetensors").items()}
    released = load_file(OFFICIAL / "hf_ckpt" / "model.safetensors")
    assert shapes == {n: t.shape for n, t in released.items() if "inv_freq" not in n}


def test_the_defaults_are_the_released_model(official):
    small = load(official)
    with torch.device("meta"):
        model = type(small)(type(small.config)())
    assert sum(1 for _ in model.parameters()) == 850
    assert sum(p.numel() for p in model.parameters()) == 8_197_859_328
    assert model.config.tokens_per_image == 65


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(official, reference, dtype, tmp_path):
    inputs = case(reference, "batch")
    kept = inputs["attention_mask"].bool()
    model = load(official, dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    with torch.no_grad():
        logits, wanted = model(**inputs).logits[kept], load(official)(**inputs).logits[kept]
    assert logits.dtype == dtype
    error = (logits.float() - wanted).norm() / wanted.norm()
    assert error < (0.03 if dtype == torch.bfloat16 else 0.004)
    model.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")  # in the dtype that it was saved in
    assert again.dtype == dtype
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits[kept], logits)


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}, "parts"])
def test_device_maps(official, reference, device_map, tmp_path):
    inputs = case(reference, "batch")
    options = {}
    if device_map == "parts":  # every part waits on disk and comes when it is called
        parts = ["embed_tokens", "layers.0", "layers.1", "norm"]
        parts += ["vision_model", "visual_abstractor"]
        device_map = dict.fromkeys([f"model.{part}" for part in parts], "disk") | {"lm_head": "cpu"}
        options = {"offload_folder": str(tmp_path)}
    model = load(official, device_map=device_map, **options)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, load(official)(**inputs).logits)


def test_save_and_load_again(official, tmp_path):
    model = load(official)
    model.save_pretrained(tmp_path / "saved")
    again, info = load(tmp_path / "saved", output_loading_info=True)
    assert not any(info.values())
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert again.generation_config.to_diff_dict().items() >= {"pad_token_id": 0}.items()
    assert type(again).__module__.startswith("transformers_modules.saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["rope_theta"] == 10000.0 and "rope_parameters" not in config
    assert read_model(tmp_path / "saved") == read_model(official)
    restored = build(read_model(tmp_path / "saved"))
    load_hf_weights(tmp_path / "saved", restored)


def test_a_new_model_starts_finite_and_small(official):
    config = AutoConfig.from_pretrained(official, trust_remote_code=True)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    for name, parameter in model.named_parameters():
        weight = not name.endswith("bias")
        norm = weight and ("norm" in name or "ffn_ln" in name)
        assert (parameter - 1.0 * norm).abs().max() < 0.15 * (weight and not norm) + 1e-9, name
        assert parameter.any() == weight, name
