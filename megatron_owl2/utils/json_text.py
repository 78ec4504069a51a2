"""JSON that users give: one kind of error, whatever is wrong with it."""

import codecs
import json
from collections.abc import Callable, Iterator
from typing import Any


def parse_json(
    data: bytes | str, make_object: Callable[[list[tuple[str, Any]]], Any] | None = None
) -> Any:
    """Content of a JSON text in UTF-8, UTF-16 or UTF-32, with or without a byte order mark.

    `make_object` gives the value of an object with these pairs of names and values; without it that
    is a dictionary.
    Raises ValueError with the reason, for a text that is nested too deeply as well.
    """
    try:
        text = data.removeprefix("\ufeff") if isinstance(data, str) else data
        return json.loads(text, object_pairs_hook=make_object)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        where = f" (line {line})" if b"\n" in error.object else ""
        raise ValueError(f"it is not text in UTF-8{where}") from None


def parse_json_lines(data: bytes) -> list[tuple[int, Any]]:
    """Numbers, from 1, and contents of the lines of JSON lines; empty lines are passed over.

    Line feeds and carriage returns end a line, since JSON holds others inside its texts. Raises
    ValueError with the number of the line and the reason, or for text that is not in UTF-8 or
    UTF-16.
    """
    rows = []
    for number, line in json_lines(data):
        try:
            rows.append((number, parse_json(line)))
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from None
    return rows


def json_lines(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Numbers, from 1, and texts of lines that are not empty; raises ValueError for text that is
    said to be UTF-16 and is not."""
    if data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        data = data.decode("utf-16").encode()
    for number, line in enumerate(data.splitlines(), start=1):
        if line.strip(b" \t\r\xef\xbb\xbf"):
            yield number, line


def is_json_list(data: bytes) -> bool:
    """Whether a text begins a list, after a byte order mark or in UTF-16."""
    return data.lstrip(b"\xef\xbb\xbf\xff\xfe\0 \t\r\n").startswith(b"[")
