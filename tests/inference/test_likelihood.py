"""Log-likelihoods equal those of the whole sequence through the model, alone and in a batch."""

import pytest
import torch
from generation import cases
from left_padding import left_padded

from megatron_owl2.errors import InferenceError
from megatron_owl2.inference.engine import Generator


def by_forward(loaded, prompt, continuation, images) -> tuple[float, bool]:
    row = left_padded([[*prompt, *continuation]], loaded.config.tokens_per_image)
    pixels = torch.stack(images) if images else torch.zeros(1, 3, 28, 28, dtype=torch.uint8)
    with torch.no_grad():
        logits = loaded.model(
            row.tokens, pixels, row.vision_token_index, row.modality, row.position_ids
        )[0]
    last = logits[-len(continuation) - 1 : -1]
    log_p = last.log_softmax(-1)[range(len(continuation)), continuation]
    return float(log_p.sum()), last.argmax(-1).tolist() == list(continuation)


def test_totals_are_those_of_the_whole_sequence(loaded):
    prompts, images = cases(loaded)
    generator = Generator(loaded)
    continuations = [[5 + i, 9, 30 + 2 * i][: 1 + i % 3] for i in range(len(prompts))]
    likeliest = {i: ids for i, ids in enumerate(generator.generate_ids(prompts, images, 4)) if ids}
    for i in [*likeliest][:4]:
        continuations[i] = likeliest[i]
    found = generator.log_likelihoods(prompts, continuations, images)
    for one, case in zip(found, zip(prompts, continuations, images, strict=True), strict=True):
        total, greedy = by_forward(loaded, *case)
        assert one.total == pytest.approx(total, abs=1e-4)
        assert (one.greedy, one.tokens) == (greedy, len(case[1]))
    assert sum(one.greedy for one in found) == 4


def test_mistakes_are_named(loaded):
    generator = Generator(loaded)
    with pytest.raises(InferenceError, match="continuation 2 is empty"):
        generator.log_likelihoods([[1], [1]], [[4], []])
    with pytest.raises(InferenceError, match="prompt 2 is empty"):
        generator.log_likelihoods([[1, 4], []], [[8], [5, 6, 7]])
    with pytest.raises(InferenceError, match="2 prompts, 1 continuations"):
        generator.log_likelihoods([[1], [1]], [[4]])
    with pytest.raises(InferenceError, match="prompt 1 with its continuation takes 66 positions"):
        generator.log_likelihoods([[1] * 60], [[4] * 7])
    assert generator.log_likelihoods([], []) == []
    assert generator.log_likelihoods([[1] * 60], [[4] * 5])[0].tokens == 5
