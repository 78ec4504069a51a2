"""Linears for inference: packed, column by column or as they were, they compute the same."""

import pytest
import torch
from generation import cases
from hf_dirs import export

from megatron_owl2.inference import linear, loading
from megatron_owl2.inference.engine import Generator


@pytest.mark.parametrize("smallest", [0, 2**40], ids=["packed", "column by column"])
def test_the_model_answers_the_same(loaded, tokenizer, tmp_path, monkeypatch, smallest):
    monkeypatch.setattr(linear, "_SMALLEST_PACKED", smallest)
    export(loaded.model, tmp_path / "hf", tokenizer=tokenizer.path)
    again = loading.load_model(tmp_path / "hf")
    linears = [m for m in again.model.modules() if isinstance(m, linear.InferenceLinear)]
    packed = {one.weight.is_mkldnn for one in linears}
    assert packed == {smallest == 0 and torch.backends.mkldnn.is_available()}
    prompts, images = cases(loaded)
    expected = Generator(loaded).generate_ids(prompts, images, 12)
    assert Generator(again).generate_ids(prompts, images, 12) == expected
    for prompt, row, ids in zip(prompts, images, expected, strict=True):  # of fewer rows than four
        assert Generator(again).generate_ids([prompt], [row], 12) == [ids]


def test_bf16_packs_as_well(loaded, tokenizer, tmp_path, monkeypatch):
    export(loaded.model, tmp_path / "hf", tokenizer=tokenizer.path)
    prompts, images = cases(loaded)
    totals = []
    for smallest in (0, 2**40):
        monkeypatch.setattr(linear, "_SMALLEST_PACKED", smallest)
        half = Generator(loading.load_model(tmp_path / "hf", "bf16"))
        found = half.log_likelihoods(prompts, [[5, 6]] * len(prompts), images)
        totals.append(torch.tensor([one.total for one in found]))
    torch.testing.assert_close(*totals, rtol=0.02, atol=0.02)
