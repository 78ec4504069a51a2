"""Greedy answers: the same alone and in a batch, with and without a cache, as the official code."""

import json

import pytest
import torch
from generation import SIZE, build, cases, recompute
from hf_dirs import export
from id_tokenizer import IdTokenizer
from paths import DATA
from safetensors.torch import load_file

from megatron_owl2.config.schema import (
    AbstractorConfig,
    DecoderConfig,
    ModelConfig,
    RunConfig,
    VisionConfig,
)
from megatron_owl2.convert.hf_config import read_model
from megatron_owl2.convert.hf_weights import load_hf_weights
from megatron_owl2.data.conversation import prompt
from megatron_owl2.data.image_tokens import IMAGE_TOKEN_ID
from megatron_owl2.errors import InferenceError
from megatron_owl2.inference.engine import Generator
from megatron_owl2.inference.loading import LoadedModel, load_model
from megatron_owl2.inference.model_runner import ModelRunner
from megatron_owl2.inference.options import GenerationOptions
from megatron_owl2.inference.requests import Request
from megatron_owl2.training.checkpoint.manager import CheckpointManager

OFFICIAL = DATA / "official_tiny"


@pytest.fixture(scope="module")
def expected(loaded):
    return [recompute(loaded, p, i, 12) for p, i in zip(*cases(loaded), strict=True)]


def test_cached_answers_equal_full_recomputation(loaded, expected):
    generator = Generator(loaded)
    for prompt_ids, images, answer in zip(*cases(loaded), expected, strict=True):
        assert generator.generate_ids([prompt_ids], [images], 12) == [answer]
    lengths = {len(answer) for answer in expected}
    assert len(lengths) > 2 and 12 in lengths  # rows end at different steps, some not at all


def test_a_batch_gives_the_answers_of_its_rows_alone(loaded, expected):
    prompts, images = cases(loaded)
    assert len({len(p) for p in prompts}) > 3
    assert Generator(loaded).generate_ids(prompts, images, 12) == expected
    shuffled = [7, 2, 11, 5, 0]
    batch = [[rows[i] for i in shuffled] for rows in (prompts, images, expected)]
    assert Generator(loaded).generate_ids(batch[0], batch[1], 12) == batch[2]


def test_other_prompts_change_no_log_probability(loaded):
    prompts, images = cases(loaded)
    options = GenerationOptions(6, 6, logprobs=True)
    requests = [Request(p, i, options) for p, i in zip(prompts, images, strict=True)]
    generator = Generator(loaded)
    together = generator.complete(requests)
    alone = [generator.complete([request])[0] for request in requests]
    assert [one.token_ids for one in together] == [one.token_ids for one in alone]
    logprobs = [torch.tensor([one.logprobs for one in these]) for these in (together, alone)]
    torch.testing.assert_close(*logprobs, rtol=1e-4, atol=1e-4)


def test_the_order_of_images_matters_and_follows_the_prompt(loaded):
    first, second = cases(loaded)[1][2]
    prompt_ids = [1, 50, IMAGE_TOKEN_ID, 60, IMAGE_TOKEN_ID, 70]
    generator = Generator(loaded)
    batch = [[first, second], [second, first], [first, first]]
    together = generator.generate_ids([prompt_ids] * 3, batch, 8)
    assert together == [recompute(loaded, prompt_ids, images, 8) for images in batch]
    assert len({tuple(answer) for answer in together}) == 3


def test_an_image_shared_by_prompts_is_encoded_once(loaded, monkeypatch):
    encoded = []
    encode = loaded.model.encode_images
    monkeypatch.setattr(
        loaded.model,
        "encode_images",
        lambda image, *more, **named: encoded.append(len(image)) or encode(image, *more, **named),
    )
    first, second = cases(loaded)[1][2]
    prompts = [[1, IMAGE_TOKEN_ID, 40 + i] for i in range(5)]
    answers = Generator(loaded).generate_ids(prompts, [[first]] * 3 + [[second]] * 2, 4)
    assert encoded == [2]
    assert answers[4] == recompute(loaded, prompts[4], [second], 4)


