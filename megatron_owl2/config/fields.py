"""Ranges and choices of configuration keys: declared in the schema, checked by one loop.

A number is declared with `number`, a key with a fixed set of values as `typing.Literal`.
"""

import dataclasses
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, get_args, get_origin

from megatron_owl2.errors import ConfigError

T = TypeVar("T")
_LARGEST, _SMALLEST = sys.float_info.max, sys.float_info.min


@dataclass(frozen=True)
class Range:
    """Bounds of a number, or of each in a list of `length`; infinity and NaN are out of any.

    `positive` numbers are not subnormal either.
    """

    at_least: float | None = None
    at_most: float | None = None
    positive: bool = False
    length: int | None = None

    def holds(self, value: object, *, whole: bool) -> bool:
        """Whether a value of any type is a number (and whole, if asked) within the bounds."""
        if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
            return False
        least = -_LARGEST if self.at_least is None else self.at_least
        most = _LARGEST if self.at_most is None else self.at_most
        return (_SMALLEST if self.positive else least) <= value <= most

    def describe(self, *, whole: bool) -> str:
        """The bounds in words, such as "finite and not below 0"."""
        if whole and self.at_most is None:
            return f"at least {self.at_least}"
        if whole:
            return f"whole and from {self.at_least} to {self.at_most}"
        if self.at_least is not None and self.at_most is not None:
            return f"from {self.at_least:g} to {self.at_most:g}"
        if self.at_least is not None:
            return f"finite and not below {self.at_least:g}"
        return "finite and above 0" if self.positive else "finite"


def number(
    default: T,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    positive: bool = False,
) -> T:
    """Field of a dataclass with a range; what is outside of it is refused before a run starts."""
    return field(default=default, metadata={"range": Range(at_least, at_most, positive)})


def numbers(*defaults: float, positive: bool = False) -> list[float]:
    """Field with a list of as many numbers as there are defaults, each within the range."""
    limits = Range(positive=positive, length=len(defaults))
    return field(default_factory=lambda: list(defaults), metadata={"range": limits})


def number_misfit(entry: dataclasses.Field, value: object) -> str | None:
    """Range of the number or numbers of a field, in words, if `value` is outside of it."""
    limits: Range | None = entry.metadata.get("range")
    if limits is None:
        return None
    whole = entry.type is int
    if limits.length is None:
        fits = limits.holds(value, whole=whole)
    elif isinstance(value, list) and len(value) == limits.length:
        fits = all(limits.holds(item, whole=whole) for item in value)
    else:
        fits = False
    return None if fits else limits.describe(whole=whole)


def check_section(
    section: Any,
    prefix: str = "",
    misfit: Callable[[dataclasses.Field, object], str | None] = number_misfit,
) -> None:
    """Refuse values of a section, and of the sections in it, that their fields do not allow.

    `section` is a dataclass of the schema, `prefix` its name with a dot ("model."), `misfit` says
    what a number must be. Raises ConfigError, which names the key and what it may be.
    """
    for entry, name, value in _values(section, prefix):
        if wanted := misfit(entry, value):
            raise ConfigError(f"{name} is {value!r}; it must be {wanted}")
        if wanted := choice_misfit(entry.type, value):
            raise ConfigError(f"{name} is {value!r}; {wanted}")


def choice_misfit(kind: Any, value: Any) -> str | None:
    """Choices of a Literal (a list holds each at most once), in words, if `value` is none."""
    if get_origin(kind) is Literal:
        *most, last = get_args(kind)
        return None if value in (*most, last) else f"use {', '.join(most)} or {last}"
    if get_origin(kind) is list and get_origin(get_args(kind)[0]) is Literal:
        choices = get_args(get_args(kind)[0])
        fits = isinstance(value, list)
        if not fits or any(item not in choices or value.count(item) > 1 for item in value):
            return f"it may hold each of {', '.join(choices)} at most once"
    return None


def _values(section: Any, prefix: str) -> Iterator[tuple[dataclasses.Field, str, Any]]:
    """Field, dotted name and value of all keys of a section and of the sections in it."""
    for entry in dataclasses.fields(section):
        name, value = f"{prefix}{entry.name}", getattr(section, entry.name)
        if dataclasses.is_dataclass(value):
            yield from _values(value, f"{name}.")
            continue
        yield entry, name, value
        for index, item in enumerate(value if isinstance(value, list) else ()):
            if dataclasses.is_dataclass(item):
                yield from _values(item, f"{name}[{index}].")
