"""Beam search gives the hypotheses of transformers' generate on the exported model."""

import pytest
import torch
from exported import batch, export, grouped_model, load, offline
from hf_dirs import small_tokenizer

from megatron_owl2.data.image_tokens import IMAGE_TOKEN_ID
from megatron_owl2.inference.engine import Generator
from megatron_owl2.inference.loading import load_model
from megatron_owl2.inference.options import GenerationOptions
from megatron_owl2.inference.requests import Request

PROMPTS = [[1, 40, IMAGE_TOKEN_ID, 50, 60, 70], [1, 9, 8, 7, 6], [1, 200, 100, IMAGE_TOKEN_ID]]


@pytest.fixture(scope="module", autouse=True)
def hub(tmp_path_factory):
    yield from offline(tmp_path_factory.getbasetemp() / "modules")


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("beams")
    directory = export(grouped_model(), folder / "hf", tokenizer=small_tokenizer(folder))
    return load(directory).eval(), Generator(load_model(directory))


@pytest.mark.parametrize("beams", [2, 3, 5])
@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0, -1.0])
def test_hypotheses_are_those_of_transformers(both, beams, penalty):
    theirs, ours = both
    images = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(4))
    rows = [[images[0]], [], [images[1]]]
    lengths = set()
    for prompt, row in zip(PROMPTS, rows, strict=True):
        for least, most in ((1, 12), (4, 8)):
            inputs = batch(ours.config.tokens_per_image, [prompt], [row])
            with torch.inference_mode():
                ids = theirs.generate(
                    **{key: value for key, value in inputs.items() if value is not None},
                    num_beams=beams,
                    length_penalty=penalty,
                    min_new_tokens=least,
                    max_new_tokens=most,
                    do_sample=False,
                    pad_token_id=0,
                )
            wanted = ids[0, inputs["input_ids"].shape[1] :].tolist()
            wanted = wanted[: wanted.index(2)] if 2 in wanted else wanted
            options = GenerationOptions(most, least, beams=beams, length_penalty=penalty)
            (found,) = ours.complete([Request(prompt, row, options)])
            assert found.token_ids == wanted
            lengths.add(len(wanted))
    assert len(lengths) > 1


def test_a_stop_string_cuts_ids_and_text(both):
    _, ours = both
    prompt = [1, 9, 8, 7, 6]
    (whole,) = ours.complete([Request(prompt, [], GenerationOptions(8, 8, beams=3))])
    stop = whole.text[len(whole.text) // 2 :][:2]
    options = GenerationOptions(8, 8, beams=3, stop=[stop])
    (cut,) = ours.complete([Request(prompt, [], options)])
    assert cut.text == whole.text[: whole.text.index(stop)].strip()
    assert cut.finish_reason == "stop" and len(cut.token_ids) < 8
    assert whole.token_ids[: len(cut.token_ids)] == cut.token_ids


def test_beams_find_a_likelier_answer_than_the_greedy_one(both):
    _, ours = both
    gains = []
    for prompt in ([1, 9, 8, 7, 6], [1, 50, 51], [1, 33, 5, 80]):
        answers = ours.complete(
            [Request(prompt, [], GenerationOptions(6, 6, beams=beams)) for beams in (1, 8)]
        )
        totals = ours.log_likelihoods([prompt] * 2, [one.token_ids for one in answers])
        gains.append(totals[1].total - totals[0].total)
    assert min(gains) > -1e-4 and max(gains) > 1e-3