def test_min_and_max_new_tokens(loaded, expected):
    prompts, images = cases(loaded)
    generator = Generator(loaded)
    assert generator.generate_ids(prompts, images, 3) == [answer[:3] for answer in expected]
    longer = generator.generate_ids(prompts, images, 12, min_new_tokens=9)
    assert min(map(len, expected)) < 9 <= min(map(len, longer))
    short = min(range(len(prompts)), key=lambda i: len(expected[i]))
    assert longer[short] == recompute(loaded, prompts[short], images[short], 12, 9)


def test_generation_stops_when_every_row_has_ended(loaded, monkeypatch):
    calls = []
    decode = ModelRunner.decode

    def ends_at_once(runner, *args):
        calls.append(1)
        logits = decode(runner, *args)
        logits[:, loaded.tokenizer.eos_id] = logits.max() + 1
        return logits

    monkeypatch.setattr(ModelRunner, "decode", ends_at_once)
    prompts, images = cases(loaded)
    answers = Generator(loaded).generate_ids(prompts, images, 12, 2)
    assert all(len(answer) == 2 for answer in answers)
    assert len(calls) == 2  # the first token comes with the prompts


def test_text_in_text_out(loaded):
    question, (image,) = "what color is the <|image|> one ?", cases(loaded)[1][1]
    generator = Generator(loaded)
    answers = generator.generate([prompt(question), prompt("hello")], [[image], []], 8)
    assert answers[0] == generator.generate([prompt(question)], [[image]], 8)[0]
    assert all(isinstance(answer, str) and answer == answer.strip() for answer in answers)
    assert generator.generate([], [], 8) == []


def test_a_vocabulary_larger_than_the_tokenizer_is_answered_in_its_pieces(tokenizer):
    """Vocabularies are padded by their makers; rows without a piece have no text."""
    torch.manual_seed(3)
    model = ModelConfig(
        vision=VisionConfig(SIZE, 14, 32, 1, 4, 64),
        abstractor=AbstractorConfig(4, 1, 4, 64),
        decoder=DecoderConfig(2048, 32, 1, 4, 2, 64, max_positions=64),
    )
    generator = Generator(LoadedModel(build(model), model, tokenizer))
    with torch.no_grad():  # the likeliest of all, were it in question
        generator.model.output_layer.weight[tokenizer.vocab_size :] *= 100
    prompt_ids = [1, 5, 6]
    (ids,) = generator.generate_ids([prompt_ids], [[]], 12)
    assert max(ids) < tokenizer.vocab_size
    assert generator.generate([prompt_ids], [[]], 12) == [tokenizer.decode(ids).strip()]
    (one,) = generator.complete([Request(prompt_ids, [], GenerationOptions(12, logprobs=True))])
    (likelihood,) = generator.log_likelihoods([prompt_ids], [one.token_ids])
    assert one.logprobs is not None and likelihood.greedy
    assert likelihood.total == pytest.approx(sum(one.logprobs), abs=1e-3)
    with pytest.raises(InferenceError, match=f"continuation 1 has the id {tokenizer.vocab_size}"):
        generator.log_likelihoods([prompt_ids], [[5, tokenizer.vocab_size]])


def test_logits_that_are_no_numbers_are_no_answer(tokenizer):
    model = ModelConfig(
        vision=VisionConfig(SIZE, 14, 32, 1, 4, 64),
        abstractor=AbstractorConfig(4, 1, 4, 64),
        decoder=DecoderConfig(320, 32, 1, 4, 2, 64, max_positions=64),
    )
    owl = build(model)
    with torch.no_grad():
        owl.output_layer.weight[7, 3] = float("nan")
    generator = Generator(LoadedModel(owl, model, tokenizer))
    for ask in (
        lambda: generator.generate(["what"], [[]], 4),
        lambda: generator.log_likelihoods([[1, 5]], [[6]]),
        lambda: generator.complete([Request([1, 5], [], GenerationOptions(4, beams=2))]),
    ):
        with pytest.raises(InferenceError, match="logits are not numbers"):
            ask()


