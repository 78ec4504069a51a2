"""Reads plain texts: JSON lines {"text": ...}, as text corpora from the web are published."""

import hashlib
import json
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from megatron_owl2.data.records import BadSampleError, Record
from megatron_owl2.preprocess.parts import Part, PreprocessError, ReadOptions, Skipped


def plan(source: Path, options: ReadOptions) -> list[Part]:
    """One part for every `options.samples_per_part` lines.

    Raises PreprocessError if `source` is not a file.
    """
    if options.images is not None:
        raise PreprocessError("documents have no pictures; leave out --images")
    if not source.is_file():
        raise PreprocessError(f"{source} is not a file; name the JSON lines file")
    with source.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(0)
        lines = sum(1 for _ in file)
    name = re.sub(r"[^A-Za-z0-9_-]", "_", source.stem)
    return [
        Part(
            f"{name}-{start // options.samples_per_part:05d}",
            f"{digest} from {start}",
            (source, start, options.samples_per_part),
        )
        for start in range(0, lines, options.samples_per_part)
    ]


def read(payload: tuple[Path, int, int]) -> Iterator[Record | Skipped]:
    """The records of a run of lines; the key is the line's number in the file, from 0."""
    source, start, count = payload
    with source.open("rb") as file:
        for number, line in enumerate(islice(file, start, start + count), start):
            where = f"line {number + 1}"
            try:
                text = json.loads(line)["text"]
            except (ValueError, TypeError, KeyError, RecursionError):
                yield Skipped("not a JSON object with a text", where)
                continue
            try:
                yield Record(f"{number:09d}", caption=text, source=source.stem)
            except BadSampleError as error:
                yield Skipped(str(error), where)
