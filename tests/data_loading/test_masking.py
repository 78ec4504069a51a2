"""Properties of generated conversations' samples: what is learnt, the ids, what truncation cuts."""

import itertools
import random
import re
from collections.abc import Iterator
from dataclasses import replace

import generated_conversations
import numpy as np
import pytest

from megatron_owl2.config.templates import TEMPLATES, Template, template_of
from megatron_owl2.data.conversation import Sample, asking_ids, build_sample, measure
from megatron_owl2.data.image_tokens import IGNORE_INDEX
from megatron_owl2.data.released_tokenization import training_ids_of_text
from megatron_owl2.data.shards.records import IMAGE_PLACEHOLDER, Record, Turn
from megatron_owl2.data.tokenizer import Tokenizer
from megatron_owl2.errors import BadSampleError

COUNT, ROWS = 10_000, 3
IMAGE, ANSWER, END = "\ue000", "\ue001", "\ue002"  # in no generated text


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """Conversations, each with a template, a tokenizer, and whether its pieces cross spaces."""
    made = generated_conversations.tokenizers(tmp_path_factory.mktemp("tokenizers"))
    ways = itertools.cycle(itertools.product(TEMPLATES.values(), made.items()))
    found = generated_conversations.records(1234, COUNT + 100)
    return [
        (record, template, tokenizer, name == "crossing")
        for record, (template, (name, tokenizer)) in zip(found, ways, strict=False)
    ][:COUNT]


def whole_text(record: Record, template: Template) -> str:
    """The conversation as one text, with marks for images, before answers and for their ends."""
    text = record.system or template.system
    text += template.after_system if text else ""
    placed = any(IMAGE_PLACEHOLDER in turn.question for turn in record.turns)
    for number, turn in enumerate(record.turns):
        question = turn.question
        if record.images:
            question = question.replace(IMAGE_PLACEHOLDER, IMAGE)
            if not placed and not number:
                question = IMAGE * len(record.images) + question
            if IMAGE in question:
                images = re.match(rf"\s*({IMAGE}\s*)*", question)[0]
                leading = template.between_images.join([IMAGE] * images.count(IMAGE))
                after = template.after_image if leading else ""
                question = leading + after + question[len(images) :].rstrip()
                question = question if question.strip() else question
        text += template.between_turns if number else ""
        text += f"{template.user}{question}{template.assistant} {ANSWER}{turn.answer}{END}"
    return text


def expected_ids(text: str, tokenizer: Tokenizer, *, split_at_answers: bool) -> list[int]:
    """Ids of a whole text, tokenised once between images and ends, with -200 for images."""
    text = text.replace(f" {ANSWER}", ANSWER) if split_at_answers else text.replace(ANSWER, "")
    ids = [tokenizer.bos_id]
    for piece in re.split(f"([{IMAGE}{ANSWER}{END}])", text):
        if piece == IMAGE:
            ids += [-200]
        elif piece == END:
            ids += [tokenizer.eos_id]
        elif piece and piece != ANSWER:
            ids += tokenizer.encode(piece)
    return ids


