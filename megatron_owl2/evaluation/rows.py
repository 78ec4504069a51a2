"""Rows of benchmark files and predictions, checked field by field before anything is scored.

A file is a JSON list, JSON lines, an object with the list under a key or with rows as its values,
or a table. What a field may hold is said by a reader of its value, such as `text` or
`one_of("yes", "no")`.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from megatron_owl2.errors import TaskError
from megatron_owl2.evaluation import table_files
from megatron_owl2.utils.json_text import is_json_list, parse_json, parse_json_lines

Id = int | str
T = TypeVar("T")
Reader = Callable[[Any, str], Any]  # value and name of a field to what a rule takes

_SHOWN = 60  # characters of a value in a message


class Row(dict):
    """A row with its `place` in its file, such as "line 3", which what `|` makes of it keeps."""

    __slots__ = ("place",)

    def __init__(self, content: Mapping[str, Any], place: str):
        super().__init__(content)
        self.place = place

    def __or__(self, other: Mapping[str, Any]) -> "Row":
        return Row({**self, **other}, self.place)


def place_of(row: Mapping) -> str:
    """The place of a row in brackets, to end a message with; "" if it is not known."""
    return f" ({row.place})" if isinstance(row, Row) else ""


class Misfit(ValueError):
    """A value that a field must not have; the message is the field's name and the reason."""

    def __init__(self, name: str, reason: str):
        super().__init__(f"{name!r} {reason}" if name else f"a row {reason}")
        self.name, self.reason = name, reason

    def within(self, outer: str) -> "Misfit":
        """The same of a field of an object or list: names are put together only when needed, as
        files have millions of fields."""
        if not outer:
            return self
        dot = "" if self.name.startswith("[") or not self.name else "."
        return Misfit(f"{outer}{dot}{self.name}", self.reason)


def text(value: Any, name: str) -> str:
    """A text, which may be empty."""
    if not isinstance(value, str):
        raise _misfit(value, name, "a text")
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can say a half of a surrogate pair, which no file can hold
        raise _misfit(value, name, "a text of whole characters") from None
    return value


def words(value: Any, name: str) -> str:
    """A text that is more than white space."""
    if not text(value, name).strip():
        raise _misfit(value, name, "a text")
    return value


