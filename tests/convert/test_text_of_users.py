"""Text of users is text: the same ids from engine, processor, rendered prompts, pipeline and the
tokenizer for vLLM."""

import copy
import pickle
import sys

import pytest
from exported import export, grouped_model, load, offline
from generated_conversations import LOOK_ALIKES, tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoProcessor, pipeline
from transformers.pipelines.base import Chat

from megatron_owl2.config.templates import TEMPLATES
from megatron_owl2.data.conversation import asking_ids, prompt_ids
from megatron_owl2.data.image_tokens import IMAGE_TOKEN_ID
from megatron_owl2.inference.messages import from_messages
from megatron_owl2.vllm_plugin.tokenizer import Owl2Tokenizer

ROWS = 5  # of an image
IMAGE = Image.new("RGB", (8, 6), "red")
WORDS = [
    *LOOK_ALIKES,
    "<|image|>",
    "<|image|>",
    "</s>",
    "red",
    " ",
    "\n",
    "é🦉",
    "top one",
    "\ufdd0",
]
PIECES = st.one_of(st.sampled_from(WORDS), st.text(max_size=3))
TEXTS = st.lists(PIECES, min_size=1, max_size=5).map("".join).filter(str.strip)


@pytest.fixture(scope="module", autouse=True)
def without_network(tmp_path_factory):
    yield from offline(tmp_path_factory.getbasetemp() / "modules")


@pytest.fixture(scope="module", params=["owl2", "vicuna_v1"])
def served(request, tmp_path_factory):
    """A template, its tokenizer, and of an export the pipeline and the tokenizer for vLLM."""
    folder, model = tmp_path_factory.mktemp(request.param), grouped_model()
    model.model.template = request.param
    tokenizer = tokenizers(folder)["crossing"]
    directory = export(model, folder / "hf", tokenizer.path)
    processor = AutoProcessor.from_pretrained(directory, trust_remote_code=True)
    answering = pipeline("image-text-to-text", model=load(directory), processor=processor)
    of_vllm = Owl2Tokenizer.from_pretrained(directory)
    return TEMPLATES[request.param], tokenizer, answering, of_vllm


@st.composite
def conversations(draw) -> list[dict]:
    """Messages up to a question, with images anywhere in the questions."""
    messages = [{"role": "system", "content": draw(TEXTS)}] if draw(st.booleans()) else []
    for number in range(turns := draw(st.integers(1, 2))):
        parts = [{"type": "text", "text": text} for text in draw(st.lists(TEXTS, max_size=2))]
        for _ in range(draw(st.integers(0, 2)) if parts else 1):
            parts.insert(draw(st.integers(0, len(parts))), {"type": "image", "image": IMAGE})
        content = draw(TEXTS) if draw(st.booleans()) else parts
        messages.append({"role": "user", "content": content})
        if number < turns - 1:
            messages.append({"role": "assistant", "content": draw(TEXTS)})
    return messages


def expanded(ids: list[int], placeholder: int) -> list[int]:
    return sum(([0] * ROWS if token == placeholder else [token] for token in ids), [])


def of_engine(messages: list[dict], template, tokenizer) -> list[int]:
    asked = from_messages(messages)
    ids = asking_ids(asked.questions, asked.answers, tokenizer, template, asked.system)
    assert ids.count(tokenizer.eos_id) == len(asked.answers)
    assert ids.count(IMAGE_TOKEN_ID) == len(asked.images)
    return expanded(ids, IMAGE_TOKEN_ID)


@given(conversations())
@settings(max_examples=150)
def test_messages_have_the_ids_of_the_engine(served, messages):
    template, tokenizer, answering, of_vllm = served
    processor, wanted = answering.processor, of_engine(messages, template, tokenizer)
    before = copy.deepcopy(messages)
    inputs = processor.apply_chat_template(
        messages, tokenize=True, add_generation_prompt=True, return_dict=True
    )
    assert inputs["input_ids"].tolist() == [wanted]
    piped = answering.preprocess(Chat(messages))
    assert piped["input_ids"].tolist() == [wanted]
    rendered = processor.apply_chat_template(messages, add_generation_prompt=True)
    rendered.encode()  # nothing in it but characters
    images = from_messages(messages).images
    again = processor(text=[pickle.loads(pickle.dumps(rendered))], images=images)
    assert again["input_ids"].tolist() == [wanted]
    chat = of_vllm.apply_chat_template(messages, add_generation_prompt=True)
    assert expanded(chat, of_vllm.placeholder) == wanted
    assert before == messages


@given(TEXTS)
@settings(max_examples=150)
def test_a_plain_string_has_places_of_images_and_no_other_control_token(served, text):
    _, tokenizer, answering, of_vllm = served
    images = [IMAGE] * text.count("<|image|>")
    wanted = expanded(prompt_ids(text, tokenizer), IMAGE_TOKEN_ID)
    assert expanded(of_vllm.encode(text), of_vllm.placeholder) == wanted
    assert answering.processor(text=text, images=images)["input_ids"].tolist() == [wanted]
    inputs = {"text": text, "images": images} if images else text
    assert answering.preprocess(inputs)["input_ids"].tolist() == [wanted]
    assert tokenizer.eos_id not in wanted


def test_a_changed_prompt_is_a_plain_string(served, monkeypatch):
    processor, said = served[2].processor, []
    logger = sys.modules[type(processor).__module__]._LOGGER
    monkeypatch.setattr(logger, "warning_once", said.append)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b</s>"}]
    rendered = processor.apply_chat_template([turns, turns])[0]
    assert rendered.endswith("USER: a ASSISTANT: b</s></s>")
    assert (processor(text=rendered)["input_ids"] == 2).sum() == 1
    assert not said
    assert (processor(text=rendered.strip())["input_ids"] == 2).sum() == 0
    assert "a text spells </s>, which is text there" in said[0]
    with pytest.raises(UnicodeEncodeError):  # no mark comes from outside
        processor(text="b\ud801</s>")
