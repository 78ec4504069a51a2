"""Samples of records: token ids, labels and modality of a conversation or a caption.

Conversations follow the template of the model and its rules of tokenisation (config/templates.py).
Under `turns` a question up to its answer is one text, cut at images, and the answer another, which
ends in EOS, in training as in asking. Captions have the official plain style, `<|image|>` +
caption + EOS.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from megatron_owl2.config.templates import OWL2, Template, check_trainable
from megatron_owl2.data import released_tokenization
from megatron_owl2.data.image_tokens import IGNORE_INDEX, IMAGE_TOKEN_ID, expand_placeholders
from megatron_owl2.data.shards.records import IMAGE_PLACEHOLDER, Record
from megatron_owl2.data.tokenizer import Tokenizer
from megatron_owl2.errors import BadSampleError

if TYPE_CHECKING:  # the help of owl2 evaluate comes without it
    import torch


@dataclass
class Sample:
    """One sample of n positions.

    tokens, labels (shifted: the target of each position) and modality are int64 [n].
    `image_count` is the number of images among them; `shortened`: turns or the end of an answer did
    not fit. The data set adds images (uint8 [3, H, W] each), key and source (the
    number of the data set)."""

    tokens: np.ndarray
    labels: np.ndarray
    modality: np.ndarray
    image_count: int = 0
    shortened: bool = False
    images: "list[torch.Tensor]" = field(default_factory=list)
    key: str = ""
    source: int = 0

    @property
    def length(self) -> int:
        """Number of positions."""
        return len(self.tokens)


def prompt(question: str, template: Template = OWL2, system: str = "") -> str:
    """The text that asks for the first answer; placeholders in `question` stand for images.

    `system` is the text before it in place of the template's own.
    """
    pieces = _question_texts(question.split(IMAGE_PLACEHOLDER), template, system, first=True)
    return IMAGE_PLACEHOLDER.join(pieces)


def asking_ids(
    questions: Sequence[Sequence[str]],
    answers: Sequence[str],
    tokenizer: Tokenizer,
    template: Template = OWL2,
    system: str = "",
) -> list[int]:
    """Ids, with -200 for every image, that ask for the answer to the last question.

    `questions` are the texts between the images of each, one more than these; `answers` are those
    to all but the last. They are the ids that build_sample begins with, and no text becomes
    anything but text. Under official_inference, which trains nothing, they are the processor's.
    """
    if template.tokenization != "turns":
        texts = _texts(questions, answers, template, system)
        return _official_prompt_ids(texts, tokenizer, template)
    ids: list[int] = []
    for index, pieces in enumerate(questions):
        ids += _question_ids(pieces, tokenizer, template, system, first=index == 0)
        if index < len(answers):
            ids += _answer_ids(answers[index], tokenizer)
    return ids


def prompt_ids(text: str, tokenizer: Tokenizer, template: Template = OWL2) -> list[int]:
    """Ids of a text with -200 for every placeholder, exactly as the official code makes them.

    mPLUG-Owl2's tokenises every piece between placeholders alone and keeps the first BOS. A text
    that starts with the placeholder has no first piece; the code then keeps the BOS of every
    later piece: [-200, 1, ...]. Under the rules of mPLUG-Owl there is one BOS, at the start.
    """
    pieces = text.split(IMAGE_PLACEHOLDER)
    if template.tokenization != "turns":
        return _official_prompt_ids(pieces, tokenizer, template)
    keep_bos = not pieces[0]
    ids = [] if keep_bos else [tokenizer.bos_id, *tokenizer.encode(pieces[0])]
    for piece in pieces[1:]:
        ids.append(IMAGE_TOKEN_ID)
        if piece:
            if keep_bos:
                ids.append(tokenizer.bos_id)
            ids += tokenizer.encode(piece)
    return ids


def build_sample(
    record: Record,
    tokenizer: Tokenizer,
    tokens_per_image: int,
    sequence_length: int,
    template: Template = OWL2,
    max_images: int | None = None,
) -> Sample:
    """The ids of a record with its images expanded to their rows and labels shifted by one.

    Conversations: only answers and their EOS are supervised. A caption: only the placeholder is
    masked, so the last image row predicts the BOS; without an image it is plain text, supervised
    after its BOS. Texts of a record become pieces of text whatever they spell, never control
    tokens.

    Whole trailing turns are dropped, with their images, until the conversation fits into
    `sequence_length` positions and `max_images`; a first answer or a caption that does not fit
    alone is cut at the end. Under official_train a conversation ends where it no longer fits, in
    the middle of any turn. Raises BadSampleError if not even one supervised id fits, and
    ConfigError for rules that only ask.
    """
    if _is_as_released(record, template):
        return _released_sample(
            record, tokenizer, tokens_per_image, sequence_length, template, max_images
        )
    ids: list[int] = []
    targets: list[int] = []
    images = positions = 0
    shortened = False
    for given, answer in _exchanges(record, tokenizer, template):
        count = given.count(IMAGE_TOKEN_ID)
        room = sequence_length - positions - len(given) - count * (tokens_per_image - 1)
        too_many = max_images is not None and images + count > max_images
        if len(answer) > room or too_many:
            shortened = True
            if ids:
                break
            if too_many:
                raise BadSampleError(
                    f"more images before the first answer than data.images_per_row {max_images}"
                )
            answer = answer[: max(room, 0)]
            if not set(answer) - {tokenizer.bos_id}:
                raise BadSampleError(
                    "nothing to learn fits: the first question alone fills data.sequence_length "
                    f"{sequence_length}"
                )
        ids += given + answer
        targets += [IGNORE_INDEX] * len(given) + answer
        images += count
        positions = len(ids) + images * (tokens_per_image - 1)
        if shortened:
            break
    row = expand_placeholders(ids, tokens_per_image, targets)
    labels = np.append(row.labels[1:], IGNORE_INDEX)
    return Sample(row.tokens, labels, row.modality, images, shortened)


def measure(record: Record, tokenizer: Tokenizer, template: Template = OWL2) -> tuple[int, int]:
    """(ids of text, images) of a record's whole sample; its positions are the ids and the rows of
    the images."""
    if _is_as_released(record, template):
        made = released_tokenization.training_ids(_texts_of(record, template), tokenizer)
        images = made.ids.count(IMAGE_TOKEN_ID)
        return _end_of_targets(made) - images, images
    ids = images = 0
    for given, answer in _exchanges(record, tokenizer, template):
        count = given.count(IMAGE_TOKEN_ID)
        images += count
        ids += len(given) - count + len(answer)
    return ids, images


def _exchanges(
    record: Record, tokenizer: Tokenizer, template: Template
) -> Iterator[tuple[list[int], list[int]]]:
    """(ids that are given, ids that are supervised), once for each turn or for the caption."""
    if record.caption is not None:
        text = [*tokenizer.encode(record.caption), tokenizer.eos_id]
        bos = [tokenizer.bos_id]
        yield ([IMAGE_TOKEN_ID], bos + text) if record.images else (bos, text)
    for index, pieces in enumerate(record.questions()):
        given = _question_ids(pieces, tokenizer, template, record.system, first=index == 0)
        yield given, _answer_ids(record.turns[index].answer, tokenizer)


def _is_as_released(record: Record, template: Template) -> bool:
    """Whether the released rules make the ids of a record; they know no captions."""
    check_trainable(template)
    return template.tokenization == "official_train" and record.caption is None


def _released_sample(
    record: Record,
    tokenizer: Tokenizer,
    tokens_per_image: int,
    sequence_length: int,
    template: Template,
    max_images: int | None,
) -> Sample:
    """The sample of the released training code, without what follows its last target.

    That code has one id more than positions, the last of which is a target only. It counts the
    pixels of images that did not fit and learns nothing from a sample without targets; here the
    images are those of the ids, and such a sample is bad.
    """
    made = released_tokenization.training_ids(
        _texts_of(record, template),
        tokenizer,
        tokens_per_image,
        sequence_length,
        sys.maxsize if max_images is None else max_images,
    )
    stop = _end_of_targets(made)
    if not stop:
        raise BadSampleError(
            "nothing to learn fits: the first answer comes after data.sequence_length "
            f"{sequence_length} or data.images_per_row {max_images}"
        )
    ids = made.ids[:stop]
    pairs = zip(ids, made.supervised, strict=False)
    row = expand_placeholders(
        ids, tokens_per_image, [token if learnt else IGNORE_INDEX for token, learnt in pairs]
    )
    labels = np.append(row.labels[1:], IGNORE_INDEX)
    tokens, labels, modality = (
        values[:sequence_length] for values in (row.tokens, labels, row.modality)
    )
    return Sample(tokens, labels, modality, ids.count(IMAGE_TOKEN_ID), made.shortened)


def _end_of_targets(made: released_tokenization.TrainingIds) -> int:
    """Number of ids up to the last supervised one, 0 without any."""
    return max((place for place, learnt in enumerate(made.supervised, 1) if learnt), default=0)


def _official_prompt_ids(
    texts: Sequence[str], tokenizer: Tokenizer, template: Template
) -> list[int]:
    """Ids of the texts between the images of a prompt, under the official rules."""
    if template.tokenization == "official_train":
        return released_tokenization.training_prompt_ids(texts, tokenizer)
    return released_tokenization.inference_ids(texts, tokenizer)


def _texts_of(record: Record, template: Template) -> list[str]:
    answers = [turn.answer for turn in record.turns]
    return _texts(record.questions(), answers, template, record.system)


def _texts(
    questions: Sequence[Sequence[str]], answers: Sequence[str], template: Template, system: str
) -> list[str]:
    """The texts between the images of a whole conversation, one more than these."""
    texts = [""]
    for index, pieces in enumerate(questions):
        before, *others = _question_texts(pieces, template, system, first=index == 0)
        texts[-1] += before
        texts += others
        texts[-1] += answers[index] if index < len(answers) else ""
    return texts


def _question_ids(
    pieces: Sequence[str], tokenizer: Tokenizer, template: Template, system: str, *, first: bool
) -> list[int]:
    """Ids of a turn up to its answer; the first turn begins with BOS and the system text."""
    ids = [tokenizer.bos_id] if first else []
    for number, piece in enumerate(_question_texts(pieces, template, system, first=first)):
        ids += [IMAGE_TOKEN_ID] if number else []
        ids += tokenizer.encode(piece) if piece else []
    return ids


def _question_texts(
    pieces: Sequence[str], template: Template, system: str, *, first: bool
) -> list[str]:
    """The texts between the images of a turn, up to its answer."""
    texts = _arranged(pieces, template)
    before = _opening(template, system) if first else template.between_turns
    texts[0] = before + template.user + texts[0]
    texts[-1] += template.before_answer
    return texts


def _answer_ids(answer: str, tokenizer: Tokenizer) -> list[int]:
    return [*tokenizer.encode(answer), tokenizer.eos_id]


def _opening(template: Template, system: str) -> str:
    system = system if system.strip() else template.system
    return system + template.after_system if system else ""


def _arranged(pieces: Sequence[str], template: Template) -> list[str]:
    """The texts around the images of a question as the template has them.

    A question with images has no white space at its ends, and none between and behind images that
    begin it, where the template's own text comes. One without images stays as it is.
    """
    arranged = list(pieces)
    last = len(arranged) - 1
    if not last:
        return arranged
    leading = next((number for number, piece in enumerate(pieces) if piece.strip()), last)
    arranged[:leading] = ["", *[template.between_images] * (leading - 1)][:leading]
    arranged[last] = arranged[last].rstrip()
    after = template.after_image if leading else ""
    arranged[leading] = after + arranged[leading].lstrip()
    return arranged
