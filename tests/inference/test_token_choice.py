"""Sampling: the distributions of transformers, a generator of the request's own, stop strings."""

import dataclasses
import random

import pytest
import torch
from generation import cases
from transformers import generation as theirs

from megatron_owl2.errors import InferenceError
from megatron_owl2.inference.engine import Generator
from megatron_owl2.inference.options import GenerationOptions
from megatron_owl2.inference.requests import Request
from megatron_owl2.inference.token_choice import TokenChooser, candidates, draw, penalized

OPTIONS = [
    GenerationOptions(temperature=t, top_k=k, top_p=p)
    for t in (0.3, 1.0, 2.5)
    for k in (0, 1, 7)
    for p in (0.2, 0.9, 1.0)
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_what_may_be_drawn_is_what_transformers_draws_from(options):
    for seed in range(5):
        logits = 3 * torch.randn(50, generator=torch.Generator().manual_seed(seed))
        chain = [theirs.TemperatureLogitsWarper(options.temperature)]
        chain += [theirs.TopKLogitsWarper(options.top_k)] if options.top_k else []
        chain += [theirs.TopPLogitsWarper(options.top_p)] if options.top_p < 1 else []
        scores = logits[None]
        for warper in chain:
            scores = warper(torch.zeros(1, 0, dtype=torch.int64), scores)
        wanted = scores[0].softmax(0)
        probabilities, ids = candidates(logits, options)
        found = torch.zeros(50).index_copy(0, ids, probabilities / probabilities.sum())
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)


def test_the_repetition_penalty_is_that_of_transformers():
    logits = torch.randn(2, 20, generator=torch.Generator().manual_seed(1))
    seen = torch.tensor([[3, 5, 5, 9], [0, 1, 2, 3]])
    wanted = theirs.RepetitionPenaltyLogitsProcessor(1.7)(seen, logits.clone())
    found = [
        penalized(row, sorted({*ids.tolist()}), 1.7) for row, ids in zip(logits, seen, strict=True)
    ]
    assert torch.equal(torch.stack(found), wanted)


def test_every_token_is_drawn_as_often_as_its_probability_says():
    probabilities = torch.tensor([0.5, 0.25, 0.15, 0.1]) * 0.8  # of those that are left
    counts = [0] * 4
    for i in range(1000):
        counts[draw(probabilities, (i + 0.5) / 1000)] += 1
    assert counts == [500, 250, 150, 100]
    assert draw(probabilities, 0.0) == 0 and draw(probabilities, 1 - 1e-16) == 3
    assert draw(torch.tensor([0.0, 1.0]), 0.0) == 1


def test_a_seed_gives_the_same_answer_alone_and_among_others(loaded):
    prompts, images = cases(loaded)
    hot = [GenerationOptions(10, 10, temperature=2.0, seed=seed) for seed in (1, 1, 2, 3)]
    same = [Request(prompts[1], images[1], options) for options in hot]
    others = [
        Request(p, i, GenerationOptions(10, temperature=1.5, seed=random.Random(n).randrange(99)))
        for n, (p, i) in enumerate(zip(prompts, images, strict=True))
    ]
    generator = Generator(loaded)
    ids = [one.token_ids for one in generator.complete(same + others)[:4]]
    assert ids[0] == ids[1] and len({*map(tuple, ids)}) == 3
    assert [generator.complete([request])[0].token_ids for request in same] == ids


def test_one_candidate_is_the_greedy_answer(loaded):
    prompts, images = cases(loaded)
    greedy = Generator(loaded).generate_ids(prompts[:4], images[:4], 8)
    for options in (
        GenerationOptions(8, temperature=1.0, top_k=1),
        GenerationOptions(8, temperature=1.0, top_p=1e-9),
        GenerationOptions(8, temperature=1e-4),
    ):
        requests = [Request(p, i, options) for p, i in zip(prompts[:4], images[:4], strict=True)]
        found = Generator(loaded).complete(requests)
        assert [one.token_ids for one in found] == greedy


def test_a_penalty_counts_the_prompt_and_what_was_chosen():
    chooser = TokenChooser(GenerationOptions(repetition_penalty=2.0), seen=[4])
    logits = torch.tensor([1.0, 1.1, 1.2, 1.3, 2.0])
    assert [chooser.choose(logits) for _ in range(5)] == [3, 2, 1, 0, 4]


def test_log_probabilities_are_those_of_the_model_whatever_is_drawn(loaded):
    prompts, images = cases(loaded)
    options = GenerationOptions(
        8, 8, temperature=1.7, top_k=30, repetition_penalty=1.3, seed=5, logprobs=True
    )
    (one,) = Generator(loaded).complete([Request(prompts[2], images[2], options)])
    assert one.logprobs is not None and len(one.logprobs) == len(one.token_ids) == 8
    (whole,) = Generator(loaded).log_likelihoods([prompts[2]], [one.token_ids], [images[2]])
    assert whole.total == pytest.approx(sum(one.logprobs), abs=1e-4)


def test_text_ends_before_a_stop_string(loaded):
    prompts, images = cases(loaded)
    generator = Generator(loaded)
    whole = max(generator.generate(prompts, images, 12, 12), key=len)
    index = generator.generate(prompts, images, 12, 12).index(whole)
    stop = whole[len(whole) // 2 :][:3]
    options = GenerationOptions(12, 12, stop=["not in it", stop])
    request = Request(prompts[index], images[index], options)
    (one,) = generator.complete([request])
    assert one.text == whole[: whole.index(stop)].strip() and one.finish_reason == "stop"
    assert len(one.token_ids) < 12
    pieces = [*generator.stream(request)]
    assert "".join(token.text for token in pieces).strip() == one.text
    assert [token.finish_reason for token in pieces][-1] == "stop"


def test_streamed_text_is_the_whole_answer(loaded):
    prompts, images = cases(loaded)
    generator = Generator(loaded)
    for prompt, row in zip(prompts[:6], images[:6], strict=True):
        request = Request(prompt, row, GenerationOptions(12))
        tokens = [*generator.stream(request)]
        (whole,) = generator.complete([request])
        assert "".join(token.text for token in tokens).strip() == whole.text
        assert tokens[-1].finish_reason == whole.finish_reason
        assert [t.token_id for t in tokens if t.token_id is not None] == whole.token_ids


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_new_tokens": 0}, {"min_new_tokens": -1}, {"temperature": -0.1}, {"top_p": 0.0},
        {"top_p": 1.5}, {"top_k": -1}, {"repetition_penalty": 0.0}, {"beams": 0},
        {"temperature": float("nan")}, {"length_penalty": float("inf")}, {"stop": "text"},
        {"length_penalty": 1000.0}, {"stop": [""]}, {"beams": 2, "temperature": 1.0},
    ],
)  # fmt: skip
def test_options_out_of_range_are_named(wrong):
    with pytest.raises(InferenceError, match=next(iter(wrong))):
        dataclasses.replace(GenerationOptions(), **wrong)


@pytest.mark.parametrize("temperature", [1e-300, 1e-40, 1e-6])
def test_temperatures_near_zero_are_greedy(loaded, temperature):
    prompts, images = cases(loaded)
    requests = [
        Request(p, i, GenerationOptions(8, temperature=temperature))
        for p, i in zip(prompts, images, strict=True)
    ]
    found = [one.token_ids for one in Generator(loaded).complete(requests)]
    assert found == Generator(loaded).generate_ids(prompts, images, 8)
