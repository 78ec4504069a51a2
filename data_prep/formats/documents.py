"""Plain texts: JSON lines {"text": ...}, as text corpora from the web are published."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import xxhash

from data_prep.formats.common import tables
from data_prep.formats.common.encodings import check_text
from data_prep.formats.common.inputs import refuse_columns, refuse_images, shown
from data_prep.formats.format import Format
from data_prep.splits import InputPlan, InputSplit, ReadOptions, Skipped
from megatron_owl2.data.shards.records import Record
from megatron_owl2.errors import BadSampleError
from megatron_owl2.utils.json_text import parse_json


class Documents:
    """Plain texts without images; the text becomes the caption of a record."""

    name = "documents"

    def plan(self, source: Path, options: ReadOptions) -> InputPlan:
        """One split for every `options.samples_per_split` lines of every file.

        Raises PreprocessError if there is no file of JSON lines.
        """
        refuse_images(options, "documents have no images")
        refuse_columns(options)
        if source.is_file():
            paths, unread = [source], []  # whatever its name is
        else:
            paths, unread = tables.files(source, options.output, (".jsonl",))
        splits = [split for path in paths for split in _splits(source, path, options)]
        return InputPlan(splits, unread)

    def read(self, payload: tuple[Path, int, int, int]) -> Iterator[Record | Skipped]:
        """Records of consecutive lines; the key is the line's number in the file, from 0."""
        source, start, first, count = payload
        with source.open("rb") as file:
            file.seek(start)
            for number, line in enumerate(islice(file, count), first):
                where = f"{source.name}, line {number + 1}"
                if not line.strip():
                    yield Skipped("empty line", where)
                    continue
                try:
                    row = parse_json(line)
                except ValueError as error:
                    yield Skipped("line is not JSON", f"{where}: {error}")
                    continue
                text = row.get("text") if isinstance(row, dict) else None
                if not isinstance(text, str):
                    yield Skipped("not an object with a text", f"{where}: {shown(row)}")
                    continue
                try:
                    text = text.strip("\ufeff")  # byte order marks, which are no part of it
                    yield Record(f"{number:09d}", caption=text, source=source.stem)
                except BadSampleError as error:
                    yield Skipped(str(error), where)


def _splits(source: Path, path: Path, options: ReadOptions) -> Iterator[InputSplit]:
    check_text(path)
    digest, rows = xxhash.xxh3_128(), options.samples_per_split
    with path.open("rb") as file:
        starts, _ = tables.cut_lines(file, rows, digest)
    for index, start in enumerate(starts):
        yield InputSplit(
            f"{tables.name_in(source, path)}-{index:05d}",
            f"{digest.hexdigest()} from {index * rows}",
            (path, start, index * rows, rows),
            path,
        )


FORMATS: tuple[Format, ...] = (Documents(),)
