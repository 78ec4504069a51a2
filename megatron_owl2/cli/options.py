"""Values of command-line options: text to a number in its range, or argparse's error."""

import argparse
import math


def count(text: str) -> int:
    """A whole number of 1 or more."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number


def positive(text: str) -> float:
    """A finite number above 0."""
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number


def fraction(text: str) -> float:
    """A number from 0 to 1."""
    number = float(text)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to 1")
    return number


def score_limit(text: str) -> tuple[str, float]:
    """The name and the limit of `NAME=VALUE`."""
    name, _, value = text.rpartition("=")
    try:
        limit = float(value)
    except ValueError:
        limit = math.nan
    if not name or not math.isfinite(limit):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=NUMBER")
    return name, limit
