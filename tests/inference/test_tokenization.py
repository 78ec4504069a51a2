"""The rules of tokenisation of a model: whatever asks it makes the same ids of a conversation."""

import asyncio
import json
from pathlib import Path

import pytest

from megatron_owl2.config.schema import ModelConfig
from megatron_owl2.data.conversation import asking_ids, prompt
from megatron_owl2.data.tokenizer import Tokenizer
from megatron_owl2.evaluation import likelihood
from megatron_owl2.evaluation.likelihood import Candidates
from megatron_owl2.inference.api import InferenceModel
from megatron_owl2.inference.engine import Generator
from megatron_owl2.inference.likelihood import LogLikelihood
from megatron_owl2.inference.loading import LoadedModel
from megatron_owl2.inference.messages import from_messages
from megatron_owl2.serving.limits import Limits
from megatron_owl2.serving.request_builder import RequestBuilder

RECORDED = Path(__file__).parents[1] / "data" / "official_v1_tiny"
TOKENIZER = Tokenizer(RECORDED / "hf_ckpt" / "tokenizer.model")
QUESTION = "What is in the picture?"
ASKED = [{"role": "user", "content": [{"type": "text", "text": QUESTION}]}]
# `turns` ends in the colon, which the answer's own space follows; the others in a space.
ENDS = {"turns": "I:", "official_train": "I: ", "official_inference": "I: "}


@pytest.fixture(params=ENDS)
def loaded(request) -> LoadedModel:
    """A model of these rules, of which only its settings are read."""
    config = ModelConfig(template="owl1", tokenization=request.param)
    return LoadedModel(None, config, TOKENIZER)  # type: ignore[arg-type]


def expected(loaded: LoadedModel) -> list[int]:
    ids = asking_ids([[QUESTION]], [], TOKENIZER, loaded.config.conversation)
    text = TOKENIZER.decode(ids)
    assert text.endswith(ENDS[loaded.config.tokenization])
    return ids


def test_the_rules_differ_in_their_ids():
    rows = {
        rules: asking_ids(
            [[QUESTION]],
            [],
            TOKENIZER,
            ModelConfig(template="owl1", tokenization=rules).conversation,  # type: ignore[arg-type]
        )
        for rules in ENDS
    }
    assert len({tuple(ids) for ids in rows.values()}) == 3
    assert rows["official_inference"][:-1] == rows["turns"]  # without an image or a turn before


def test_the_api_asks_by_the_rules_of_the_model(loaded):
    assert InferenceModel(loaded).prompt_ids(from_messages(ASKED)) == expected(loaded)


def test_the_server_asks_by_the_rules_of_the_model(loaded):
    builder = RequestBuilder(loaded, "owl", Limits(), None)
    try:
        job = asyncio.run(builder.build(json.dumps({"messages": ASKED}).encode()))
    finally:
        builder.close()
    assert job.request.prompt == expected(loaded)


def test_prompts_in_text_follow_the_rules_of_the_model(loaded, monkeypatch):
    asked = []
    monkeypatch.setattr(Generator, "complete", lambda _, requests: asked.extend(requests) or [])
    text = prompt(QUESTION, loaded.config.conversation)
    Generator(loaded).generate([text], [[]], 4)
    assert [request.prompt for request in asked] == [expected(loaded)]


def test_likelihoods_follow_the_rules_of_the_model(loaded, monkeypatch):
    asked = []

    def scored(_, contexts, texts, images):
        asked.extend(zip(contexts, texts, strict=True))
        return [LogLikelihood(0.0, len(text), greedy=False) for text in texts]

    monkeypatch.setattr(Generator, "log_likelihoods", scored)
    candidates = Candidates(((QUESTION, "A bus."),), likelihood.total, in_template=True, ends=True)
    template = loaded.config.conversation
    pair = (candidates, [prompt(QUESTION, template)])
    likelihood.answers(Generator(loaded), [pair], [[]], template)
    answer = [*TOKENIZER.encode("A bus."), TOKENIZER.eos_id]
    assert asked == [(expected(loaded), answer)]
