"""Files of conversations, as a JSON list or JSON lines; an entry becomes a sample."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from data_prep.formats.common.conversation_records import conversation_record, names_files
from data_prep.formats.common.encodings import check_data
from data_prep.formats.common.inputs import (
    SkipError,
    images_folder,
    refuse_columns,
    sanitize_name,
    shown,
    skipped,
)
from data_prep.splits import InputPlan, InputSplit, ReadOptions, Skipped
from megatron_owl2.data.shards.records import Record
from megatron_owl2.errors import BadSampleError, PreprocessError
from megatron_owl2.utils.json_text import is_json_list, json_lines, parse_json

# Lists and objects in each other; pickle, by which entries are sent, bears about 500.
_DEEPEST = 100
_NESTING = (dict, list)


@dataclass(frozen=True)
class ConversationFiles:
    """Conversations about any number of images; questions and answers alternate.

    `fields` are the keys of which an entry has at least one; `as_conversation` gives the entry in
    the form of LLaVA or OpenAI, and raises SkipError if it cannot.
    """

    name: str
    fields: tuple[str, ...]
    as_conversation: Callable[[dict], dict]

    def plan(self, source: Path, options: ReadOptions) -> InputPlan:
        """One split for every `options.samples_per_split` entries of the file.

        Raises PreprocessError if the file holds no list, or names image files and `options.images`
        is None.
        """
        refuse_columns(options)
        if not source.is_file():
            raise PreprocessError(
                f"{source} is not a file; name the JSON file of the conversations"
            )
        check_data(source)
        data = source.read_bytes()
        unit, entries = _parse(data, source, self.fields)
        entries = [(n, _Fault.DEEP if _is_deep(entry) else entry) for n, entry in entries]
        images = options.images
        if images or any(names_files(entry) for _, entry in entries):
            images = images_folder(source, options)
        digest = hashlib.sha256(data).hexdigest()
        name = sanitize_name(source.stem)
        splits = [
            InputSplit(
                f"{name}-{start // options.samples_per_split:05d}",
                f"{digest} from {start}",
                (unit, entries[start : start + options.samples_per_split], images, source),
                source,
            )
            for start in range(0, len(entries), options.samples_per_split)
        ]
        return InputPlan(splits)

    def read(self, payload: tuple[str, list, Path | None, Path]) -> Iterator[Record | Skipped]:
        """Records of consecutive entries, as `conversation_record` makes them; the key is the
        number of the line in the file, from 1, or of the entry in its list, from 0."""
        unit, entries, images, source = payload
        for number, entry in entries:
            name = entry.get("id") if isinstance(entry, dict) else None
            where = f"{source.name}, {unit} {number}, id {shown(name)}"
            if isinstance(entry, _Fault):
                yield Skipped(entry.value, where)
                continue
            try:
                if not isinstance(entry, dict):
                    raise SkipError("entry is not an object")
                conversation = self.as_conversation(entry)
                yield conversation_record(number, conversation, images, source.stem)
            except (SkipError, BadSampleError) as error:
                yield skipped(error, where)


class _Fault(Enum):
    """Stand-in for an entry that cannot be used, and the reason."""

    BROKEN = "line is not JSON"
    DEEP = "entry is nested too deeply"


def _is_deep(entry: Any) -> bool:
    level = [entry] if isinstance(entry, _NESTING) else []
    for _ in range(_DEEPEST):
        inside = (outer.values() if isinstance(outer, dict) else outer for outer in level)
        level = [inner for values in inside for inner in values if isinstance(inner, _NESTING)]
        if not level:
            return False
    return True


def _parse(data: bytes, source: Path, fields: tuple[str, ...]) -> tuple[str, list[tuple[int, Any]]]:
    """What the numbers count, lines or entries of a list, and number and content of every entry."""
    try:
        if is_json_list(data):
            entries = list(enumerate(parse_json(data)))
            if not entries:
                raise PreprocessError(f"{source} holds no conversation: its list is empty")
            return "entry", entries
        entries = []
        for number, line in json_lines(data):
            try:
                entries.append((number, parse_json(line)))
            except ValueError:
                entries.append((number, _Fault.BROKEN))
    except ValueError as error:
        raise PreprocessError(f"{source} is not JSON: {error}") from None
    if not any(isinstance(entry, dict) for _, entry in entries):
        raise PreprocessError(f"{source} is not JSON of conversations, neither a list nor lines")
    if len(entries) == 1 and entries[0][1].keys().isdisjoint(fields):
        keys = ", ".join(list(entries[0][1])[:5])
        raise PreprocessError(
            f"{source} must hold a list of conversations; it holds one object ({keys})"
        )
    return "line", entries