def with_placeholders(sample: Sample) -> list[int]:
    """The ids of a sample, whose image blocks must be whole, with -200 for each of them."""
    ids: list[int] = []
    for vision, block in itertools.groupby(
        zip(sample.tokens.tolist(), sample.modality.tolist(), strict=True), lambda pair: pair[1]
    ):
        tokens = [token for token, _ in block]
        assert not vision or (len(tokens) % ROWS == 0 and not any(tokens))
        ids += [-200] * (len(tokens) // ROWS) if vision else tokens
    return ids


def answers_of(sample: Sample, tokenizer: Tokenizer) -> Iterator[str]:
    """The texts of the runs of supervised positions, each of which must end in EOS."""
    learnt = (sample.labels != IGNORE_INDEX).tolist()
    assert (sample.labels[:-1][learnt[:-1]] == sample.tokens[1:][learnt[:-1]]).all()
    for supervised, block in itertools.groupby(range(len(learnt)), learnt.__getitem__):
        if supervised:
            ids = sample.labels[list(block)].tolist()
            assert ids[-1] == tokenizer.eos_id and tokenizer.eos_id not in ids[:-1]
            yield tokenizer.decode(ids[:-1])


def test_tokenizers_differ_where_it_matters(tmp_path):
    plain, crossing = generated_conversations.tokenizers(tmp_path).values()
    text = "USER: is it ? ASSISTANT: the answer"
    parts = "USER: is it ? ASSISTANT:", "the answer"
    assert plain.encode(text) == [*plain.encode(parts[0]), *plain.encode(parts[1])]
    assert crossing.encode(text) != [*crossing.encode(parts[0]), *crossing.encode(parts[1])]


def test_ids_are_those_of_the_whole_text_and_answers_alone_are_learnt(cases):
    assert len(cases) == COUNT
    for record, template, tokenizer, crossing in cases:
        sample = build_sample(record, tokenizer, ROWS, 10_000, template)
        text = whole_text(record, template)
        found = with_placeholders(sample)
        # Answers follow the prompt, as at inference, also where a piece could reach across.
        assert found == expected_ids(text, tokenizer, split_at_answers=crossing), record
        answers = [turn.answer.replace("\u2581", " ") for turn in record.turns]  # its own space
        assert [*answers_of(sample, tokenizer)] == answers, record
        assert sample.image_count == len(record.images) and not sample.shortened
        text_ids, images = measure(record, tokenizer, template)
        assert sample.length == text_ids + images * ROWS
        given = [turn.answer for turn in record.turns[:-1]]
        asked = asking_ids(record.questions(), given, tokenizer, template, record.system)
        assert found[: len(asked)] == asked, record


def test_truncation_cuts_whole_images_and_leaves_something_to_learn(cases):
    chance, refused, cut = random.Random(5), 0, 0
    for record, template, tokenizer, _ in cases[: COUNT // 2]:
        whole = build_sample(record, tokenizer, ROWS, 10_000, template)
        length, most = chance.randint(1, whole.length + 2), chance.randint(0, 4)
        first = int(np.flatnonzero(whole.labels != IGNORE_INDEX)[0]) + 1  # before the first answer
        shown = int(whole.modality[:first].sum()) // ROWS
        try:
            sample = build_sample(record, tokenizer, ROWS, length, template, most)
        except BadSampleError:
            assert length <= first or shown > most, record
            refused += 1
            continue
        assert first < sample.length <= length and shown <= sample.image_count <= most
        assert (sample.labels != IGNORE_INDEX).any()
        kept = sample.length
        assert sample.tokens.tolist() == whole.tokens[:kept].tolist()
        assert sample.labels[:-1].tolist() == whole.labels[: kept - 1].tolist()
        assert sample.modality.sum() == sample.image_count * ROWS
        with_placeholders(sample)
        assert sample.shortened == (kept < whole.length)
        ends = sample.tokens[-1] == tokenizer.eos_id
        assert ends or (sample.labels != IGNORE_INDEX).sum() == kept - first  # of the first answer
        cut += sample.shortened
    assert refused > 500 and cut > 500


def with_words(record: Record) -> Record:
    """The same conversation, in which texts spell the words that the released rules look for."""

    def changed(text: str) -> str:
        return text.replace("ASSISTANT:", "AI: ").replace("USER:", "\nHuman: ")

    turns = tuple(Turn(changed(turn.question), changed(turn.answer)) for turn in record.turns)
    return replace(record, turns=turns, system=changed(record.system))


@pytest.fixture(scope="module")
def released(cases):
    """Conversations under the rules of the released training."""
    template = template_of("owl1", "official_train")
    return [(with_words(record), template, tokenizer) for record, _, tokenizer, _ in cases[::3]]


def test_released_rules_read_the_text_of_the_template(released):
    compared = 0
    for record, template, tokenizer in released:
        sample = build_sample(record, tokenizer, ROWS, 10_000, template)
        found = with_placeholders(sample)
        assert sample.image_count == found.count(-200) and not sample.shortened
        text_ids, images = measure(record, tokenizer, template)
        assert (sample.length, images) == (text_ids + images * ROWS, sample.image_count)
        text = whole_text(record, template)
        if "<image>" not in text:
            text = re.sub(f"{ANSWER}|{END}", "", text).replace(IMAGE, "<image>")
            made = training_ids_of_text(text, tokenizer, ROWS, 10_000)
            last = len(made.ids) - [*reversed(made.supervised)].index(True)
            assert found == made.ids[:last], record
            compared += 1
    assert compared > 1000


def test_released_rules_ask_as_they_train(released):
    compared = 0
    for record, template, tokenizer in released:
        found = with_placeholders(build_sample(record, tokenizer, ROWS, 10_000, template))
        for turns in range(1, len(record.turns) + 1):
            questions = record.questions()[:turns]
            # Empty pieces are read otherwise beside images, also if these only come later.
            if record.images and all(len(pieces) == 1 for pieces in questions):
                continue
            given = [turn.answer for turn in record.turns[: turns - 1]]
            asked = asking_ids(questions, given, tokenizer, template, record.system)
            assert found[: len(asked)] == asked, record
            compared += 1
    assert compared > 2000


def test_released_rules_cut_between_any_pieces_but_no_image(released):
    chance, refused, cut = random.Random(6), 0, 0
    for record, template, tokenizer in released:
        whole = build_sample(record, tokenizer, ROWS, 10_000, template)
        length, most = chance.randint(1, whole.length + 2), chance.randint(0, 4)
        first = int(np.flatnonzero(whole.labels != IGNORE_INDEX)[0]) + 1
        try:
            sample = build_sample(record, tokenizer, ROWS, length, template, most)
        except BadSampleError:
            shown = int(whole.modality[:first].sum()) // ROWS
            assert length < first or shown > most, record
            refused += 1
            continue
        kept = sample.length
        assert first <= kept <= length and sample.image_count <= most
        assert sample.tokens.tolist() == whole.tokens[:kept].tolist()
        assert sample.labels[:-1].tolist() == whole.labels[: kept - 1].tolist()
        assert sample.labels[-1] in (tokenizer.eos_id, IGNORE_INDEX)
        assert sample.modality.sum() == sample.image_count * ROWS
        with_placeholders(sample)
        cut += sample.shortened
    assert refused > 300 and cut > 300
