"""The model that an exported directory brings along, in transformers: against the official code's
recordings, against ours, in every way of loading and of generating."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel

from megatron_owl2 import mcore
from megatron_owl2.config import (
    AbstractorConfig,
    DecoderConfig,
    ModelConfig,
    RunConfig,
    VisionConfig,
)
from megatron_owl2.convert import hf, hf_config
from megatron_owl2.convert.expand import expand
from megatron_owl2.convert.weights import LazyTensor
from megatron_owl2.data.conversation import IMAGE_TOKEN_ID
from megatron_owl2.data.tokenizer import Tokenizer
from megatron_owl2.inference.engine import Generator, LoadedModel
from megatron_owl2.inference.inputs import left_padded
from megatron_owl2.model.owl2 import Owl2

OFFICIAL = Path(__file__).parent / "data" / "official_tiny"
META = json.loads((OFFICIAL / "meta.json").read_text())
TABLES = ("q_pos_embed", "k_pos_embed")
ATTENTIONS = ("eager", "sdpa")


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        modules = str(tmp_path_factory.mktemp("modules"))
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", modules)
        yield


@pytest.fixture(scope="module")
def reference():
    return load_file(OFFICIAL / "reference.safetensors")


def build(model: ModelConfig) -> Owl2:
    config = RunConfig(model=model)
    config.train.precision = "fp32"
    return Owl2(mcore.Layout(config, mcore.initialize(1, 1)), model).eval()


def export(model: Owl2, directory: Path) -> Path:
    tensors = {n: LazyTensor.of(p.detach()) for n, p in model.named_parameters()}
    hf.export_hf(tensors, model.model, directory)
    hf_config.write_remote_code(directory)
    return directory


def load(directory: Path, **options) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, **options)


@pytest.fixture(scope="module")
def official(tmp_path_factory) -> Path:
    """The official tiny model after a journey through ours."""
    model = build(hf.read_hf_config(OFFICIAL / "hf_ckpt"))
    hf.load_hf_weights(OFFICIAL / "hf_ckpt", model)
    return export(model, tmp_path_factory.mktemp("official") / "export")


@pytest.fixture(scope="module")
def ours() -> Owl2:
    """A random model of ours in which two heads share a key, wide enough that answers differ."""
    torch.manual_seed(7)
    model = build(
        ModelConfig(
            vision=VisionConfig(28, 14, 32, 2, 4, 64),
            abstractor=AbstractorConfig(4, 2, 4, 64),
            decoder=DecoderConfig(320, 32, 3, 4, 2, 64, max_positions=96, rope_theta=5e3),
            init_std=0.3,
        )
    )
    with torch.no_grad():
        model.output_layer.weight[Tokenizer.eos_id] *= 2.0  # so that rows end at different steps
    return model


@pytest.fixture(scope="module")
def grouped(ours, tmp_path_factory) -> Path:
    return export(ours, tmp_path_factory.mktemp("grouped") / "export")


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
    images = images[e.image_order][: len(e.vision_rows) // 9]
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
        pictures = [reference["batch/images"][i] for i in slots]
        inputs = batch(9, [recorded["prompt_ids"]], [pictures])
        out = answers(model, inputs, max_new_tokens=16, use_cache=use_cache)
        assert out == [recorded["new_ids"]], name


def batch(size: int, prompts: list[list[int]], images: list[list]) -> dict[str, torch.Tensor]:
    """Left-padded inputs of prompts with placeholders -200."""
    rows = left_padded(prompts, size, "cpu")
    flat = [picture for row in images for picture in row]
    return {
        "input_ids": rows.tokens,
        "attention_mask": rows.valid.long(),
        "modality": rows.modality,
        "pixel_values": torch.stack(flat) if flat else None,
    }


def answers(model, inputs, **options) -> list[list[int]]:
    """The new ids, up to EOS."""
    rows = model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :].tolist()
    return [row[: row.index(2)] if 2 in row else row for row in rows]


def prompts_and_images() -> tuple[list[list[int]], list[list[torch.Tensor]]]:
    """Prompts of many lengths with no, one or two images."""
    generator = torch.Generator().manual_seed(3)
    prompts, images = [], []
    for i in range(9):
        words = torch.randint(3, 320, (2 + 7 * i % 11,), generator=generator).tolist()
        for at in (1, 0)[: i % 3]:
            words.insert(at * len(words) // 2, IMAGE_TOKEN_ID)
        prompts.append([1, *words])
        images.append(list(torch.randn(i % 3, 3, 28, 28, generator=generator)))
    return prompts, images


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_logits_of_our_model(ours, grouped, attention):
    prompts, images = prompts_and_images()
    inputs = batch(5, prompts, images)
    rows = left_padded(prompts, 5, "cpu")
    with torch.no_grad():
        wanted = ours(
            rows.tokens,
            inputs["pixel_values"],
            rows.vision_rows,
            rows.modality,
            rows.position_ids,
            attention_mask=rows.attention_mask,
        )
        model = load(grouped, attn_implementation=attention)
        logits = model(**inputs).logits
    assert model.model.layers[0].self_attn.k_proj.multiway[1].weight.shape == (16, 32)
    kept = rows.valid
    torch.testing.assert_close(logits[kept], wanted[kept], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_padded_batch_answers_like_its_rows_and_like_our_generator(ours, grouped, attention):
    prompts, images = prompts_and_images()
    model = load(grouped, attn_implementation=attention)
    together = answers(model, batch(5, prompts, images), max_new_tokens=12, min_new_tokens=1)
    alone = [
        answers(model, batch(5, [p], [i]), max_new_tokens=12, min_new_tokens=1)[0]
        for p, i in zip(prompts, images, strict=True)
    ]
    assert together == alone
    assert len({len(row) for row in together}) > 2
    generator = Generator(LoadedModel(ours, ours.model, Tokenizer))
    assert generator.generate_ids(prompts, images, 12) == together


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3, "num_return_sequences": 2},
        {"num_beams": 2, "use_cache": False},
        {"repetition_penalty": 1.3},
        {"prompt_lookup_num_tokens": 3},
    ],
)
def test_other_ways_of_generating_keep_every_row_with_its_images(grouped, options):
    prompts, images = prompts_and_images()
    model = load(grouped)
    per_row = options.get("num_return_sequences", 1)
    alone = [
        answer
        for p, i in zip(prompts, images, strict=True)
        for answer in answers(model, batch(5, [p], [i]), max_new_tokens=8, **options)
    ]
    assert len(alone) == per_row * len(prompts)
    greedy = answers(model, batch(5, prompts, images), max_new_tokens=8)
    if "prompt_lookup_num_tokens" in options:  # speculative: one row at a time, the same answers
        assert alone == greedy
    else:
        assert answers(model, batch(5, prompts, images), max_new_tokens=8, **options) == alone
        assert alone[::per_row] != greedy


def test_samples_of_a_row_see_the_images_of_that_row(grouped):
    prompts, images = prompts_and_images()
    model = load(grouped)
    inputs = batch(5, prompts, images)
    ids, expanded = model._expand_inputs_for_generation(2, False, **inputs)
    with torch.no_grad():
        logits = model(input_ids=ids, **expanded).logits
        torch.testing.assert_close(logits, model(**inputs).logits.repeat_interleave(2, dim=0))


def test_a_conversation_goes_on_from_its_cache(grouped):
    prompts, images = prompts_and_images()
    model, cache = load(grouped), DynamicCache()
    first = batch(5, [prompts[1]], [images[1]])
    answer = answers(model, first, max_new_tokens=4, min_new_tokens=4, past_key_values=cache)[0]
    assert 0 < cache.get_seq_length() < first["input_ids"].shape[1] + 4
    longer = [*prompts[1], *answer, *prompts[2]]
    inputs = batch(5, [longer], [images[1] + images[2]])
    encoded = []
    model.model.vision_model.register_forward_hook(lambda *args: encoded.append(len(args[1][0])))
    continued = answers(model, inputs, max_new_tokens=6, past_key_values=cache)
    assert encoded == [2]  # not the three of the whole conversation
    assert continued == answers(model, inputs, max_new_tokens=6)


def test_embeddings_may_hold_the_visual_tokens_already(grouped):
    model = load(grouped)
    prompts, images = prompts_and_images()
    inputs = batch(5, prompts, images)
    embedded = model.get_input_embeddings()(inputs["input_ids"])
    where = inputs["modality"].bool()
    with torch.no_grad():
        embedded[where] = model.model.get_image_features(inputs["pixel_values"]).flatten(0, 1)
        wanted = model(**inputs).logits
        given = {k: inputs[k] for k in ("attention_mask", "modality")}
        torch.testing.assert_close(model(inputs_embeds=embedded, **given).logits, wanted)
    new = model.generate(inputs_embeds=embedded, **given, max_new_tokens=6)
    whole = model.generate(**inputs, max_new_tokens=6)
    assert torch.equal(new, whole[:, inputs["input_ids"].shape[1] :])


def test_hidden_states_and_attentions(grouped):
    model = load(grouped, attn_implementation="eager")
    inputs = batch(5, *prompts_and_images())
    out = model(**inputs, output_hidden_states=True, output_attentions=True)
    b, s = inputs["input_ids"].shape
    assert [tuple(x.shape) for x in out.hidden_states] == [(b, s, 32)] * 4
    assert [tuple(x.shape) for x in out.attentions] == [(b, 4, s, s)] * 3


def test_images_and_their_rows_must_agree(grouped):
    model = load(grouped)
    inputs = batch(5, *prompts_and_images())
    images = inputs.pop("pixel_values")
    with pytest.raises(ValueError, match=r"45 image rows, but pixel_values hold 8 images.*40 rows"):
        model(**inputs, pixel_values=images[1:])
    for call in (model, lambda **given: model.generate(**given, max_new_tokens=2)):
        with pytest.raises(ValueError, match="45 image rows, but pixel_values hold 0 images"):
            call(**inputs)
        with pytest.raises(ValueError, match="0 image rows, but pixel_values hold 9 images"):
            call(input_ids=inputs["input_ids"], pixel_values=images)
    with pytest.raises(ValueError, match=r"\[9, 3, 14, 28\], but this model takes"):
        model(**inputs, pixel_values=images[:, :, :14])


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(official, reference, dtype):
    inputs = case(reference, "batch")
    kept = inputs["attention_mask"].bool()
    model = load(official, dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    with torch.no_grad():
        logits, wanted = model(**inputs).logits[kept], load(official)(**inputs).logits[kept]
    assert logits.dtype == dtype
    error = (logits.float() - wanted).norm() / wanted.norm()
    assert error < (0.03 if dtype == torch.bfloat16 else 0.004)


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
    assert hf.read_hf_config(tmp_path / "saved") == hf.read_hf_config(official)
    restored = build(hf.read_hf_config(tmp_path / "saved"))
    hf.load_hf_weights(tmp_path / "saved", restored)


def test_a_new_model_starts_finite_and_small(official):
    config = AutoConfig.from_pretrained(official, trust_remote_code=True)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    for name, parameter in model.named_parameters():
        weight = not name.endswith("bias")
        norm = weight and ("norm" in name or "ffn_ln" in name)
        assert (parameter - 1.0 * norm).abs().max() < 0.15 * (weight and not norm) + 1e-9, name
        assert parameter.any() == weight, name
