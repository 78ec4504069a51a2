"""Conversation template: a record to token ids, labels and modality in their final positions.

The template is the one of official inference, without a system prompt:
`USER: <|image|>question ASSISTANT: answer</s>`. Training on it closes the gap between the
official fine-tuning scripts (with a system prompt) and official inference (without).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from megatron_owl2.data.image_tokens import (
    IGNORE_INDEX,
    IMAGE_TOKEN_ID,
    TEXT,
    expand_placeholders,
)
from megatron_owl2.data.shards.records import IMAGE_PLACEHOLDER, Record
from megatron_owl2.data.tokenizer import Tokenizer
from megatron_owl2.errors import BadSampleError

if TYPE_CHECKING:  # the help of owl2 evaluate comes without it
    import torch


@dataclass
class Sample:
    """One row of a batch, padded to the sequence length s.

    tokens, labels and modality are int64 [s]; `length` positions are not padding. `shortened`:
    turns or the end of an answer did not fit. The data set adds image (uint8 [3, H, W] or None),
    sample index, key and source (the number of the data set)."""

    tokens: np.ndarray
    labels: np.ndarray
    modality: np.ndarray
    length: int
    shortened: bool
    image: "torch.Tensor | None" = None
    sample_index: int = -1
    key: str = ""
    source: int = 0


def prompt(question: str) -> str:
    """The text that asks for an answer; `question` may contain the placeholder."""
    return f"USER: {question} ASSISTANT:"


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
    record: Record, tokenizer: Tokenizer, tokens_per_image: int, sequence_length: int
) -> Sample:
    """The ids of a record with the image expanded to its rows and labels shifted by one.

    Conversations: only answers and their EOS are supervised. The image comes right after the
    first `USER: `, wherever the question had the placeholder. Captions have the official plain
    style, `<|image|>` + caption + EOS, where only the placeholder is masked: the last image row
    predicts the BOS. A caption without an image is plain text, supervised after its BOS.

    Whole trailing turns are dropped until the conversation fits; a first answer or a caption that
    does not fit alone is cut at the end. Raises BadSampleError if not even one id of it fits.
    """
    has_image = record.image is not None
    ids: list[int] = []
    targets: list[int] = []
    shortened = False
    for given, answer in _exchanges(record, tokenizer):
        room = sequence_length - len(ids) - len(given) - (tokens_per_image - 1) * has_image
        if len(answer) > room:
            shortened = True
            if ids:
                break
            answer = answer[: max(room, 0)]
            if not set(answer) - {tokenizer.bos_id}:
                raise BadSampleError(
                    f"nothing to learn fits into sequence_length {sequence_length}: "
                    f"{sequence_length - room} positions come before the answer"
                )
        ids += given + answer
        targets += [IGNORE_INDEX] * len(given) + answer
        if shortened:
            break

    tokens = np.zeros(sequence_length, dtype=np.int64)
    labels = np.full(sequence_length, IGNORE_INDEX, dtype=np.int64)
    modality = np.full(sequence_length, TEXT, dtype=np.int64)
    row = expand_placeholders(ids, tokens_per_image, targets)
    length = len(row.tokens)
    tokens[:length] = row.tokens
    labels[: length - 1] = row.labels[1:]
    modality[:length] = row.modality
    return Sample(tokens, labels, modality, length, shortened)


def _exchanges(record: Record, tokenizer: Tokenizer) -> Iterator[tuple[list[int], list[int]]]:
    """(ids that are given, ids that are supervised), once for each turn or for the caption."""
    has_image = record.image is not None
    if record.caption is not None:
        text = [*tokenizer.encode(record.caption), tokenizer.eos_id]
        bos = [tokenizer.bos_id]
        yield ([IMAGE_TOKEN_ID], bos + text) if has_image else (bos, text)
    for index, turn in enumerate(record.turns):
        question = turn.question
        if index == 0 and has_image:
            question = IMAGE_PLACEHOLDER + question.replace(IMAGE_PLACEHOLDER, "").strip()
        text = prompt(question)
        given = tokenizer.encode(text) if index else prompt_ids(text, tokenizer)
        yield given, [*tokenizer.encode(turn.answer), tokenizer.eos_id]