def identifier(value: Any, name: str) -> Id:
    """A whole number or a text; 7.0, as tables write a number, is 7."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        raise _misfit(value, name, "a whole number or a text")
    return text(value, name) if isinstance(value, str) else value


def whole_number(value: Any, name: str) -> int:
    """A whole number of 0 or more, also one that is written as a text."""
    number = identifier(value, name)
    if isinstance(number, str) and number.isascii() and number.isdigit() and len(number) < 20:
        number = int(number)
    if not isinstance(number, int) or number < 0:
        raise _misfit(value, name, "a whole number")
    return number


def flag(value: Any, name: str) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise _misfit(value, name, "true or false")
    return value


def one_of(*choices: str) -> Reader:
    """One of several words, whatever their letter case and the white space around them."""

    def read(value: Any, name: str) -> str:
        word = value.strip().lower() if isinstance(value, str) else value
        if word not in choices:
            raise _misfit(value, name, " or ".join(map(repr, choices)))
        return word

    return read


def list_of(reader: Reader, at_least: int = 1) -> Reader:
    """A list of `at_least` values or more."""
    wanted = "a list with an entry" if at_least == 1 else f"a list with {at_least} entries or more"

    def read(value: Any, name: str) -> list:
        if not isinstance(value, list) or len(value) < at_least:
            raise _misfit(value, name, wanted)
        entries = []
        for entry in value:
            try:
                entries.append(reader(entry, ""))
            except Misfit as misfit:
                raise misfit.within(f"[{len(entries)}]").within(name) from None
        return entries

    return read


@dataclass(frozen=True)
class Optional:
    """A value that may be null or absent; then it is `default`."""

    reader: Reader
    default: Any = None

    def __call__(self, value: Any, name: str) -> Any:
        return self.default if value is None else self.reader(value, name)


def object_of(**fields: Reader) -> Reader:
    """An object with these fields; others are kept as they are."""

    def read(value: Any, name: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise _misfit(value, name, "an object")
        changed = {}
        for field, reader in fields.items():
            old = value.get(field)
            try:
                if field not in value and not isinstance(reader, Optional):
                    raise Misfit(field, f"is missing; {_keys(value)}")
                new = reader(old, field)
            except Misfit as misfit:
                raise misfit.within(name) from None
            if new is not old or field not in value:
                changed[field] = new
        return value | changed if changed else value  # copies of millions of rows take time

    return read


def read_rows(path: Path, fields: Mapping[str, Reader], key: str | None = None) -> list[dict]:
    """Rows of a file with the values of `fields` as their readers give them.

    The rows lie under `key` of an object if one is given. Raises TaskError naming the file, the
    place and the field.
    """
    return _checked(path, object_of(**fields), _placed_rows(path, key))


def read_object(path: Path, reader: Reader) -> dict[str, Any]:
    """{name: value} of a file that is one object, its values as `reader` gives them.

    Raises TaskError as `read_rows` does, and for a name that comes twice.
    """
    content = _read(path, lambda data: parse_json(data, _without_repeats))
    if not isinstance(content, dict):
        raise TaskError(f"{path} is not in the format that the task reads: it must be an object")
    values = _checked(path, reader, [(f"entry {name!r}", row) for name, row in content.items()])
    return dict(zip(content, values, strict=True))


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        repeated = next(name for name, n in Counter(name for name, _ in pairs).items() if n > 1)
        raise ValueError(f"an object has {short(repr(repeated))} twice")
    return table


def _checked(path: Path, read: Reader, placed: Iterable[tuple[str, Any]]) -> list[Any]:
    rows = []
    for place, row in placed:
        try:
            value = read(row, "")
            rows.append(Row(value, place) if isinstance(value, dict) else value)
        except Misfit as misfit:
            raise TaskError(
                f"{path} is not in the format that the task reads: {misfit} ({place})"
            ) from None
    return rows


def rows_by_id(path: Path, rows: list[dict], field: str) -> dict[Id, dict]:
    """Rows by their value of `field`; raises TaskError naming `path` and the places of one that
    comes twice."""
    table = {row[field]: row for row in rows}
    if len(table) < len(rows):
        repeated = next(i for i, n in Counter(row[field] for row in rows).items() if n > 1)
        places = [row.place for row in rows if row[field] == repeated and isinstance(row, Row)]
        where = f" ({' and '.join(places[:2])})" if places else ""
        raise TaskError(
            f"{path}: {len(rows) - len(table)} rows repeat a {field}, such as {repeated!r}{where}"
        )
    return table


def with_ids_of(known: Iterable[Id], table: dict[Id, T]) -> dict[Id, T]:
    """The table with ids that are numbers where `known` has them as texts, or the reverse.

    Nothing changes if two ids of either would become one.
    """
    known = list(known)
    spelled = {str(i): i for i in known}
    renamed = {spelled.get(str(i), i): value for i, value in table.items()}
    return renamed if len(spelled) == len(known) and len(renamed) == len(table) else table


def read_value(path: Path, key: str) -> Any:
    """A value of the object in a file whose rows lie under another key, None if it has none."""
    content = _read(path, parse_json)
    return content.get(key) if isinstance(content, dict) else None


def _placed_rows(path: Path, key: str | None) -> list[tuple[str, Any]]:
    """Place, for messages, and content of every row."""
    if path.suffix.lower() in table_files.SUFFIXES:
        return table_files.read_table(path)
    if key is None:
        return _read(path, _list_or_lines)
    content = _read(path, parse_json)
    rows = content.get(key) if isinstance(content, dict) else None
    if not isinstance(rows, list):
        has = f"; {_keys(content)}" if isinstance(content, dict) else ""
        raise TaskError(
            f"{path} is not in the format that the task reads: it must be an object with a list "
            f"{key!r}{has}"
        )
    return [(f"entry {number} of {key!r}", row) for number, row in enumerate(rows, start=1)]


def _list_or_lines(data: bytes) -> list[tuple[str, Any]]:
    if is_json_list(data):
        return [(f"entry {number}", row) for number, row in enumerate(parse_json(data), start=1)]
    try:
        return [(f"line {number}", row) for number, row in parse_json_lines(data)]
    except ValueError:
        with suppress(ValueError):  # one object over several lines
            return [("the only entry", parse_json(data))]
        raise


def _read(path: Path, parse: Callable[[bytes], T]) -> T:
    try:
        return parse(path.read_bytes())
    except OSError as error:
        raise TaskError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise TaskError(f"{path} cannot be read: it is not JSON: {error}") from None


def _keys(content: dict) -> str:
    """What an object has instead of a missing field."""
    return f"it has {short(', '.join(map(repr, content)) or 'no field')}"


def short(text: str) -> str:
    """The beginning of a text, for a message."""
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def _misfit(value: Any, name: str, wanted: str) -> Misfit:
    return Misfit(name, f"is {short(repr(value))}, wanted {wanted}")
