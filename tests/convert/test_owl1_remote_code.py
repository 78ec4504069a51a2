"""mPLUG-Owl, version 1, in transformers with the code of an export: against the recordings of the
official code, and in every way of loading."""

import json
import sys
from pathlib import Path

import pytest
import torch
from exported import ATTENTIONS, load, offline
from owl1_dirs import META, OFFICIAL, ROWS, edit, with_code
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    DynamicCache,
)

CASES = ["batch", *(name for name in META["cases"] if name.startswith("single_"))]


@pytest.fixture(scope="module", autouse=True)
def without_network(tmp_path_factory):
    yield from offline(tmp_path_factory.getbasetemp() / "modules")


@pytest.fixture(scope="module")
def reference():
    return load_file(OFFICIAL / "reference.safetensors")


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    return with_code(tmp_path_factory.mktemp("official") / "owl1")


@pytest.fixture(scope="module")
def video_directory(tmp_path_factory) -> Path:
    return with_code(tmp_path_factory.mktemp("official") / "owl1_video", video=True)


def images_of(reference, name: str) -> torch.Tensor | None:
    """The recorded images of a row, or of the whole batch in the order of its rows."""
    rows = META["batch_image_rows"]
    found = [0, 1, 2, 3] if name == "batch" else rows.get(name, [])
    return reference["batch/pixel_values"][found] if found else None


def case(reference, name: str) -> dict[str, torch.Tensor]:
    return {
        "input_ids": reference[f"{name}/input_ids"],
        "pixel_values": images_of(reference, name.removeprefix("single_")),
        "labels": reference[f"{name}/effective_labels"],
    }


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_outputs_of_the_official_code(directory, reference, attention):
    model = load(directory, attn_implementation=attention)
    assert model.language_model.config._attn_implementation == attention
    with torch.no_grad():
        visual = model.get_image_features(reference["batch/pixel_values"])
    torch.testing.assert_close(visual, reference["batch/visual_tokens"], atol=1e-5, rtol=1e-5)
    for name in CASES:
        inputs = case(reference, name)
        before = inputs["labels"].clone()
        with torch.no_grad():
            out = model(**inputs)
            last = model(**inputs | {"labels": None}, logits_to_keep=2).logits
        assert torch.equal(before, inputs["labels"])
        wanted = reference.get(f"{name}/logits")
        if wanted is None:  # that of the batch, where rows are padded on the right
            row = META["batch_order"].index(name.removeprefix("single_"))
            wanted = reference["batch/logits"][row : row + 1, : out.logits.shape[1]]
        torch.testing.assert_close(out.logits, wanted, atol=1e-4, rtol=0)
        torch.testing.assert_close(out.loss, reference[f"{name}/loss"], atol=1e-5, rtol=0)
        torch.testing.assert_close(last, out.logits[:, -2:])


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_the_official_code(directory, reference, checkpointing):
    model = load(directory).train()
    calls = []
    for layer in (model.language_model.model.layers[1], model.abstractor.encoder["layers"][1]):
        inner = layer.self_attn if hasattr(layer, "self_attn") else layer.crossattention
        inner.register_forward_pre_hook(lambda *args: calls.append(1))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model(**case(reference, "batch"), use_cache=False).loss.backward()
    assert len(calls) == (4 if checkpointing else 2)
    wanted = load_file(OFFICIAL / "grads_batch.safetensors")
    parameters = dict(model.named_parameters())
    assert parameters.keys() == wanted.keys()
    for name, gradient in wanted.items():
        difference = (parameters[name].grad - gradient).norm()
        assert difference <= 1e-4 * gradient.norm() + 1e-7, name


@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_ids_of_the_official_code(directory, reference, use_cache):
    model = load(directory)
    options = {"do_sample": False, "use_cache": use_cache, "eos_token_id": None}
    for name in ("text", "one_image", "two_images", "multi_turn"):
        ids = reference[f"generate_{name}/input_ids"]
        shown = images_of(reference, name)
        out = model.generate(input_ids=ids, pixel_values=shown, max_new_tokens=12, **options)
        wanted = META["generation"][f"generate_{name}"]["new_ids"]
        assert out[0, ids.shape[1] :].tolist() == wanted, name
        assert torch.equal(out[:, : ids.shape[1]], ids.clamp(min=0))
    recorded = META["generation"]["generate_batch_leftpad"]
    inputs = {k: reference[f"generate_batch_leftpad/{k}"] for k in ("input_ids", "attention_mask")}
    out = model.generate(
        **inputs, pixel_values=images_of(reference, "batch")[:3], max_new_tokens=12, **options
    )
    assert out[:, inputs["input_ids"].shape[1] :].tolist() == recorded["new_ids"]


