"""Tokenisation of the released code of mPLUG-Owl version 1, in which training and inference differ.

Training (pipeline/data_utils/xgpt3_dataset.py of X-PLUG/mPLUG-Owl) cuts a text at images, `AI: `
and a newline with `Human: `, and every piece, these words too, is tokenised alone and so begins
with SentencePiece's space. What follows `AI: ` is an answer wherever the word stands: "What does
OpenAI: mean?" teaches "mean?". Inference (the processor) cuts at images only. So the released model
never reads a prompt as it was trained on it.

Texts are given by what stands between their images, one more than these.
"""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from megatron_owl2.data.image_tokens import IMAGE_TOKEN_ID
from megatron_owl2.data.tokenizer import Tokenizer
from megatron_owl2.errors import BadSampleError

PLACEHOLDER = "<image>"  # of an image in the released data
_ANSWER = "AI: "
_WORDS = re.compile(f"({_ANSWER}|\nHuman: )")


@dataclass(frozen=True)
class TrainingIds:
    """Ids of a sample with -200 for every image, whether each is supervised, and whether something
    of the text did not fit."""

    ids: list[int]
    supervised: list[bool]
    shortened: bool = False


def training_ids(
    texts: Sequence[str],
    tokenizer: Tokenizer,
    tokens_per_image: int = 1,
    max_length: int = sys.maxsize,
    max_images: int = sys.maxsize,
) -> TrainingIds:
    """The ids of training, at most `max_length` + 1 with the rows of the images.

    A piece that does not fit is cut and ends the sample; a cut answer ends in EOS like a whole one.
    An image that does not fit, or is beyond `max_images`, ends it before. Without images an empty
    answer is an EOS, beside images it is nothing. Raises BadSampleError if the first piece does
    not fit.
    """
    return _training_ids(_pieces(texts), tokenizer, tokens_per_image, max_length, max_images)


def training_ids_of_text(
    text: str, tokenizer: Tokenizer, tokens_per_image: int, max_length: int
) -> TrainingIds:
    """The ids of training of a text of the released data, with `<image>` in the places of images.

    One at the very beginning is spelled in letters, though its pixels are shown: they go to the
    next one. Raises as `training_ids` does.
    """
    pieces = _pieces(text.split(PLACEHOLDER))
    pieces[0] = PLACEHOLDER if pieces[0] is None else pieces[0]
    return _training_ids(pieces, tokenizer, tokens_per_image, max_length, sys.maxsize)


def training_prompt_ids(texts: Sequence[str], tokenizer: Tokenizer) -> list[int]:
    """The ids of training up to an answer that is still to come: a text that ends in `AI: `, or in
    the beginning of an answer, has no EOS there.

    Where an answer of a text begins with one of the words that are cut at, training reads it in
    another way if images come later.
    """
    made = training_ids(texts, tokenizer)
    return made.ids[:-1] if made.supervised[-1] else made.ids


def inference_ids(texts: Sequence[str], tokenizer: Tokenizer) -> list[int]:
    """The ids of inference: BOS, and every text between images in one piece."""
    ids = [tokenizer.bos_id]
    for number, text in enumerate(texts):
        ids += [IMAGE_TOKEN_ID] if number else []
        ids += tokenizer.encode(text) if text else []
    return ids


def _pieces(texts: Sequence[str]) -> list[str | None]:
    """The pieces that are tokenised alone, None for an image; beside images none is empty."""
    pieces: list[str | None] = []
    for number, text in enumerate(texts):
        pieces += [None] if number else []
        pieces += _WORDS.split(text)
    return [piece for piece in pieces if piece != ""] if len(texts) > 1 else pieces


def _training_ids(
    pieces: Sequence[str | None],
    tokenizer: Tokenizer,
    tokens_per_image: int,
    max_length: int,
    max_images: int,
) -> TrainingIds:
    ids = [tokenizer.bos_id, *tokenizer.encode(pieces[0] or "")]
    supervised = [False] * len(ids)
    room = max_length + 1 - len(ids)
    if room < 0:
        raise BadSampleError(
            "the text before the first image, question or answer is longer than "
            f"data.sequence_length {max_length}"
        )
    for before, piece in pairwise(pieces):
        end = [tokenizer.eos_id] if before == _ANSWER and piece is not None else []
        found = [IMAGE_TOKEN_ID] if piece is None else tokenizer.encode(piece)
        taken = found + end
        size = tokens_per_image if piece is None else len(taken)
        fits = size <= room and (piece is not None or ids.count(IMAGE_TOKEN_ID) < max_images)
        if not fits:  # an image is whole or not there, of a text there is the beginning
            taken = found[: room - len(end)] + end if piece is not None and room else []
        ids += taken
        supervised += [bool(end)] * len(taken)
        if not fits:
            return TrainingIds(ids, supervised, shortened=True)
        room -= size
    return TrainingIds(ids, supervised)
