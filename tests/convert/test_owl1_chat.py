"""Exports of version 1 are asked in the ids of their training and of the engine, under every
tokenisation."""

import random
from typing import get_args

import generated_conversations
import pytest
from exported import offline
from paths import DATA
from transformers import AutoProcessor

from megatron_owl2.config.templates import Tokenization, template_of
from megatron_owl2.convert.hf_config import read_model
from megatron_owl2.convert.hf_weights import export_hf
from megatron_owl2.convert.sources import from_released
from megatron_owl2.data.conversation import asking_ids, build_sample
from megatron_owl2.data.image_tokens import expand_placeholders
from megatron_owl2.data.shards.records import Record
from megatron_owl2.mcore import setup

pytestmark = pytest.mark.slow

COUNT = 150  # conversations for each tokenisation and tokenizer
OFFICIAL = DATA / "official_v1_tiny" / "hf_ckpt"


@pytest.fixture(scope="module", autouse=True)
def without_network(tmp_path_factory):
    yield from offline(tmp_path_factory.getbasetemp() / "modules")
    setup.shutdown()


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    return generated_conversations.tokenizers(tmp_path_factory.mktemp("tokenizers"))


@pytest.fixture(scope="module", params=get_args(Tokenization))
def exports(request, tokenizers, tmp_path_factory):
    """A tokenisation, and for each tokenizer its export by a model that has it."""
    folder, source = tmp_path_factory.mktemp(request.param), from_released(OFFICIAL)
    source.config.model.tokenization = request.param
    for name, tokenizer in tokenizers.items():
        given = {"tokenizer": tokenizer.path, "layout": "owl1"}
        export_hf(source.tensors, source.config.model, folder / name, **given)
    assert read_model(folder / "plain") == source.config.model
    return request.param, folder


def media_told_apart(ids):
    """Ids with 0 at the rows of images, and which rows these are, as samples have them."""
    return [max(i, 0) for i in ids], [int(i < 0) for i in ids]


@pytest.mark.parametrize("name", ["plain", "crossing"])
def test_processor_engine_and_training_have_the_same_ids(exports, tokenizers, name):
    tokenization, folder = exports
    template, tokenizer = template_of("owl1", tokenization), tokenizers[name]
    processor = AutoProcessor.from_pretrained(folder / name, trust_remote_code=True)
    chance, rows = random.Random(5), read_model(folder / name).tokens_per_image
    for record in generated_conversations.records(41, COUNT):
        messages = generated_conversations.messages_of(record, chance)
        asked = processor.apply_chat_template(
            messages[:-1], tokenize=True, add_generation_prompt=True
        )[0].tolist()
        answers = [turn.answer for turn in record.turns]
        ids = asking_ids(list(record.questions()), answers[:-1], tokenizer, template, record.system)
        row = expand_placeholders(ids, rows)
        expected = row.tokens.tolist(), row.modality.tolist()
        assert media_told_apart(asked) == expected, record
        if tokenization != "official_inference":
            whole = processor.apply_chat_template(messages, tokenize=True)[0].tolist()
            compare_with_training(whole, record, tokenizer, rows, template)


def compare_with_training(whole, record: Record, tokenizer, rows, template):
    sample = build_sample(record, tokenizer, rows, 10_000, template)
    tokens, modality = media_told_apart(whole)
    if template.tokenization == "official_train":  # what nothing is learnt behind is left out there
        tokens, modality = tokens[: sample.length], modality[: sample.length]
    assert tokens == sample.tokens.tolist(), record
    assert modality == sample.modality.tolist(), record
