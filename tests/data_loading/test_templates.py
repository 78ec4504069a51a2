"""Text of the templates to the byte, and the pieces of it that `turns` tokenises alone."""

from pathlib import Path

import pytest

from megatron_owl2.config.schema import ModelConfig
from megatron_owl2.config.templates import OWL2, TEMPLATES, check_trainable, template_of
from megatron_owl2.data.conversation import asking_ids, build_sample, prompt
from megatron_owl2.data.image_tokens import IGNORE_INDEX
from megatron_owl2.data.shards.records import Record, Turn
from megatron_owl2.data.tokenizer import Tokenizer
from megatron_owl2.errors import ConfigError

RECORDED = Path(__file__).parents[1] / "data" / "official_v1_tiny"
TOKENIZER = Tokenizer(RECORDED / "hf_ckpt" / "tokenizer.model")
OWL1 = TEMPLATES["owl1"]
SYSTEM = (
    "The following is a conversation between a curious human and AI assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)


@pytest.mark.parametrize(
    ("question", "system", "text"),
    [
        ("What ?", "", f"{SYSTEM}\nHuman: What ?\nAI:"),
        ("<|image|> What ?\n", "", f"{SYSTEM}\nHuman: <|image|>\nHuman: What ?\nAI:"),
        (
            "<|image|><|image|>\nWhat ?",
            "Be kind.",
            "Be kind.\nHuman: <|image|>\nHuman: <|image|>\nHuman: What ?\nAI:",
        ),
        ("See <|image|> and", "", f"{SYSTEM}\nHuman: See <|image|> and\nAI:"),
        (
            "<|image|>like <|image|><|image|>?",
            " ",
            f"{SYSTEM}\nHuman: <|image|>\nHuman: like <|image|><|image|>?\nAI:",
        ),
    ],
)
def test_the_text_of_mplug_owl(question, system, text):
    assert prompt(question, OWL1, system) == text
    for rules in ("official_train", "official_inference"):
        assert prompt(question, template_of("owl1", rules), system) == f"{text} "


def test_the_texts_of_mplug_owl2_are_the_same_as_ever():
    asked = "<|image|> <|image|> What ? "
    assert prompt(asked) == prompt(asked, OWL2) == "USER: <|image|><|image|>What ? ASSISTANT:"
    vicuna = TEMPLATES["vicuna_v1"]
    assert prompt(asked, vicuna) == (
        "A chat between a curious user and an artificial intelligence assistant. The assistant "
        "gives helpful, detailed, and polite answers to the user's questions. USER: "
        "<|image|><|image|>\nWhat ? ASSISTANT:"
    )


def test_turns_tokenise_questions_and_answers_alone():
    image = b"\xff\xd8\xff"
    turns = (Turn("<|image|>What is it ?", "A bus."), Turn("Where ?", "Here."))
    record = Record("k", images=(image,), turns=turns)
    sample = build_sample(record, TOKENIZER, 1, 500, OWL1)
    pieces = [f"{SYSTEM}\nHuman: ", "\nHuman: What is it ?\nAI:", "A bus."]
    pieces += ["\nHuman: Where ?\nAI:", "Here."]
    before, first, one, second, two = (TOKENIZER.encode(piece) for piece in pieces)
    bos, eos = TOKENIZER.bos_id, TOKENIZER.eos_id
    assert sample.tokens.tolist() == [bos, *before, 0, *first, *one, eos, *second, *two, eos]
    learnt = sample.labels[sample.labels != IGNORE_INDEX].tolist()
    assert learnt == [*one, eos, *two, eos]
    assert TOKENIZER.piece_bytes(one[0]).startswith(b" ")  # behind the colon, as it is asked
    asked = asking_ids(record.questions(), ["A bus."], TOKENIZER, OWL1)
    assert asked == [bos, *before, -200, *first, *one, eos, *second]


def test_rules_go_with_the_words_that_they_look_for():
    for name in ("owl2", "vicuna_v1"):
        for rules in ("official_train", "official_inference"):
            with pytest.raises(ConfigError, match=f"{rules} looks for the words of .* owl1, which"):
                template_of(name, rules)
    model = ModelConfig(template="owl1", tokenization="official_train")
    assert model.conversation == template_of("owl1", "official_train") != OWL1
    check_trainable(model.conversation)
    record = Record("k", turns=(Turn("a", "b"),))
    with pytest.raises(ConfigError, match="asks only"):
        build_sample(record, TOKENIZER, 1, 500, template_of("owl1", "official_inference"))
