"""Parity with the official code's recorded outputs, under every parallel configuration."""

import json

import official_parity as parity
import pytest
import torch
from official_parity import META, OFFICIAL, REFERENCE

from megatron_owl2.convert.expand import expand
from megatron_owl2.mcore import setup

pytestmark = pytest.mark.distributed

TOKENS_PER_IMAGE = parity.recorded_config().model.tokens_per_image


@pytest.fixture(scope="module")
def deviations(tmp_path_factory):
    return parity.run(tmp_path_factory.mktemp("parity"))


@pytest.mark.parametrize("name", parity.PARALLELISMS)
def test_outputs_gradients_training_and_answers_are_the_official_ones(deviations, name):
    assert not parity.beyond(deviations[name], parity.BOUNDS)


def test_weights_as_the_official_converter_writes_them():
    directory = OFFICIAL / "hf_ckpt_converter_layout"  # .bin, bf16, without the position tables
    index = json.loads((directory / "pytorch_model.bin.index.json").read_text())
    assert not [name for name in index["weight_map"] if "pos_embed" in name]
    config = parity.recorded_config()
    model = parity.build(config, directory)
    batch = parity.micro_batch("batch", config)
    with torch.no_grad():
        logits = model(
            batch.tokens, batch.image, batch.vision_token_index, batch.modality, batch.position_ids
        )
    setup.shutdown()
    valid = REFERENCE["batch/expanded_attention_mask"]
    apart = (logits.cpu() - REFERENCE["batch/logits"])[valid].abs().max().item()
    # Rounding the weights moved the official code's logits as far.
    recorded = META["reload_hf_ckpt_converter_layout_lowmem0_max_abs_logit_diff"]
    assert apart == pytest.approx(recorded, abs=1e-4)


def expanded(case):
    inputs = parity.case_inputs(case)
    counts = inputs.get("images_per_placeholder")
    return expand(
        inputs["input_ids"],
        TOKENS_PER_IMAGE,
        attention_mask=inputs.get("attention_mask"),
        labels=inputs["labels"],
        images_per_placeholder=None if counts is None else counts.tolist(),
    )


@pytest.mark.parametrize("case", parity.CASES)
def test_placeholders_expand_as_in_the_official_code(case):
    found = expanded(case)
    assert torch.equal(found.modality, REFERENCE[f"{case}/modality_indicators"])
    assert torch.equal(found.labels[:, :-1], REFERENCE[f"{case}/expanded_labels"][:, 1:])
    assert (found.labels[:, -1] == -100).all()
    mask = REFERENCE.get(f"{case}/expanded_attention_mask", torch.ones_like(found.valid))
    assert torch.equal(found.valid, mask)


def test_images_are_consumed_in_order_and_idle_ones_come_last():
    sample_indices = META["batch_image_slots"]
    assert expanded("batch").image_order.tolist() == [
        *sample_indices["img_near_start"],
        *sample_indices["two_images"],
        *sample_indices["img_first_token"],
        *sample_indices["img_last_prompt_token"],
        *sample_indices["text_only"],
    ]


@pytest.mark.parametrize("mask", [[[0, 1, 1]], [[1, 0, 1]]])
def test_a_mask_that_is_not_right_padding_is_refused(mask):
    with pytest.raises(ValueError, match="right padding"):
        expand(torch.tensor([[1, 5, 6]]), TOKENS_PER_IMAGE, attention_mask=torch.tensor(mask))
