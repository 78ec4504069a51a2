"""A model from a LLaMA and a CLIP, and exports of its decoder and its ViT."""

import json

import pytest
import torch
import transformers
from hf_dirs import CLIP, DATA, LLAMA, assert_same, editable, export, parts_config, tensors_of
from safetensors.torch import load_file, save_file

from megatron_owl2.convert import hf_config
from megatron_owl2.convert.sources import from_llama_and_clip, from_released
from megatron_owl2.errors import ConversionError
from megatron_owl2.model.modality import Modality


def text_logits(model, ids, modality):
    rows, positions = modality.nonzero(as_tuple=True)
    split = Modality.of(modality, positions * len(ids) + rows, model.context)
    position_ids = torch.arange(ids.shape[1]).expand_as(ids)
    with torch.no_grad():
        x = model.decoder(model.embedding(ids).transpose(0, 1), split, position_ids)
        return model.output_layer(model.final_norm(x)).transpose(0, 1)


def test_the_image_statistics_of_a_clip_are_kept(tmp_path):
    clip = editable(CLIP, tmp_path / "clip")
    statistics = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (clip / "preprocessor_config.json").write_text(json.dumps(statistics))
    assert hf_config.read_image_settings(clip) == statistics | {"image_mode": "stretch"}
    (clip / "preprocessor_config.json").write_text(json.dumps({"image_mean": 0.5}))
    with pytest.raises(ConversionError, match="image_mean is 0.5, wanted three numbers"):
        hf_config.read_image_settings(clip)


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
    again = from_released(tmp_path / "out", config=config).build()
    for name, parameter in model.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter), name
    config.model.decoder.modality_split = []
    with pytest.raises(ConversionError) as refusal:
        from_released(tmp_path / "out", config=config)
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
