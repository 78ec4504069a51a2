"""Suggestions for names that do not exist."""

import difflib
from collections.abc import Collection


def did_you_mean(name: object, known: Collection[str], prefix: str = "") -> str:
    """The nearest known name as a question, or all of them if none is near.

    `prefix` is written before the nearest name.
    """
    near = difflib.get_close_matches(str(name), known, n=1)
    return f"did you mean '{prefix}{near[0]}'?" if near else f"known: {', '.join(known)}"
