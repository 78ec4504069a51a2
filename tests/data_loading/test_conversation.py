"""Ids, labels and image rows, checked by hand; the batch made of them."""

import numpy as np
import pytest
import torch
from tiny_data import LetterTokenizer, encoded, make_image, one_per_row

from megatron_owl2.data.batch import BadSample
from megatron_owl2.data.conversation import IMAGE_PLACEHOLDER, build_sample, prompt, prompt_ids
from megatron_owl2.data.image_tokens import IGNORE_INDEX, IMAGE_TOKEN_ID
from megatron_owl2.data.shards.records import Record, Turn
from megatron_owl2.data.tokenizer import train_tokenizer
from megatron_owl2.errors import BadSampleError

IMAGE = encoded(make_image(0))
TOKENIZER = LetterTokenizer()
BOS, EOS = TOKENIZER.bos_id, TOKENIZER.eos_id
ids = TOKENIZER.encode


def build(record: Record, length: int = 64, rows: int = 3):
    return build_sample(record, TOKENIZER, tokens_per_image=rows, sequence_length=length)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("ab", [BOS, *ids("ab")]),
        ("a<|image|>b", [BOS, *ids("a"), -200, *ids("b")]),
        ("a<|image|><|image|>b<|image|>", [BOS, *ids("a"), -200, -200, *ids("b"), -200]),
        ("<|image|>ab", [-200, BOS, *ids("ab")]),  # the official quirk
        ("<|image|>a<|image|>b", [-200, BOS, *ids("a"), -200, BOS, *ids("b")]),
        ("<|image|>", [-200]),
        ("", []),
    ],
)
def test_prompt_ids_are_the_official_ones(text, expected):
    assert prompt_ids(text, TOKENIZER) == expected


def test_constants():
    assert (IMAGE_PLACEHOLDER, IMAGE_TOKEN_ID, IGNORE_INDEX) == ("<|image|>", -200, -100)


def test_conversation_with_image():
    turns = (Turn("<|image|>\nhi", "yo"), Turn("b?", "c"))
    sample = build(Record("k", images=(IMAGE,), turns=turns))
    first, second = [BOS, *ids("USER: ")], ids("hi ASSISTANT:")
    third = ids("USER: b? ASSISTANT:")
    expected = [*first, 0, 0, 0, *second, *ids("yo"), EOS, *third, *ids("c"), EOS]
    assert sample.tokens.tolist() == expected
    targets = [-100] * (len(first) + 3 + len(second)) + [*ids("yo"), EOS]
    targets += [-100] * len(third) + [*ids("c"), EOS]
    assert sample.labels.tolist() == [*targets[1:], -100]  # shifted: the next id
    assert np.flatnonzero(sample.modality).tolist() == [7, 8, 9]
    assert sample.modality.tolist() == [0] * 7 + [1] * 3 + [0] * (len(targets) - 10)
    assert sample.length == len(targets) and not sample.shortened
    assert {a.dtype for a in (sample.tokens, sample.labels, sample.modality)} == {np.dtype("int64")}


@pytest.mark.parametrize("question", ["hi", "<|image|>hi", "\n<|image|>\nhi"])
def test_an_image_at_the_beginning_comes_right_after_user(question):
    sample = build(Record("k", images=(IMAGE,), turns=(Turn(question, "yo"),)))
    expected = [BOS, *ids("USER: "), 0, 0, 0, *ids("hi ASSISTANT:yo"), EOS]
    assert sample.tokens.tolist() == expected


def test_training_begins_with_the_inference_prompt():
    question = "<|image|>what?"
    sample = build(Record("k", images=(IMAGE,), turns=(Turn(question, "this"),)))
    expanded = []
    for i in prompt_ids(prompt(question), TOKENIZER):
        expanded += [0, 0, 0] if i == IMAGE_TOKEN_ID else [i]
    assert sample.tokens[: len(expanded)].tolist() == expanded
    assert (sample.labels[: len(expanded) - 1] == -100).all()
    assert sample.labels[len(expanded) - 1] == ord("t")


def test_text_conversation():
    sample = build(Record("k", turns=(Turn("a", "b"),)))
    given = [BOS, *ids("USER: a ASSISTANT:")]
    assert sample.tokens.tolist() == [*given, ord("b"), EOS]
    assert sample.labels.tolist() == [-100] * (len(given) - 1) + [ord("b"), EOS, -100]
    assert not sample.modality.any()


def test_caption_masks_only_the_placeholder():
    """Official plain style: the BOS after the image is a target."""
    sample = build(Record("k", images=(IMAGE,), caption="ab"))
    assert sample.tokens.tolist() == [0, 0, 0, BOS, *ids("ab"), EOS]
    assert sample.labels.tolist() == [-100, -100, BOS, *ids("ab"), EOS, -100]
    assert np.flatnonzero(sample.modality).tolist() == [0, 1, 2]


def test_caption_without_image_is_text():
    sample = build(Record("k", caption="ab"))
    assert sample.tokens.tolist() == [BOS, *ids("ab"), EOS]
    assert sample.labels.tolist() == [*ids("ab"), EOS, -100]


