"""Hint at the known word nearest to one that is not known, for error messages."""

import difflib
from collections.abc import Iterable


def did_you_mean(word: str, known: Iterable[str], prefix: str = "") -> str:
    """`did you mean 'prefix + nearest'?`, or the list of all known words if none is near."""
    known = list(known)
    near = difflib.get_close_matches(word, known, n=1)
    return f"did you mean '{prefix}{near[0]}'?" if near else f"known: {', '.join(known)}"
