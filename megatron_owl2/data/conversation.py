"""Samples of records: token ids, labels and modality of a conversation or a caption.

Conversations follow the template of the model (config/templates.py). Captions have the official
plain style, `<|image|>` + caption + EOS.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from megatron_owl2.config.templates import OWL2, Template
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
    pieces = _arranged(question.split(IMAGE_PLACEHOLDER), template)
    question = IMAGE_PLACEHOLDER.join(pieces)
    return _opening(template, system) + template.user + question + template.assistant


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
    anything but text.
    """
    ids: list[int] = []
    for index, pieces in enumerate(questions):
        ids += _question_ids(pieces, tokenizer, template, system, first=index == 0)
        if index < len(answers):
            ids += _answer_ids(answers[index], tokenizer)
    return ids


def prompt_ids(text: str, tokenizer: Tokenizer) -> list[int]:
    """Ids of a text with -200 for every placeholder, exactly as the official code makes them.

    Every piece between placeholders is tokenised alone and the first BOS is kept. A text that
    starts with the placeholder has no first piece; the official code then keeps the BOS of every
    later piece: [-200, 1, ...].
    """
    pieces = text.split(IMAGE_PLACEHOLDER)
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
    alone is cut at the end. Raises BadSampleError if not even one id of it fits.
    """
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


def _question_ids(
    pieces: Sequence[str], tokenizer: Tokenizer, template: Template, system: str, *, first: bool
) -> list[int]:
    """Ids of a turn up to its answer; the first turn begins with BOS and the system text."""
    pieces = _arranged(pieces, template)
    opening = _opening(template, system) if first else ""
    pieces[0] = opening + template.user + pieces[0]
    pieces[-1] += template.assistant
    ids = [tokenizer.bos_id] if first else []
    for number, piece in enumerate(pieces):
        ids += [IMAGE_TOKEN_ID] if number else []
        ids += tokenizer.encode(piece) if piece else []
    return ids


def _answer_ids(answer: str, tokenizer: Tokenizer) -> list[int]:
    return [*tokenizer.encode(answer), tokenizer.eos_id]


def _opening(template: Template, system: str) -> str:
    system = system if system.strip() else template.system
    return f"{system} " if system else ""


def _arranged(pieces: Sequence[str], template: Template) -> list[str]:
    """The texts around the images of a question as the template has them.

    A question with images has no white space at its ends, and none between images that begin it,
    after which comes the template's own. One without images stays as it is.
    """
    arranged = list(pieces)
    last = len(arranged) - 1
    if not last:
        return arranged
    leading = next((number for number, piece in enumerate(pieces) if piece.strip()), last)
    arranged[:leading] = [""] * leading
    arranged[last] = arranged[last].rstrip()
    after = template.after_image if leading else ""
    arranged[leading] = after + arranged[leading].lstrip()
    return arranged
