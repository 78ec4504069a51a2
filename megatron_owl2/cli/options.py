"""Values of command-line options: text to a number in its range, or argparse's error."""

import argparse
import math
from collections.abc import Callable


def number(text: str, kind: Callable[[str], float] = float) -> float:
    """The number that a text is, or NaN, which is in no range, so that options tell theirs."""
    try:
        return kind(text)
    except ValueError:
        return math.nan


def count(text: str) -> int:
    """A whole number of 1 or more."""
    value = number(text, int)
    if not value >= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive whole number")
    return int(value)


def positive(text: str) -> float:
    """A finite number above 0."""
    value = number(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def fraction(text: str) -> float:
    """A number from 0 to 1."""
    value = number(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to 1")
    return value


def score_limit(text: str) -> tuple[str, float]:
    """The name and the limit of `NAME=VALUE`."""
    name, _, value = text.rpartition("=")
    limit = number(value)
    if not name or not math.isfinite(limit):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=NUMBER")
    return name, limit
