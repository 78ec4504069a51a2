"""Piece of a table, which one process reads."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Piece:
    """`rows` rows of a table from row number `first` on, which begins at byte `offset` (text)."""

    path: Path
    columns: tuple[str, ...]
    first: int
    rows: int
    offset: int
    identity: str