def test_whole_trailing_turns_are_dropped():
    turns = (Turn("q", "a"), Turn("q", "a"), Turn("q", "a"))
    lengths = [1 + n * (len("USER: q ASSISTANT:") + 2) for n in (1, 2, 3)]
    for length in range(lengths[0], lengths[2] + 3):
        sample = build(Record("k", turns=turns), length)
        fitting = sum(length >= needed for needed in lengths)
        assert sample.length == lengths[fitting - 1]
        assert (sample.labels == EOS).sum() == fitting
        assert sample.shortened == (fitting < 3)


@pytest.mark.parametrize(
    "record, before",
    [
        (Record("k", images=(IMAGE,), turns=(Turn("q", "answer"), Turn("q", "a"))), 22),
        (Record("k", images=(IMAGE,), caption="answer"), 4),
        (Record("k", caption="answer"), 1),
    ],
)
def test_a_first_answer_is_cut_and_the_image_stays(record, before):
    for fit in range(1, 7):  # without its EOS, which would teach to stop there
        sample = build(record, before + fit)
        assert sample.tokens[before:].tolist() == ids("answer"[:fit])
        assert sample.labels[before - 1 : -1].tolist() == ids("answer"[:fit])
        assert sample.labels[-1] == -100 and sample.shortened
        assert np.count_nonzero(sample.modality) == 3 * len(record.images)
    assert (build(record, before + 7).labels == EOS).sum() == 1
    with pytest.raises(BadSampleError, match="nothing to learn fits"):
        build(record, before)
    with pytest.raises(BadSampleError, match="nothing to learn fits"):
        build(record, 1)


def test_answers_are_tokenised_as_in_one_text(tmp_path):
    """Cutting at "ASSISTANT:" gives the pieces of the whole text, the answer's space included."""
    texts = [f"USER: is number {i} red ? ASSISTANT: the answer is {i % 7}" for i in range(300)]
    tokenizer = train_tokenizer(texts, tmp_path / "t.model", 320)
    sample = build_sample(
        Record("k", turns=(Turn("is number 5 red ?", "the answer is 5"),)), tokenizer, 3, 64
    )
    whole = tokenizer.encode("USER: is number 5 red ? ASSISTANT: the answer is 5")
    assert sample.tokens[: sample.length].tolist() == [1, *whole, 2]
    supervised = sample.labels[sample.labels != IGNORE_INDEX].tolist()
    assert supervised == [*tokenizer.encode("the answer is 5"), 2]


def batch_of(*records: Record, image_size: int = 4):
    samples = []
    for number, record in enumerate(records):
        sample = build(record)
        sample.key = record.key
        pixels = torch.full((3, 4, 4), number, dtype=torch.uint8)
        sample.images = [pixels + 10 * i for i in range(sample.image_count)]
        samples.append(sample)
    return samples, one_per_row(samples, image_size, 64, row_alignment=64, first=100)


def test_batch_puts_every_image_row_where_it_belongs():
    samples, batch = batch_of(
        Record("a", images=(IMAGE,), caption="x"),
        Record("b", caption="text"),
        Record("c", images=(IMAGE,), turns=(Turn("q", "a"),)),
    )
    assert batch.image.shape == (2, 3, 4, 4) and batch.image[:, 0, 0, 0].tolist() == [0, 2]
    assert batch.vision_token_index.tolist() == [0, 3, 6, 7 * 3 + 2, 8 * 3 + 2, 9 * 3 + 2]
    flat = batch.modality.T.reshape(-1)  # sequence first, as the model's hidden states
    assert flat[batch.vision_token_index].all() and flat.sum() == 6
    assert batch.tokens.T.reshape(-1)[batch.vision_token_index].tolist() == [0] * 6
    for positions, sample in zip(batch.position_ids.tolist(), samples, strict=True):
        assert positions == [*range(sample.length), *[0] * (64 - sample.length)]
    assert torch.equal(batch.loss_mask, (batch.labels != -100).float())
    assert batch.lengths.tolist() == [sample.length for sample in samples] == [6, 6, 24]
    assert batch.sample_indices.tolist() == [100, 101, 102] and batch.keys == ["a", "b", "c"]
    integers = (
        batch.tokens,
        batch.labels,
        batch.modality,
        batch.position_ids,
        batch.vision_token_index,
    )
    assert {tensor.dtype for tensor in (*integers, batch.sample_indices)} == {torch.int64}
    assert (batch.loss_mask.dtype, batch.image.dtype) == (torch.float32, torch.uint8)


def test_text_only_batch_has_one_black_image_without_rows():
    _, batch = batch_of(Record("a", caption="x"), Record("b", caption="y"))
    assert batch.image.shape == (1, 3, 4, 4) and not batch.image.any()
    assert batch.vision_token_index.shape == (0,) and batch.vision_token_index.dtype == torch.int64


def test_moving_a_batch_keeps_what_is_not_a_tensor():
    _, batch = batch_of(Record("a", images=(IMAGE,), caption="x"))
    batch.bad_samples = [BadSample(100, None, 0, "d", "s", 0, r) for r in ("one", "two")]
    moved = batch.to("meta")
    assert {v.device.type for v in vars(moved).values() if isinstance(v, torch.Tensor)} == {"meta"}
    assert moved.keys == ["a"] and moved.bad == 1 and moved.shortened == []
