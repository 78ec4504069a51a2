"""Spans of a sample: runs of positions of one kind and their text, for people to read."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Literal

import numpy as np

from megatron_owl2.data.image_tokens import IGNORE_INDEX, VISION
from megatron_owl2.data.tokenizer import Tokenizer

if TYPE_CHECKING:
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
    kinds: list[tuple[SpanKind, int]] = []  # and which of the images
    rows = 0
    for seen, target in zip(modality.tolist(), learnt, strict=False):
        kind = "vision" if seen == VISION else ("learnt" if target else "given")
        kinds.append((kind, rows // tokens_per_image if seen == VISION else 0))
        rows += seen == VISION
    runs = [(kind, len([*run])) for (kind, _), run in groupby(kinds)]
    ends = np.cumsum([0, *(length for _, length in runs)]).tolist()
    return [
        _span(kind, ids[start:stop], tokenizer)
        for (kind, _), (start, stop) in zip(runs, pairwise(ends), strict=True)
    ]


def _span(kind: SpanKind, ids: Sequence[int], tokenizer: Tokenizer) -> Span:
    if kind == "vision":
        return Span(kind, tuple(ids), f"[{len(ids)} vision tokens]")
    return Span(kind, tuple(ids), tokenizer.decode(ids, skip_special=False))
