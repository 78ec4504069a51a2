"""Encodings of text files: only UTF-8 is read, and others are told by name."""

import codecs
from pathlib import Path

from data_prep.formats.common.compression import compression_of_file, how_to_unpack, why_not_data
from megatron_owl2.errors import PreprocessError

_HEAD_BYTES = 1 << 16
# Zeros among the first four bytes in UTF-16 and UTF-32, of either byte order.
_ZEROS = (
    [False, True, False, True],
    [True, False, True, False],
    [False, True, True, True],
    [True, True, True, False],
)


def check_data(path: Path) -> bytes:
    """First bytes of a file that holds data and is not compressed; raises PreprocessError."""
    if kind := compression_of_file(path):
        raise PreprocessError(how_to_unpack(path, kind))
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    if not head.strip():
        raise PreprocessError(f"{path} is empty")
    if reason := why_not_data(head):
        raise PreprocessError(f"{path} is {reason}")
    return head


def check_text(path: Path) -> None:
    """Check that a file is text in UTF-8 and not compressed; raises PreprocessError."""
    head = check_data(path)
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or _zeros_alternate(head):
        raise PreprocessError(f"{path} is text in UTF-16 or UTF-32; save it in UTF-8")
    name = path.suffix.lower()
    if name != ".csv" and b"\r" in head and b"\n" not in head:
        raise PreprocessError(f"{path}: lines end with a carriage return; save it with line feeds")
    if name == ".jsonl" and head.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
        raise PreprocessError(
            f"{path} is a JSON list, not JSON lines; write each of its objects into a line"
        )


def _zeros_alternate(head: bytes) -> bool:
    """Whether a text without a byte order mark is in UTF-16 or UTF-32: it begins with two Latin
    letters or, after others, is mostly of them."""
    if [byte == 0 for byte in head[:4]] in _ZEROS:
        return True
    places = [head[first::4] for first in range(4)]
    shares = [place.count(0) / max(1, len(place)) for place in places]
    return max(shares) > 0.5 and min(shares) < 0.1