def test_padding_on_the_left_changes_nothing(directory, reference):
    model = load(directory)
    inputs = {k: reference[f"leftpad_forward/{k}"] for k in ("input_ids", "attention_mask")}
    labels = reference["leftpad_forward/effective_labels"]
    with torch.no_grad():
        out = model(**inputs, pixel_values=images_of(reference, "one_image"), labels=labels)
    kept = inputs["attention_mask"].bool()
    wanted = reference["leftpad_forward/logits"]
    torch.testing.assert_close(out.logits[kept], wanted[kept], atol=1e-4, rtol=0)
    torch.testing.assert_close(out.loss, reference["leftpad_forward/loss"], atol=1e-5, rtol=0)
    for row, name in enumerate(META["cases"]["leftpad_forward"]["rows"]):
        alone = model(**case(reference, f"single_{name}")).logits[0]
        torch.testing.assert_close(out.logits[row, -len(alone) :], alone, atol=1e-4, rtol=0)


def test_neighbouring_images_are_both_seen(directory, reference):
    """The released code takes two placeholders without a text between for one."""
    model = load(directory)
    ids = reference["adjacent_images_quirk/input_ids"]
    shown = images_of(reference, "two_images")
    with torch.no_grad():
        embedded = model.get_input_embeddings()(ids.clamp(min=0))
        embedded[ids == -1] = model.get_image_features(shown).flatten(0, 1)
        wanted = model.language_model(inputs_embeds=embedded).logits
        found = model(input_ids=ids, pixel_values=shown).logits
    torch.testing.assert_close(found, wanted)
    assert (ids == -1).sum() == 2 * ROWS
    assert (found - reference["adjacent_images_quirk/logits"]).abs().max() > 1


