"""Plain texts: JSON lines {"text": ...}, as text corpora from the web are published."""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import xxhash

from data_prep.formats.common.inputs import refuse_images, sanitize_name
from data_prep.formats.common.tables import cut_lines
from data_prep.formats.format import Format
from data_prep.splits import InputPlan, InputSplit, ReadOptions, Skipped
from megatron_owl2.data.shards.records import Record
from megatron_owl2.errors import BadSampleError, PreprocessError


class Documents:
    """Plain texts without images; the text becomes the caption of a record."""

    name = "documents"

    def plan(self, source: Path, options: ReadOptions) -> InputPlan:
        """One split for every `options.samples_per_split` lines.

        Raises PreprocessError if `source` is not a file.
        """
        refuse_images(options, "documents have no images")
        if not source.is_file():
            raise PreprocessError(f"{source} is not a file; name the JSON lines file")
        digest, rows = xxhash.xxh3_128(), options.samples_per_split
        with source.open("rb") as file:
            starts, _ = cut_lines(file, rows, digest)
        name = sanitize_name(source.stem)
        splits = [
            InputSplit(
                f"{name}-{index:05d}",
                f"{digest.hexdigest()} from {index * rows}",
                (source, start, index * rows, rows),
                source,
            )
            for index, start in enumerate(starts)
        ]
        return InputPlan(splits)

    def read(self, payload: tuple[Path, int, int, int]) -> Iterator[Record | Skipped]:
        """Records of consecutive lines; the key is the line's number in the file, from 0."""
        source, start, first, count = payload
        with source.open("rb") as file:
            file.seek(start)
            for number, line in enumerate(islice(file, count), first):
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


FORMATS: tuple[Format, ...] = (Documents(),)
