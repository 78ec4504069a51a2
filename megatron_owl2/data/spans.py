"""Spans of a sample: runs of positions of one kind and their text, for people to read."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Literal

from megatron_owl2.data.image_tokens import IGNORE_INDEX, VISION
from megatron_owl2.data.tokenizer import Tokenizer

if TYPE_CHECKING:
    import numpy as np
    import torch

SpanKind = Literal["given", "learnt", "vision"]


@dataclass(frozen=True)
class Span:
    """Neighbouring tokens: text that is given, text that is learnt, or the rows of one image."""

    kind: SpanKind
    ids: tuple[int, ...]
    text: str


def spans_of(
    tokens: "np.ndarray | torch.Tensor",
    labels: "np.ndarray | torch.Tensor",
    modality: "np.ndarray | torch.Tensor",
    tokens_per_image: int,
    tokenizer: Tokenizer,
) -> list[Span]:
    """The spans of one sample, from its tokens, labels (shifted) and modality [n].

    Special tokens are spelled; the rows of an image are `[65 vision tokens]`.
    """
    ids = tokens.tolist()
    learnt = [False, *(label != IGNORE_INDEX for label in labels.tolist())]
    places: list[tuple[SpanKind, int]] = []  # the kind of a position, and which image it shows
    rows = 0
    for seen, target in zip(modality.tolist(), learnt, strict=False):
        if seen == VISION:
            places.append(("vision", rows // tokens_per_image))
            rows += 1
        else:
            places.append(("learnt" if target else "given", 0))
    spans, start = [], 0
    for (kind, _), run in groupby(places):
        stop = start + len([*run])
        spans.append(_span(kind, ids[start:stop], tokenizer))
        start = stop
    return spans


def _span(kind: SpanKind, ids: Sequence[int], tokenizer: Tokenizer) -> Span:
    if kind == "vision":
        return Span(kind, tuple(ids), f"[{len(ids)} vision tokens]")
    return Span(kind, tuple(ids), tokenizer.decode(ids, skip_special=False))