def test_an_official_adapter_and_what_it_is_merged_into(directory, tmp_path):
    recorded = load_file(OFFICIAL / "reference_lora.safetensors")
    reference = load_file(OFFICIAL / "reference.safetensors")
    inputs = {
        "input_ids": recorded["batch/input_ids"],
        "pixel_values": images_of(reference, "two_images"),
    }
    masks = [recorded[f"batch/{k}_mask"] for k in ("prompt", "non_media", "non_padding")]
    targets = torch.stack(masks).prod(0).bool()
    labels = inputs["input_ids"].clone()
    labels[:, 1:][~targets] = -100
    adapted = PeftModel.from_pretrained(load(directory), OFFICIAL / "lora_adapter")
    with torch.no_grad():
        out = adapted(**inputs, labels=labels)
    torch.testing.assert_close(out.logits, recorded["batch/logits"], atol=1e-4, rtol=0)
    torch.testing.assert_close(out.loss, recorded["batch/loss"], atol=1e-5, rtol=0)
    one = META["lora"]["generation"]["generate_one_image"]
    ids = reference["generate_one_image/input_ids"]
    options = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 12}
    shown = images_of(reference, "one_image")
    new = adapted.generate(input_ids=ids, pixel_values=shown, **options)[0, ids.shape[1] :]
    assert new.tolist() == one["new_ids"]
    merged = adapted.merge_and_unload()
    for name, weight in merged.state_dict().items():
        if (wanted := recorded.get(f"merged_weight/{name}")) is not None:
            torch.testing.assert_close(weight, wanted, atol=1e-6, rtol=0)
    merged.save_pretrained(tmp_path / "merged")
    with torch.no_grad():
        logits = load(tmp_path / "merged")(**inputs).logits
    torch.testing.assert_close(logits, recorded["merged/logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["video", "image"])
def test_the_video_variant(video_directory, name):
    model = load(video_directory)
    recorded = load_file(OFFICIAL / "reference_video.safetensors")
    keyword = "video_pixel_values" if name == "video" else "pixel_values"
    pixels, ids = recorded[f"{name}/{keyword}"], recorded[f"{name}/input_ids"]
    wanted, kept = recorded[f"{name}/vit_features"], {}
    layers = model.vision_model.encoder["layers"]
    for number, layer in enumerate(layers):
        layer.temporal.register_forward_hook(
            lambda module, args, out, number=number: kept.update({number: (args[0], out)})
        )
    with torch.no_grad():
        features = model.vision_model(pixels)
        encode = model.get_video_features if name == "video" else model.get_image_features
        visual = encode(pixels)
    torch.testing.assert_close(features.flatten(), wanted.flatten(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(visual, recorded[f"{name}/visual_tokens"], atol=1e-5, rtol=1e-5)
    assert len(kept) == (2 if name == "video" else 0)
    for number, (before, out) in kept.items():
        adapted = recorded[f"video/vit_temporal{number}_out"].flatten(0, 1)
        torch.testing.assert_close(out, adapted, atol=1e-5, rtol=1e-5)
        assert torch.equal(out[:, 0], before[:, 0])
    for use_cache in (True, False):
        out = model.generate(
            input_ids=ids,
            **{keyword: pixels},
            do_sample=False,
            eos_token_id=None,
            max_new_tokens=10,
            use_cache=use_cache,
            output_logits=True,
            return_dict_in_generate=True,
        )
        new_ids = META["video"][f"generate_{name}"]["new_ids"]
        assert out.sequences[0, ids.shape[1] :].tolist() == new_ids
        logits = torch.stack(out.logits, dim=1)
        torch.testing.assert_close(logits, recorded[f"{name}/scores"], atol=1e-4, rtol=0)


def test_images_and_videos_of_one_batch_keep_their_rows(video_directory):
    """The released code refuses such batches, or gives a row the features of another."""
    model = load(video_directory)
    recorded = load_file(OFFICIAL / "reference_video.safetensors")
    clips, shown = recorded["video/video_pixel_values"], recorded["image/pixel_values"]
    image, video = recorded["image/input_ids"], recorded["video/input_ids"]
    both = torch.cat([video, image], dim=1)
    padded = torch.nn.functional.pad(image, (video.shape[1], 0))
    inputs = {
        "input_ids": torch.cat([padded, both]),
        "attention_mask": torch.cat([padded, both]).ne(0).long(),
        "pixel_values": torch.cat([shown.flip(3), shown]),
        "video_pixel_values": clips,
    }
    with torch.no_grad():
        together = model(**inputs).logits
        alone = model(input_ids=image, pixel_values=shown.flip(3)).logits
        torch.testing.assert_close(together[:1, -image.shape[1] :], alone, atol=1e-4, rtol=0)
        alone = model(input_ids=both, pixel_values=shown, video_pixel_values=clips).logits
        torch.testing.assert_close(together[1:], alone, atol=1e-4, rtol=0)
        turned = model(input_ids=both, pixel_values=shown, video_pixel_values=clips.flip(2)).logits
    assert (turned - alone).abs().max() > 1e-2
    ids, modality = sys.modules[type(model).__module__].told_apart(inputs.pop("input_ids"))
    inputs |= {"input_ids": ids, "modality": modality}
    ids, expanded = model._expand_inputs_for_generation(2, False, **inputs)
    with torch.no_grad():
        repeated = model(input_ids=ids, **expanded).logits
    torch.testing.assert_close(repeated, together.repeat_interleave(2, dim=0))


def test_every_key_is_the_released_one(directory, video_directory, capfd):
    for where in (directory, video_directory):
        model, info = load(where, output_loading_info=True)
        assert not any(info.values()), info
        released = load_file(where / "model.safetensors")
        kept = {name: t.shape for name, t in released.items() if "inv_freq" not in name}
        assert {name: t.shape for name, t in model.state_dict().items()} == kept
    printed = capfd.readouterr()
    assert not any(word in printed.out + printed.err for word in ("newly", "MISSING", "UNEXPECTED"))


@pytest.mark.parametrize("auto", [AutoModelForCausalLM, AutoModelForImageTextToText])
def test_save_and_load_again(directory, reference, auto, tmp_path):
    model = load(directory)
    model.save_pretrained(tmp_path / "saved")
    again, info = auto.from_pretrained(
        tmp_path / "saved", trust_remote_code=True, output_loading_info=True
    )
    assert not any(info.values())
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["model_type"] == "mplug-owl" and config["num_query_tokens"] == ROWS - 1
    assert config["text_config"]["model_type"] == "llama"
    released = json.loads((directory / "config.json").read_text())
    for part in ("vision_config", "visual_abstractor_config"):
        assert config[part].items() >= released[part].items()
    inputs = case(reference, "single_one_image")
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("device_map", ["auto", "parts"])
def test_device_maps(directory, reference, device_map, tmp_path):
    options = {}
    if device_map == "parts":  # every part waits on disk and comes when it is called
        parts = ["vision_model", "abstractor", "language_model.model", "language_model.lm_head"]
        device_map = dict.fromkeys(parts, "disk") | {"query_tokens": "cpu"}
        options = {"offload_folder": str(tmp_path)}
    model = load(directory, device_map=device_map, **options)
    inputs = case(reference, "single_one_image")
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, load(directory)(**inputs).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(directory, reference, dtype):
    inputs = case(reference, "single_two_images")
    model = load(directory, dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    with torch.no_grad():
        logits, wanted = model(**inputs).logits, load(directory)(**inputs).logits
    assert logits.dtype == dtype
    error = (logits.float() - wanted).norm() / wanted.norm()
    assert error < (0.03 if dtype == torch.bfloat16 else 0.004)
    options = {"do_sample": False, "max_new_tokens": 2, "min_new_tokens": 2}
    del inputs["labels"]
    assert model.generate(**inputs, **options).shape[1] == inputs["input_ids"].shape[1] + 2


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_attention_of_the_abstractor_drops_in_training_alone(
    directory, reference, attention, tmp_path
):
    dropping = with_code(tmp_path / "dropping")
    tree = json.loads((dropping / "config.json").read_text())["visual_abstractor_config"]
    tree["attention_probs_dropout_prob"] = 0.1
    edit(dropping / "config.json", visual_abstractor_config=tree)
    model = load(dropping, attn_implementation=attention)
    pixels = reference["batch/pixel_values"]
    with torch.no_grad():
        still = model.get_image_features(pixels)
        torch.testing.assert_close(still, reference["batch/visual_tokens"], atol=1e-5, rtol=1e-5)
        model.train()
        torch.manual_seed(0)
        drawn = torch.stack([model.get_image_features(pixels) for _ in range(64)])
        end = model.abstractor.vit_eos
    assert (drawn[0] - drawn[1])[:, :-1].abs().max() > 1e-2
    assert torch.equal(drawn[:, :, -1], end.expand(64, 4, -1)[..., :])
    far = (drawn.mean(0) - still).norm() / still.norm()
    assert far < 0.5 * (drawn[0] - still).norm() / still.norm()


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3, "num_return_sequences": 2},
        {"num_beams": 2, "use_cache": False},
        {"do_sample": True, "top_k": 1, "num_return_sequences": 2},
        {"repetition_penalty": 1.3},
        {"cache_implementation": "static", "disable_compile": True},
    ],
)
def test_other_ways_of_generating_keep_every_row_with_its_images(directory, reference, options):
    model = load(directory)
    kind = "generate_batch_leftpad"
    inputs = {k: reference[f"{kind}/{k}"] for k in ("input_ids", "attention_mask")}
    shown = images_of(reference, "batch")[:3]
    fixed = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 6} | options
    length = inputs["input_ids"].shape[1]
    together = model.generate(**inputs, pixel_values=shown, **fixed)[:, length:]
    rows = []
    for name in ("one_image", "text", "two_images"):
        ids = reference[f"generate_{name}/input_ids"]
        out = model.generate(input_ids=ids, pixel_values=images_of(reference, name), **fixed)
        rows += out[:, ids.shape[1] :].tolist()
    assert together.tolist() == rows
    assert len(rows) == 3 * options.get("num_return_sequences", 1)


def test_a_conversation_goes_on_from_its_cache(directory, reference):
    model, cache = load(directory), DynamicCache()
    options = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 4}
    first = reference["generate_one_image/input_ids"]
    shown = images_of(reference, "batch")
    answered = model.generate(
        input_ids=first, pixel_values=shown[:1], past_key_values=cache, **options
    )
    new = answered[:, first.shape[1] :]
    longer = torch.cat([first, new, reference["generate_two_images/input_ids"]], dim=1)
    encoded = []
    model.vision_model.register_forward_hook(lambda *args: encoded.append(len(args[1][0])))
    inputs = {"input_ids": longer, "pixel_values": shown[:3]}
    continued = model.generate(**inputs, past_key_values=cache, **options)
    assert encoded == [2]  # not the three of the whole conversation
    assert torch.equal(continued, model.generate(**inputs, **options))


