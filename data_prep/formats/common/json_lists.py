"""Large JSON lists, cut into lists of a few entries without holding what they stand for."""

import json
import re
from collections.abc import Iterator

_SPACE = re.compile(r"[ \t\r\n]*")


def cut_list(data: bytes, entries: int) -> Iterator[tuple[int, str]]:
    """Number of the first entry, and the text, of every list of `entries` (the last: fewer).

    Raises ValueError with the reason, at the fault, if the data are not a JSON list.
    """
    text = data.decode(json.detect_encoding(data))
    decoder = json.JSONDecoder()
    position = _after_space(text, 0)
    if not text.startswith("[", position):
        raise ValueError("it is not a list")
    start = position = _after_space(text, position + 1)
    if text.startswith("]", position):
        return
    number, closed = 0, False
    while not closed:
        try:
            _, position = decoder.raw_decode(text, position)
        except RecursionError:
            raise ValueError("it is nested too deeply") from None
        number += 1
        end, position = position, _after_space(text, position)
        closed = text.startswith("]", position)
        if not closed and not text.startswith(",", position):
            raise ValueError(f"entry {number} is not followed by a comma: char {position}")
        if closed or number % entries == 0:
            yield (number - 1) // entries * entries, f"[{text[start:end]}]"
            start = _after_space(text, position + 1)
        position = _after_space(text, position + 1)
    if position < len(text):
        raise ValueError(f"more follows after the list: char {position}")


def _after_space(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    assert match is not None  # it matches nothing as well
    return match.end()
