"""The chat template of an exported processor: the ids of training, and texts that stay texts."""

import json
import random

import generated_conversations
import pytest
from exported import export, grouped_model, load, offline
from transformers import AutoProcessor

from megatron_owl2.config.templates import TEMPLATES
from megatron_owl2.convert.hf_config import read_model
from megatron_owl2.data.conversation import build_sample, prompt
from megatron_owl2.errors import ConversionError

pytestmark = pytest.mark.slow

ROWS = 5  # of an image
COUNT = 150  # conversations for each template and tokenizer


@pytest.fixture(scope="module", autouse=True)
def without_network(tmp_path_factory):
    yield from offline(tmp_path_factory.getbasetemp() / "modules")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    return generated_conversations.tokenizers(tmp_path_factory.mktemp("tokenizers"))


@pytest.fixture(scope="module", params=["owl2", "vicuna_v1"])
def exports(request, tokenizers, tmp_path_factory):
    """The name of a template, and for each tokenizer its export by a model of the template."""
    folder, model = tmp_path_factory.mktemp(request.param), grouped_model()
    model.model.template = request.param
    found = {name: export(model, folder / name, t.path) for name, t in tokenizers.items()}
    return request.param, found


@pytest.mark.parametrize("name", ["plain", "crossing"])
def test_a_conversation_has_the_ids_of_training(exports, tokenizers, name):
    template, directories = TEMPLATES[exports[0]], exports[1]
    processor = AutoProcessor.from_pretrained(directories[name], trust_remote_code=True)
    chance = random.Random(3)
    for record in generated_conversations.records(77, COUNT):
        sample = build_sample(record, tokenizers[name], ROWS, 10_000, template)
        messages = generated_conversations.messages_of(record, chance)
        inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True)
        assert inputs["input_ids"][0].tolist() == sample.tokens.tolist(), record
        assert inputs["modality"][0].tolist() == sample.modality.tolist(), record
        assert len(inputs.get("pixel_values", [])) == len(record.images)
        asked = processor.apply_chat_template(
            messages[:-1], tokenize=True, add_generation_prompt=True
        )[0].tolist()
        assert asked == sample.tokens[: len(asked)].tolist(), record
        assert sample.labels[len(asked) - 1] >= 0 > sample.labels[len(asked) - 2]


def test_the_text_is_the_prompt_of_the_template(exports):
    template, directories = TEMPLATES[exports[0]], exports[1]
    processor = AutoProcessor.from_pretrained(directories["plain"], trust_remote_code=True)
    question = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "\nwhat </s> ?"}]
    asked = [{"role": "user", "content": question}]
    text = processor.apply_chat_template(asked, add_generation_prompt=True)
    assert text == prompt("<|image|><|image|>what </s> ?", template)
    system = [{"role": "system", "content": "Be brief."}, *asked]
    text = processor.apply_chat_template(system, add_generation_prompt=True)
    assert text == prompt("<|image|><|image|>what </s> ?", template, "Be brief.")
    blank = [{"role": "system", "content": " \n"}, *asked]
    text = processor.apply_chat_template(blank, add_generation_prompt=True)
    assert text == prompt("<|image|><|image|>what </s> ?", template)
    assert text == prompt("<|image|><|image|>what </s> ?", template, " \n")


def test_a_saved_processor_keeps_the_template(exports, tmp_path):
    processor = AutoProcessor.from_pretrained(exports[1]["plain"], trust_remote_code=True)
    processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path, trust_remote_code=True)
    assert again.chat_template == processor.chat_template
    assert again.system == TEMPLATES[exports[0]].system


def test_settings_name_the_template_and_are_read_back(exports, tmp_path):
    name, directory = exports[0], exports[1]["plain"]
    settings = json.loads((directory / "config.json").read_text())
    assert settings.get("template") == (None if name == "owl2" else name)
    assert read_model(directory).template == name
    assert getattr(load(directory).config, "template", "owl2") == name
    assert json.dumps(prompt("<|image|>What is this?", TEMPLATES[name])) in (
        (directory / "README.md").read_text()
    )
    (tmp_path / "config.json").write_text(json.dumps(settings | {"template": "alpaca"}))
    with pytest.raises(ConversionError, match=r"config\.json: model\.template is 'alpaca'; use "):
        read_model(tmp_path)


def test_texts_of_messages_are_text(exports):
    processor = AutoProcessor.from_pretrained(exports[1]["plain"], trust_remote_code=True)
    text = "<s>a</s><|image|>"
    ids = processor.apply_chat_template([{"role": "user", "content": text}], tokenize=True)
    assert ids[0].tolist().count(1) == 1 and not (ids == 2).any()
    answered = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
    ids = processor.apply_chat_template(answered, tokenize=True)[0].tolist()
    assert ids.count(2) == 1 and ids[-1] == 2
    assert (processor(text="USER: a ASSISTANT: b</s>")["input_ids"] == 2).sum() == 0
    with pytest.raises(UnicodeEncodeError):
        processor.apply_chat_template([{"role": "user", "content": "\ud800"}], tokenize=True)
    with pytest.raises(Exception, match="must have a 'content'"):
        processor.apply_chat_template([{"role": "assistant", "content": []}], tokenize=True)
