"""Command-line options that several verbs have, and values in their range."""

import argparse
import math
from collections.abc import Callable


def add_model(parser: argparse.ArgumentParser) -> None:
    """The options of the model that a verb asks, for `inference.loading.load_model`."""
    parser.add_argument("--checkpoint", required=True, help="run directory, iter_* or HF export")
    parser.add_argument("--adapter", help="directory of peft, to be merged into the weights")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")


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
