"""Parity with the ids and masks of the released mPLUG-Owl, and what a run makes of its quirks."""

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_owl2.config.templates import template_of
from megatron_owl2.data.conversation import asking_ids, build_sample, measure, prompt, prompt_ids
from megatron_owl2.data.image_tokens import IGNORE_INDEX, IMAGE_TOKEN_ID, expand_placeholders
from megatron_owl2.data.released_tokenization import TrainingIds, training_ids_of_text
from megatron_owl2.data.shards.records import IMAGE_PLACEHOLDER, Record, Turn
from megatron_owl2.data.tokenizer import Tokenizer
from megatron_owl2.errors import BadSampleError

RECORDED = Path(__file__).parents[1] / "data" / "official_v1_tiny"
TOKENIZER = Tokenizer(RECORDED / "hf_ckpt" / "tokenizer.model")
TRAIN, INFER = template_of("owl1", "official_train"), template_of("owl1", "official_inference")
JPEG = b"\xff\xd8\xff"


def recorded(file: str) -> tuple[int, dict[str, dict]]:
    """Rows of an image, and the recorded samples by name."""
    tree = json.loads((RECORDED / file).read_text())
    return tree["tokens_per_image"], {row["name"]: row for row in tree["rows"]}


ROWS, CONVERSATIONS = recorded("conversations.json")
PROMPTS = recorded("prompts.json")[1]
WHOLE = [name for name, row in CONVERSATIONS.items() if "error" not in row]


def expanded(ids: list[int]) -> list[int]:
    """Ids in the form of the recordings: -1 for every row of an image."""
    return [each for token in ids for each in ([-1] * ROWS if token == IMAGE_TOKEN_ID else [token])]


def supervised(made: TrainingIds) -> list[int]:
    return [
        int(learnt)
        for token, learnt in zip(made.ids, made.supervised, strict=True)
        for _ in range(ROWS if token == IMAGE_TOKEN_ID else 1)
    ]


@pytest.mark.parametrize("name", WHOLE)
def test_training_ids_and_masks_are_the_recorded_ones(name):
    row = CONVERSATIONS[name]
    length = row["max_length"]
    made = training_ids_of_text(row["text"], TOKENIZER, ROWS, length)
    ids, learnt = expanded(made.ids), supervised(made)
    assert len(ids) == row["seq_length"]
    padding = [0] * (length + 1 - len(ids))
    assert ids + padding == row["input_ids"]
    assert (learnt + padding)[1:] == row["prompt_mask"] and learnt[0] == 0
    assert [int(token >= 0) for token in ids + padding][1:] == row["non_media_mask"]
    assert [int(i < len(ids) - 1) for i in range(length)] == row["non_padding_mask"]


def test_a_first_piece_that_does_not_fit_is_refused():
    row = CONVERSATIONS["first_piece_too_long"]
    assert "AssertionError" in row["error"]
    with pytest.raises(BadSampleError, match=r"longer than data\.sequence_length 40"):
        training_ids_of_text(row["text"], TOKENIZER, ROWS, row["max_length"])


@pytest.mark.parametrize("name", PROMPTS)
def test_inference_ids_are_the_recorded_ones(name):
    row = PROMPTS[name]
    text = row["text"].replace("<image>", IMAGE_PLACEHOLDER)
    assert expanded(prompt_ids(text, TOKENIZER, INFER)) == row["input_ids"]


def record_of(text: str) -> Record:
    """The record whose text this is, in the template's words."""
    opening, *turns = text.removeprefix(f"{TRAIN.system}\nHuman: ").split("\nAI: ")
    questions, answers = [opening], []
    for turn in turns:
        answer, _, question = turn.partition("\nHuman: ")
        answers.append(answer)
        questions += [question] if question else []
    marked = [
        question.replace("<image>\nHuman: ", "<image>").replace("<image>", IMAGE_PLACEHOLDER)
        for question in questions
    ]
    return Record(
        "k",
        images=(JPEG,) * text.count("<image>"),
        turns=tuple(Turn(q, a) for q, a in zip(marked, answers, strict=True)),
    )


IN_TEMPLATE = [
    *("text_single", "one_image", "two_images", "multi_turn", "text_multi_turn"),
    *("image_in_last_turn", "image_inside_the_question", "tag_inside_a_word"),
    *("answer_with_line_breaks", "answer_cut", "answer_cut_image", "answer_just_fits"),
]


@pytest.mark.parametrize("name", IN_TEMPLATE)
def test_samples_have_the_recorded_ids_targets_and_images(name):
    row = CONVERSATIONS[name]
    record, length = record_of(row["text"]), row["max_length"]
    sample = build_sample(record, TOKENIZER, ROWS, length, TRAIN, max_images=8)
    assert sample.length == min(row["seq_length"], length)
    ids = np.array(row["input_ids"])
    assert sample.tokens.tolist() == np.maximum(ids, 0)[: sample.length].tolist()
    assert sample.modality.tolist() == (ids == -1)[: sample.length].astype(int).tolist()
    masks = [np.array(row[f"{kind}_mask"]) for kind in ("prompt", "non_media", "non_padding")]
    targets = np.where(np.multiply.reduce(masks), ids[1:], IGNORE_INDEX)
    assert sample.labels.tolist() == targets[: sample.length].tolist()
    assert (targets[sample.length :] == IGNORE_INDEX).all()
    assert sample.image_count == len(record.images) == (ids == -1).sum() // ROWS
    assert sample.shortened == name.startswith("answer_cut")


