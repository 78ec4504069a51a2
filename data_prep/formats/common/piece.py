"""Piece of a table, which one process reads."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_owl2.errors import PreprocessError


@dataclass(frozen=True)
class Piece:
    """`rows` rows of a table from row number `first` on, which begins at byte `offset` (text)."""

    path: Path
    columns: tuple[str, ...]
    first: int
    rows: int
    offset: int
    identity: str


def check_names(path: Path, columns: Sequence[str]) -> None:
    """Check that no two columns have one name; raises PreprocessError.

    Columns without a name, which spreadsheets leave at the end, may be several.
    """
    twice = sorted(name for name, count in Counter(columns).items() if name and count > 1)
    if twice:
        raise PreprocessError(f"{path} has the column {twice[0]!r} twice; rename one of them")
