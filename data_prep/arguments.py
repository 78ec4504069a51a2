"""Values of command-line options that several tools have."""

import argparse
import math


def score_limit(text: str) -> tuple[str, float]:
    """Name and limit of `NAME=VALUE`; raises ArgumentTypeError for anything else."""
    name, _, value = text.rpartition("=")
    try:
        limit = float(value)
    except ValueError:
        limit = math.nan
    if not name or not math.isfinite(limit):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=NUMBER")
    return name, limit
