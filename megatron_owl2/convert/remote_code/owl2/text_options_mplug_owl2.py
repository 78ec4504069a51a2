"""Keywords of a tokenizer's call, for rows in which images have their places."""

from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from transformers.processing_utils import ImagesKwargs, TextKwargs

Row = tuple[list[int], list[int]]  # ids, and 1 where an image's rows are, else 0

_GROUPS = ("common_kwargs", "images_kwargs", "text_kwargs")
_CHOICES = {
    "padding": {
        "longest": (True, "longest"),
        "max_length": ("max_length",),
        "do_not_pad": (False, "do_not_pad"),
    },
    "truncation": {
        "longest_first": (True, "longest_first", "only_first"),  # there are no pairs of texts
        "do_not_truncate": (False, "do_not_truncate"),
    },
    "padding_side": {"left": ("left",), "right": ("right",)},
    "truncation_side": {"left": ("left",), "right": ("right",)},
    "return_tensors": {"pt": ("pt",), "np": ("np",), None: (None,)},
}
_SWITCHES = ("add_special_tokens", "return_attention_mask", "return_mm_token_type_ids", "verbose")
_COUNTS = ("max_length", "pad_to_multiple_of")
_LONGEST = 2**30  # a tokenizer without a length of its own has 10**30


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """Keywords with the meaning that they have for transformers' tokenizers.

    `padding` is True or "longest", "max_length", False or "do_not_pad"; `truncation` True or False
    or its longer names. `padding_side` and `truncation_side` are the tokenizer's by default, and so
    is `max_length` where it is needed. `return_tensors` is "pt", "np", or None for lists;
    `return_mm_token_type_ids` adds the modality under the name that transformers has for it.
    """

    padding_side: str
    truncation_side: str
    padding: str = "longest"
    truncation: str = "do_not_truncate"
    max_length: int | None = None
    pad_to_multiple_of: int | None = None
    add_special_tokens: bool = True
    return_attention_mask: bool = True
    return_mm_token_type_ids: bool = False
    return_tensors: str | None = "pt"
    verbose: bool = True  # no call warns of anything

    @classmethod
    def of(cls, tokenizer, keywords: dict) -> "TextOptions":
        """The options in a call's keywords, which stand alone or in dicts such as `text_kwargs`.

        None is the default, but for `return_tensors`. Raises TypeError for an unknown keyword,
        ValueError for one that this model cannot follow.
        """
        groups = [dict(keywords.get(name) or {}) for name in _GROUPS]
        groups.append({name: value for name, value in keywords.items() if name not in _GROUPS})
        known = {field.name for field in fields(cls)}
        given = {}
        for name, value in (pair for group in groups for pair in group.items()):
            if name not in known:
                _refuse(name, value, known)
            elif value is not None or name == "return_tensors":
                given[name] = _meaning(name, value)
        sides = {name: getattr(tokenizer, name) for name in ("padding_side", "truncation_side")}
        options = cls(**sides | given)
        bounded = options.padding == "max_length" or options.truncates
        if options.max_length is not None and not bounded:
            raise ValueError(
                f"max_length={options.max_length} has no effect without truncation=True, which "
                'cuts texts, or padding="max_length"'
            )
        if options.pad_to_multiple_of is not None and options.padding == "do_not_pad":
            raise ValueError("pad_to_multiple_of needs padding=True")
        if options.max_length is None and bounded:
            options = replace(options, max_length=tokenizer.model_max_length)
            if options.padding == "max_length" and options.max_length > _LONGEST:
                raise ValueError(
                    'the tokenizer has no length; padding="max_length" needs max_length'
                )
        return options

    @property
    def truncates(self) -> bool:
        return self.truncation != "do_not_truncate"

    def truncated(self, row: Row, number: int) -> Row:
        """A row of at most `max_length`, if that is asked for; BOS at its start is kept.

        Raises ValueError where an image would lose a row, since its pixels would remain.
        """
        ids, modality = row
        if not self.truncates or len(ids) <= self.max_length:
            return row
        left = self.truncation_side == "left"
        head = int(left and self.add_special_tokens and not modality[0])  # its BOS
        if left:
            first = len(ids) - max(self.max_length - head, 0)
            kept = [*range(min(head, self.max_length)), *range(first, len(ids))]
        else:
            kept = range(self.max_length)
        if sum(modality[i] for i in kept) != sum(modality):
            places = [i for i, image in enumerate(modality) if image]
            needed = head + len(ids) - places[0] if left else places[-1] + 1
            raise ValueError(
                f"max_length={self.max_length} cuts an image of text {number}, which has "
                f"{len(ids)} ids, {sum(modality)} of them rows of its images; set max_length to at "
                f"least {needed} or shorten the text"
            )
        return [ids[i] for i in kept], [modality[i] for i in kept]

    def padded(self, rows: list[Row]) -> dict:
        """Columns of the rows, all of one length if `padding` says so: input_ids (0 at padding),
        attention_mask and modality, in the kind of tensor that is asked for."""
        lengths = [len(ids) for ids, _ in rows]
        if self.padding == "do_not_pad":
            if self.return_tensors is not None and len(set(lengths)) > 1:
                raise ValueError(
                    f"rows of {min(lengths)} to {max(lengths)} ids make no tensor; set "
                    "padding=True, or return_tensors=None for lists"
                )
        else:
            longest = max(lengths) if self.padding == "longest" else self.max_length
            multiple = self.pad_to_multiple_of or 1
            lengths = [max(n, -(-longest // multiple) * multiple) for n in lengths]
        pairs = list(zip(rows, lengths, strict=True))
        columns = {
            "input_ids": [self._pad(ids, length) for (ids, _), length in pairs],
            "attention_mask": [self._pad([1] * len(ids), length) for (ids, _), length in pairs],
            "modality": [self._pad(modality, length) for (_, modality), length in pairs],
        }
        if not self.return_attention_mask:
            del columns["attention_mask"]
        if self.return_mm_token_type_ids:
            columns["mm_token_type_ids"] = columns["modality"]
        if self.return_tensors is None:
            return columns
        if self.return_tensors == "np":
            return {name: np.array(values, dtype=np.int64) for name, values in columns.items()}
        return {name: torch.tensor(values, dtype=torch.int64) for name, values in columns.items()}

    def _pad(self, values: list[int], length: int) -> list[int]:
        padding = [0] * (length - len(values))
        return padding + values if self.padding_side == "left" else values + padding


def _meaning(name: str, value):
    """The value of a known keyword as the options have it; raises ValueError for any other."""
    value = getattr(value, "value", value)  # of transformers' enums
    if name in _SWITCHES:
        if isinstance(value, bool):
            return value
        raise ValueError(f"{name} is {value!r}; it must be True or False")
    if name in _COUNTS:
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
        raise ValueError(f"{name} is {value!r}; it must be a whole number above 0")
    for meaning, spellings in _CHOICES[name].items():
        if value in spellings:
            return meaning
    choices = ", ".join(repr(s) for spellings in _CHOICES[name].values() for s in spellings)
    raise ValueError(f"{name} is {value!r}; it must be one of {choices}")


def _refuse(name: str, value, known: set[str]) -> None:
    """Errors for keywords that have no effect here; those of transformers may be switched off."""
    if name in TextKwargs.__annotations__:
        if value is None or value is False:
            return
        raise ValueError(f"{name}={value!r} is nothing that this tokenizer can do; leave it out")
    if name in ImagesKwargs.__annotations__:
        if value is None:
            return
        raise ValueError(
            f"{name}={value!r} cannot be chosen: images always get the model's own size, mean and "
            "deviation; leave it out"
        )
    raise TypeError(f"{name} is no keyword of this processor; it takes {', '.join(sorted(known))}")