def test_a_new_model_starts_finite_and_small(video_directory):
    config = AutoConfig.from_pretrained(video_directory, trust_remote_code=True)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    for name, parameter in model.named_parameters():
        weight = not name.endswith("bias")
        norm = weight and any(word in name for word in ("norm", "ffn_ln", ".ln."))
        assert (parameter - 1.0 * norm).abs().max() < 0.15 * (weight and not norm) + 1e-9, name
        assert parameter.any() == weight, name


def test_the_sizes_of_the_released_models(directory):
    model_class, abstractor = type(load(directory)), {"intermediate_size": 2816}
    for temporal, count in ((False, 7_123_068_928), (True, 7_152_633_856)):
        sections = {"vision_config": {"temporal": temporal}, "visual_abstractor_config": abstractor}
        config = model_class.config_class(**sections)
        with torch.device("meta"):
            model = model_class(config)
        assert sum(p.numel() for p in model.parameters()) == count
        assert config.tokens_per_image == 65


def test_what_the_configuration_cannot_be(directory):
    config_class = type(AutoConfig.from_pretrained(directory, trust_remote_code=True))
    with pytest.raises(ValueError, match="model_type 'bloom'; this code reads 'llama'"):
        config_class(text_config={"model_type": "bloom"})
    with pytest.raises(ValueError, match="hidden_size is 768, but that of vision_config 1024"):
        config_class(visual_abstractor_config={"hidden_size": 768})