@pytest.mark.parametrize("name", ["g_text", "g_one_image", "g_two_images", "g_multi_turn"])
def test_the_processors_ids_ask_for_answers(name):
    text = PROMPTS[name]["text"]
    record = record_of(text + "x")
    given = [turn.answer for turn in record.turns[:-1]]
    ids = asking_ids(record.questions(), given, TOKENIZER, INFER)
    assert expanded(ids) == PROMPTS[name]["input_ids"]
    if not given:
        written = prompt(record.turns[0].question, INFER)
        assert written.replace(IMAGE_PLACEHOLDER, "<image>") == text


def test_a_model_is_asked_as_it_was_trained():
    row = CONVERSATIONS["multi_turn"]
    record = record_of(row["text"])
    for turns in (1, 2):
        given = [turn.answer for turn in record.turns[: turns - 1]]
        ids = expanded(asking_ids(record.questions()[:turns], given, TOKENIZER, TRAIN))
        assert ids == row["input_ids"][: len(ids)]
        assert row["prompt_mask"][len(ids) - 2 : len(ids)] == [0, 1]  # the answer comes next
    text = prompt(record.turns[0].question, TRAIN)
    first = asking_ids(record.questions()[:1], [], TOKENIZER, TRAIN)
    assert prompt_ids(text, TOKENIZER, TRAIN) == first
    begun = prompt_ids(f"{text}A red", TOKENIZER, TRAIN)  # no EOS after what has only begun
    assert begun == [*first, *TOKENIZER.encode("A red")]


def test_an_image_that_does_not_fit_ends_a_sample_with_no_pixels_left_over():
    shown, lost = Turn("<|image|>first ?", "one"), Turn("<|image|>second ?", "two")
    record = Record("k", images=(JPEG, JPEG), turns=(shown, lost))
    whole = build_sample(record, TOKENIZER, ROWS, 500, TRAIN)
    assert whole.image_count == 2 and not whole.shortened
    ids, images = measure(record, TOKENIZER, TRAIN)
    assert whole.length == ids + images * ROWS
    second = int(np.flatnonzero(whole.modality)[ROWS])  # first row of the second image
    for length, most in ((second + ROWS - 2, 8), (second + ROWS + 1, 8), (500, 1)):
        sample = build_sample(record, TOKENIZER, ROWS, length, TRAIN, max_images=most)
        assert sample.image_count == 1 and sample.modality.sum() == ROWS and sample.shortened
        assert sample.labels[-2] == TOKENIZER.eos_id  # what no target reads is left out
        assert sample.tokens.tolist() == whole.tokens[: sample.length].tolist()


def test_the_last_target_needs_no_position_of_its_own():
    record = record_of(CONVERSATIONS["one_image"]["text"])
    ids, images = measure(record, TOKENIZER, TRAIN)
    whole = ids + images * ROWS
    assert whole == CONVERSATIONS["one_image"]["seq_length"]
    sample = build_sample(record, TOKENIZER, ROWS, whole - 1, TRAIN)
    assert sample.length == whole - 1 and not sample.shortened
    assert sample.labels[-1] == TOKENIZER.eos_id
    assert build_sample(record, TOKENIZER, ROWS, whole - 2, TRAIN).shortened
    assert build_sample(record, TOKENIZER, ROWS, whole, TRAIN).length == whole


@pytest.mark.parametrize(
    ("length", "most", "named"),
    [(60, 8, r"sequence_length 60"), (500, 0, r"images_per_row 0"), (25, 8, "text before the")],
)
def test_a_sample_without_a_target_is_bad(length, most, named):
    record = Record("k", images=(JPEG,), turns=(Turn("What is in the picture?", "A bus."),))
    with pytest.raises(BadSampleError, match=named):
        build_sample(record, TOKENIZER, ROWS, length, TRAIN, max_images=most)


def test_a_text_that_spells_a_placeholder_stays_text():
    record = Record("k", images=(JPEG,), turns=(Turn("<|image|>an <image> ?", "<|image|>"),))
    for template in (TRAIN, INFER):
        ids = asking_ids(record.questions(), [], TOKENIZER, template)
        assert ids.count(IMAGE_TOKEN_ID) == 1
        assert "an <image> ?" in TOKENIZER.decode([token for token in ids if token >= 0])
    sample = build_sample(record, TOKENIZER, ROWS, 500, TRAIN)
    assert sample.image_count == 1 and sample.modality.sum() == ROWS
    learnt = sample.labels[sample.labels != IGNORE_INDEX].tolist()
    assert TOKENIZER.decode(learnt, skip_special=False) == "<|image|></s>"


def test_a_caption_has_the_plain_style_under_every_choice():
    record = Record("k", images=(JPEG,), caption="a bus")
    made = [
        build_sample(record, TOKENIZER, ROWS, 64, template_of("owl1", rules))
        for rules in ("turns", "official_train")
    ]
    assert made[0].tokens.tolist() == made[1].tokens.tolist()
    assert made[0].labels.tolist() == made[1].labels.tolist()
    row = expand_placeholders([IMAGE_TOKEN_ID, 1, *TOKENIZER.encode("a bus"), 2], ROWS)
    assert made[0].tokens.tolist() == row.tokens.tolist()
