"""Conversations made by chance from a seed, full of what could be taken for something else."""

import io
import random
from collections.abc import Iterator
from pathlib import Path

import sentencepiece
from PIL import Image

from megatron_owl2.data.shards.records import IMAGE_PLACEHOLDER, Record, Turn
from megatron_owl2.data.tokenizer import Tokenizer, train_tokenizer

WORDS = ["red", "blue ?", "the top one", "is it", "12 345.6", "a", "Zebra,", "answer"]
UNICODE = ["naïve café", "日本語", "🦉", "ﬁ½", "e\u0301", "\u200b", "שלום", "\u2581the", "\ufeff"]
LOOK_ALIKES = ["</s>", "<s>", "<unk>", "<0x0A>", "<image>", "<|im", "age|>", "<", "/s>"]
LOOK_ALIKES += ["USER:", " USER: ", "ASSISTANT:", " ASSISTANT: ", "</s>USER: x ASSISTANT: y"]
SPACES = [" ", "  ", "\n", "\t", "\n\n", "\r\n", "   ", "\u00a0"]
IMAGE = Image.new("RGB", (8, 6), "red")
PIECES = [WORDS, WORDS, UNICODE, LOOK_ALIKES, SPACES]


def texts() -> list[str]:
    """A corpus that the tokenizers are trained on, with the pieces of the control tokens."""
    return [
        f"USER: is the {word} one {number % 7} red ? ASSISTANT: the answer is {word} </ s> <| ag"
        for number in range(60)
        for word in ("top", "left", "café")
    ]


def tokenizers(folder: Path) -> dict[str, Tokenizer]:
    """One with LLaMA-2's settings, and one whose pieces cross spaces, as in ":▁the"."""
    plain = train_tokenizer(texts(), folder / "plain.model", 320)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts() + ["T: the", "R: is", ": a", ": red"] * 500),
        model_writer=model,
        model_type="bpe",
        vocab_size=320,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_by_whitespace=False,
        split_by_unicode_script=False,
        num_threads=1,
        minloglevel=2,
    )
    (folder / "crossing.model").write_bytes(model.getvalue())
    return {"plain": plain, "crossing": Tokenizer(folder / "crossing.model")}


def text(chance: random.Random, most: int = 5) -> str:
    """A text that may begin or end with white space, but is not empty."""
    found = "".join(chance.choice(chance.choice(PIECES)) for _ in range(chance.randint(1, most)))
    return found if found.strip() else found + "x"


def records(seed: int, count: int) -> Iterator[Record]:
    """Conversations of 1 to 4 turns, with up to 4 images anywhere in their questions or, without
    placeholders, before them, and a system text now and then."""
    chance = random.Random(seed)
    for number in range(count):
        turns = chance.choice((1, 1, 2, 3, 4))
        images = chance.choice((0, 0, 1, 1, 2, 4))
        questions = [[text(chance)] for _ in range(turns)]
        if placed := images and chance.random() < 0.8:
            for _ in range(images):
                words = chance.choice(questions)
                between = chance.choice(("", "", "\n", " ", "and"))
                words.insert(chance.randint(0, len(words)), IMAGE_PLACEHOLDER + between)
        elif not images and chance.random() < 0.2:
            questions[0].append(IMAGE_PLACEHOLDER)  # no image, so it is text
        answers = [text(chance) for _ in range(turns)]
        if chance.random() < 0.2:
            answers[0] += IMAGE_PLACEHOLDER
        asked = ["".join(words) for words in questions]
        marked = sum(question.count(IMAGE_PLACEHOLDER) for question in asked)
        if images and marked != (images if placed else 0):  # "<|im" and "age|>" met
            continue
        pairs = zip(asked, answers, strict=True)
        yield Record(
            f"k{number}",
            images=(b"",) * images,
            turns=tuple(Turn(question, answer) for question, answer in pairs),
            system=text(chance) if chance.random() < 0.3 else "",
        )


def _content(chance: random.Random, pieces: list[str]) -> str | list[dict]:
    """A message's content: its texts, now and then cut into several parts, and images between."""
    if len(pieces) == 1 and chance.random() < 0.5:
        return pieces[0]
    parts = []
    for number, piece in enumerate(pieces):
        parts += [{"type": "image", "image": IMAGE}] if number else []
        cut = chance.randint(0, len(piece))
        cuts = (piece[:cut], piece[cut:]) if chance.random() < 0.5 else (piece,)
        parts += [{"type": "text", "text": text} for text in cuts]
    return parts


def messages_of(record: Record, chance: random.Random) -> list[dict]:
    """The messages of a record, with an image in the place of each."""
    messages = [{"role": "system", "content": record.system}] if record.system else []
    for pieces, turn in zip(record.questions(), record.turns, strict=True):
        messages.append({"role": "user", "content": _content(chance, pieces)})
        messages.append({"role": "assistant", "content": _content(chance, [turn.answer])})
    return messages