def test_images_and_their_rows_must_agree(directory, video_directory, reference):
    model = load(directory)
    inputs = case(reference, "single_two_images")
    ids, shown = inputs["input_ids"], inputs["pixel_values"]
    options = {"max_new_tokens": 2, "do_sample": False}
    for call in (model, lambda **given: model.generate(**given, **options)):
        with pytest.raises(ValueError, match=r"18 image rows, but pixel_values hold 1 images.* 9 "):
            call(input_ids=ids, pixel_values=shown[:1])
        with pytest.raises(ValueError, match="18 image rows, but pixel_values hold 0 images"):
            call(input_ids=ids)
        with pytest.raises(ValueError, match="0 image rows, but pixel_values hold 2 images"):
            call(input_ids=ids.clamp(min=0), pixel_values=shown)
        with pytest.raises(ValueError, match="18 video rows, but video_pixel_values hold 0 videos"):
            call(input_ids=ids.where(ids >= 0, -2))
        with pytest.raises(ValueError, match="input_ids hold -200; rows of an image are -1"):
            call(input_ids=ids.where(ids >= 0, -200), pixel_values=shown)
    with pytest.raises(ValueError, match=r"\[2, 3, 28, 56\], but this model takes \[images, 3, 56"):
        model(input_ids=ids, pixel_values=shown[:, :, :28])
    with pytest.raises(ValueError, match="give either input_ids or inputs_embeds"):
        model(pixel_values=shown)
    with pytest.raises(ValueError, match="what is added to input_ids needs its modality"):
        model(input_ids=ids, modality=ids[:, 1:], pixel_values=shown)
    clip = torch.stack([shown, shown], dim=2)
    with pytest.raises(ValueError, match="reads no videos: give their frames as images, or load"):
        model.get_video_features(clip)
    model = load(video_directory)
    for wrong in (clip[:, :, :1], clip[:, :, 0]):
        with pytest.raises(ValueError, match="of at least 2 frames"):
            model.get_video_features(wrong)
    with pytest.raises(ValueError, match=r"\[videos, 3, frames, 56, 56\]"):
        model.get_video_features(clip[..., :28])
