"""Tokenizer: LLaMA-2's ids, lossless text, a template that can be tokenised piece by piece."""

import io
import random
from collections import Counter

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from data_prep.shapes import VOCAB_SIZE
from data_prep.toy_corpus import language
from data_prep.toy_corpus import texts as toy_texts
from megatron_owl2.data.tokenizer import Tokenizer, train_tokenizer


def corpus(number: int) -> list[str]:
    """Dialogues in the conversation template, as the embedded corpus has them."""
    rng = random.Random(0)
    texts = [f"USER: {language.CAPTION_REQUEST} ASSISTANT: top left letter A ."] * (number // 10)
    for i in range(number):
        skill = toy_texts.EVALUATED_SKILLS[i % 4]
        turns = language.with_hint(toy_texts.text_dialogue(skill, rng), rng)
        texts.append(" ".join(f"USER: {q} ASSISTANT: {a}" for q, a in turns))
    return texts


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return corpus(2000)


@pytest.fixture(scope="module")
def tokenizer(texts, tmp_path_factory) -> Tokenizer:
    return train_tokenizer(texts, tmp_path_factory.mktemp("tokenizer") / "t.model", VOCAB_SIZE)


def test_special_ids_are_those_of_llama(tokenizer):
    assert (tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 2, 0)
    assert tokenizer.vocab_size == VOCAB_SIZE
    assert tokenizer.vocab_size % 8 == 0
    assert not {0, 1, 2} & set(tokenizer.encode("USER: what color is the circle ? ASSISTANT: red"))


def test_every_frequent_word_is_one_piece(tokenizer, texts):
    words = Counter(word for text in texts for word in text.split())
    frequent = [word for word, count in words.items() if count >= 50 and word.isalpha()]
    assert {"what", "circle", "purple", "top", "costs", "A"} <= set(frequent)
    for word in ["USER", "ASSISTANT", *frequent]:
        assert len(tokenizer.encode(word)) == 1, word


def test_digits_are_pieces_of_their_own_and_newline_is_a_byte(tokenizer):
    one_digit, two_digits = tokenizer.encode("7"), tokenizer.encode("77")
    assert two_digits == [*one_digit, one_digit[-1]]
    newline = 3 + 0x0A  # byte pieces follow the three special ones
    assert tokenizer.encode("red\nred")[1] == newline


def test_answer_tokenises_alike_with_and_without_its_prompt(tokenizer, texts):
    for text in texts[:300]:
        before, tag, answer = text.rpartition(" ASSISTANT:")
        prompt, answer = before + tag, answer.removeprefix(" ")
        separate = tokenizer.encode(prompt) + tokenizer.encode(answer)
        assert separate == tokenizer.encode(f"{prompt} {answer}") == tokenizer.encode(text)


def test_corpus_text_survives_the_round_trip(tokenizer, texts):
    for text in texts[:300]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


# U+2581 is SentencePiece's own mark for a space.
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581")))
def test_any_text_survives_the_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_decode_drops_or_spells_special_ids(tokenizer):
    ids = [1, *tokenizer.encode("red circle"), 2, 0]
    assert tokenizer.decode(ids) == "red circle"
    assert tokenizer.decode(ids, skip_special=False) == "<s>red circle</s><unk>"


@pytest.mark.parametrize("bad", [-200, -1, VOCAB_SIZE])
def test_decode_refuses_ids_outside_the_vocabulary(tokenizer, bad):
    with pytest.raises(IndexError, match=str(bad)):
        tokenizer.decode([5, bad])


def test_training_is_deterministic(tokenizer, texts, tmp_path):
    train_tokenizer(iter(texts), tmp_path / "again.model", VOCAB_SIZE)
    assert (tmp_path / "again.model").read_bytes() == tokenizer.path.read_bytes()


def test_small_corpus_gets_the_largest_multiple_of_64_that_it_fills(tmp_path):
    text = ["what color is the circle ? the circle is red and the square is blue"] * 20
    size = train_tokenizer(text, tmp_path / "small.model", 1000).vocab_size
    assert size % 64 == 0
    with pytest.raises(RuntimeError, match="too high"):  # the next multiple really is too much
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(text),
            model_writer=io.BytesIO(),
            model_type="bpe",
            vocab_size=size + 64,
            byte_fallback=True,
            minloglevel=2,
        )


def test_impossible_training_is_refused(tmp_path):
    with pytest.raises(ValueError, match="take 504"):
        train_tokenizer(["red"], tmp_path / "t.model", 510)
    with pytest.raises(ValueError, match="from 0 lines"):
        train_tokenizer([], tmp_path / "t.model", 512)
    with pytest.raises(ValueError, match="512 pieces or fewer"):
        train_tokenizer(["red"], tmp_path / "t.model", 512)
    assert not (tmp_path / "t.model").exists()


def test_unusable_model_files_are_refused(tmp_path):
    path = tmp_path / "tokenizer.model"
    with pytest.raises(FileNotFoundError, match="tokenizer.model"):
        Tokenizer(path)
    path.write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match="not a SentencePiece model"):
        Tokenizer(path)
    with path.open("wb") as model:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["red circle", "blue square"] * 9),
            model_writer=model,
            vocab_size=20,
            bos_id=3,
            hard_vocab_limit=False,
            minloglevel=2,
        )
    with pytest.raises(ValueError, match=r"\(0, 3, 2\)"):
        Tokenizer(path)
