"""Our model on the weights and inputs of the official code, against what that code computed."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_owl2 import mcore
from megatron_owl2.config import RunConfig
from megatron_owl2.convert.expand import expand
from megatron_owl2.convert.hf import load_hf_weights, read_hf_config
from megatron_owl2.convert.mapping import rules
from megatron_owl2.model.owl2 import Owl2

OFFICIAL = Path(__file__).parent / "data" / "official_tiny"
META = json.loads((OFFICIAL / "meta.json").read_text())
SINGLES = ["img_near_start", "text_only", "two_images", "img_first_token", "img_last_prompt_token"]


@pytest.fixture(scope="module")
def model():
    config = RunConfig(model=read_hf_config(OFFICIAL / "hf_ckpt"))
    config.train.precision = "fp32"
    model = Owl2(mcore.Layout(config, mcore.initialize(1, 1)), config.model)
    load_hf_weights(OFFICIAL / "hf_ckpt", model)
    yield model
    mcore.shutdown()


@pytest.fixture(scope="module")
def reference():
    return load_file(OFFICIAL / "reference.safetensors")


def case(reference, name, model):
    tensors = {k.split("/")[1]: v for k, v in reference.items() if k.startswith(name + "/")}
    counts = None
    images = reference["batch/images"]
    if name.startswith("single_"):
        images = images[META["batch_image_slots"][name.removeprefix("single_")]]
    if name == "frames_list":
        counts = [len(rows) for rows in META["frames_list_image_rows"]]
        images = images[sum(META["frames_list_image_rows"], [])]
    expanded = expand(
        tensors["input_ids"],
        model.model.tokens_per_image,
        attention_mask=tensors.get("attention_mask"),
        labels=tensors["labels"],
        images_per_placeholder=counts,
    )
    return tensors, expanded, images[expanded.image_order]


def inputs(expanded, images):
    e = expanded
    return e.tokens, images, e.vision_rows, e.modality, e.position_ids


def mean_loss(model, expanded, images):
    losses = model(*inputs(expanded, images), expanded.labels.clamp(min=0))
    return losses[expanded.labels != -100].mean()


@pytest.mark.parametrize("name", ["batch", "frames_list", *(f"single_{n}" for n in SINGLES)])
def test_logits_and_loss(model, reference, name):
    tensors, expanded, images = case(reference, name, model)
    assert torch.equal(expanded.modality, tensors["modality_indicators"])
    assert torch.equal(expanded.labels[:, :-1], tensors["expanded_labels"][:, 1:])
    assert (expanded.labels[:, -1] == -100).all()
    if "expanded_attention_mask" in tensors:
        assert torch.equal(expanded.valid, tensors["expanded_attention_mask"])
    with torch.no_grad():
        logits = model(*inputs(expanded, images))
        loss = mean_loss(model, expanded, images)
    kept = expanded.valid
    torch.testing.assert_close(logits[kept], tensors["logits"][kept], atol=1e-4, rtol=0)
    torch.testing.assert_close(loss, tensors["loss"].squeeze(), atol=1e-5, rtol=0)


def test_vision_features_and_visual_tokens(model, reference):
    images = reference["batch/images"]
    with torch.no_grad():
        features = model.vision_model(images).transpose(0, 1)
        tokens = model.encode_images(images)
    torch.testing.assert_close(features, reference["batch/vit_features"], atol=1e-5, rtol=0)
    torch.testing.assert_close(tokens, reference["batch/visual_tokens"], atol=1e-5, rtol=0)


def test_gradients(model, reference):
    _, expanded, images = case(reference, "batch", model)
    model.zero_grad()
    mean_loss(model, expanded, images).backward()
    official = load_file(OFFICIAL / "grads_batch.safetensors")
    parameters, compared = dict(model.named_parameters()), set()
    for rule in rules("owl2", model.model):
        parts = rule.transform.split(parameters[rule.ours].grad)
        for name, gradient in zip(rule.theirs, parts, strict=True):
            norm = META["grad_stats_all_params"][name]["l2"]
            if name.endswith("attention.key.bias"):  # zero in exact arithmetic: softmax ignores it
                assert gradient.norm() < 1e-5 and norm < 1e-5
                continue
            assert gradient.double().norm().item() == pytest.approx(norm, rel=1e-4)
            if name in official:
                assert (gradient - official[name]).norm() < 1e-4 * norm, name
                compared.add(name)
    assert compared == set(official)


def test_images_are_consumed_in_order_and_idle_ones_come_last(model, reference):
    _, expanded, _ = case(reference, "batch", model)
    slots = META["batch_image_slots"]
    assert expanded.image_order.tolist() == [
        *slots["img_near_start"],
        *slots["two_images"],
        *slots["img_first_token"],
        *slots["img_last_prompt_token"],
        *slots["text_only"],
    ]


@pytest.mark.parametrize("mask", [[[0, 1, 1]], [[1, 0, 1]]])
def test_a_mask_that_is_not_right_padding_is_refused(mask):
    with pytest.raises(ValueError, match="right padding"):
        expand(torch.tensor([[1, 5, 6]]), 9, attention_mask=torch.tensor(mask))