def test_mistakes_are_named(loaded):
    generator = Generator(loaded)
    image = torch.zeros(3, SIZE, SIZE, dtype=torch.uint8)
    with pytest.raises(InferenceError, match="prompt 2 has 1 placeholders .* but 0 images"):
        generator.generate_ids([[1, 5], [1, IMAGE_TOKEN_ID]], [[], []], 4)
    with pytest.raises(InferenceError, match="prompt 1 has 1 placeholders .* but 2 images"):
        generator.generate_ids([[1, IMAGE_TOKEN_ID]], [[image, image]], 4)
    with pytest.raises(InferenceError, match=r"\[3, 28, 28\]"):
        generator.generate_ids([[1, IMAGE_TOKEN_ID]], [[image[:, :14]]], 4)
    with pytest.raises(InferenceError, match="prompt 1 has the id 320, .* from 0 to 319"):
        generator.generate_ids([[1, 320]], [[]], 4)
    with pytest.raises(InferenceError, match="prompt 1 is empty"):
        generator.generate_ids([[]], [[]], 4)
    with pytest.raises(InferenceError, match="2 prompts"):
        generator.generate_ids([[1], [1]], [[]], 4)
    with pytest.raises(InferenceError, match="at least 1"):
        generator.generate_ids([[1]], [[]], 0)
    with pytest.raises(InferenceError, match="not a directory"):
        load_model("no/such/place")


def test_the_last_position_is_used_and_no_more(loaded):
    generator = Generator(loaded)
    prompt_ids = [1] + [9] * 49 + [IMAGE_TOKEN_ID]  # 50 + 5 positions of 64
    images = [torch.zeros(3, SIZE, SIZE, dtype=torch.uint8)]
    answers = generator.generate_ids([prompt_ids], [images], 10, min_new_tokens=10)
    assert len(answers[0]) == 10  # the tenth is never read, so 9 positions are enough
    with pytest.raises(InferenceError, match="takes 55 positions .* at most 10 new tokens"):
        generator.generate_ids([prompt_ids], [images], 11)


def test_a_checkpoint_and_its_export_answer_like_the_model(loaded, tokenizer, tmp_path):
    config = RunConfig(model=loaded.config)
    config.data.tokenizer = str(tokenizer.path)
    config.parallel.tensor = 2  # of the run that wrote it; the loader takes what it has
    run = tmp_path / "run"
    config.train.async_save = False
    CheckpointManager(run, config.train).save(3, [loaded.model], config)
    prompts, images = cases(loaded)
    answers = Generator(loaded).generate_ids(prompts, images, 8)
    export(loaded.model, tmp_path / "hf", tokenizer=tokenizer.path)
    step = run / "checkpoints" / "iter_0000003"
    for path in (run, run / "checkpoints", step, tmp_path / "hf"):
        again = load_model(path)
        assert Generator(again).generate_ids(prompts, images, 8) == answers
        assert again.tokenizer.encode("what color") == tokenizer.encode("what color")
    half = load_model(run, "bf16")
    assert half.model.output_layer.weight.dtype == torch.bfloat16
    assert len(Generator(half).generate_ids(prompts, images, 8)) == len(prompts)
    (step / "tokenizer.model").unlink()
    with pytest.raises(InferenceError, match="has no tokenizer.model"):
        load_model(run)


def test_greedy_ids_of_the_official_model():
    config = read_model(OFFICIAL / "hf_ckpt")
    model = build(config)
    load_hf_weights(OFFICIAL / "hf_ckpt", model)
    reference = load_file(OFFICIAL / "reference.safetensors")
    meta = json.loads((OFFICIAL / "meta.json").read_text())
    names = list(meta["generation"])
    prompts = [meta["generation"][name]["prompt_ids"] for name in names]
    images = [
        [reference["batch/images"][i] for i in meta["batch_image_slots"][name]]
        if name != "text_only"
        else []
        for name in names
    ]
    wanted = [meta["generation"][name]["new_ids"] for name in names]
    generator = Generator(LoadedModel(model, config, IdTokenizer(config.decoder.vocab_size)))
    assert generator.generate_ids(prompts, images, 16) == wanted
    for case in zip(prompts, images, wanted, strict=True):
        assert generator.generate_ids([case[0]], [case[1]], 16) == [case[2]]
