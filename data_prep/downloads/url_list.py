"""List of the addresses of a corpus to download: filtered, sampled, counted by reason.

Works on columns (a row costs about a microsecond) and keeps one batch of rows in memory.
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from data_prep.corpus_files import UnreadFile, count_unread, describe_unread
from data_prep.downloads import img2dataset_script as download
from data_prep.downloads.corpus import Corpus
from data_prep.downloads.published import Published
from data_prep.downloads.selection import Selection, judgements
from data_prep.formats.common import parquet, tables
from megatron_owl2.data.sampling.keyed_random import combine, splitmix64_array
from megatron_owl2.errors import PreprocessError
from megatron_owl2.utils.files import new_directory
from megatron_owl2.utils.json_text import parse_json

REPORT = "report.json"
_ROWS_PER_FILE = 1_000_000  # img2dataset loads a file of the list at once
_BUCKET_BITS = 20


@dataclass(frozen=True)
class ListReport:
    """Report on a list: rows read, rows listed, rows left out by reason, columns, [name, rows] of
    the files, and by reason the files of the corpus that were not read (their number, and
    examples). The names of the fields are the keys of report.json."""

    rows: int
    listed: int
    left_out: dict[str, int]
    columns: list[str]
    files: list[list]
    unread: dict[str, dict[str, Any]] = field(default_factory=dict)  # not in older reports

    def __str__(self) -> str:
        lines = [f"listed {self.listed} of {self.rows} rows"]
        for reason, count in sorted(self.left_out.items(), key=lambda item: (-item[1], item[0])):
            lines.append(f"  {count} x {reason}")
        lines += describe_unread(self.unread)
        return "\n".join(lines)


def write_url_list(
    corpus: Corpus,
    source: Path,
    output: Path,
    selection: Selection,
    options: download.Options,
) -> tuple[ListReport, bool]:
    """Report on the list that is written to `output`, and False if that was done before.

    Writes urls-NNNNN.parquet, download.sh and report.json. `source` is a file of the corpus or the
    folder of all of them. Raises PreprocessError if it does not have the columns, if no row is
    left, or if `output` was made with other options.
    """
    paths, unread = tables.files(source, output)
    published = Published(corpus, paths)
    for name in (*selection.min_score, *selection.max_score):
        published.check(name, corpus.scores, "score")
    for name in selection.only:
        published.check(name, corpus.labels, "label")
    if (selection.min_side or selection.max_aspect) and not published.has_size:
        raise PreprocessError(f"{corpus.name} does not publish sizes; filter after the download")
    arguments = {
        "corpus": corpus.name,
        "input": [[str(path.resolve()), path.stat().st_size] for path in published.paths],
        "selection": asdict(selection),
        "download": asdict(options),
    }
    if (output / REPORT).exists():
        return _existing(output, arguments), False
    with new_directory(output) as partial:
        report = _write(published, partial, selection, unread)
        script = download.script(corpus, report.columns, report.files, selection, options)
        (partial / download.SCRIPT).write_text(script)
        body = {"arguments": arguments} | asdict(report)
        (partial / REPORT).write_text(json.dumps(body, indent=1) + "\n")
    return report, True


def read_report(folder: Path) -> ListReport:
    """Report of a finished list."""
    body = _read(folder)
    del body["arguments"]
    return ListReport(**body)


def _read(folder: Path) -> dict:
    """Contents of a list's report.json, which its arguments are in as well."""
    try:
        body = parse_json((folder / REPORT).read_bytes())
    except ValueError:
        body = None
    names = {"arguments", "unread", *(entry.name for entry in fields(ListReport))}
    if not isinstance(body, dict) or body.keys() | {"unread"} != names:
        body = {"arguments": None}
    if all(isinstance(body.get(key, {}), dict) for key in ("arguments", "unread")):
        return body
    raise PreprocessError(f"{folder / REPORT} is damaged; delete {folder} and start again")


def _existing(output: Path, arguments: dict) -> ListReport:
    found = _read(output)["arguments"]
    wanted = json.loads(json.dumps(arguments))
    if found != wanted:
        different = [name for name in wanted if found.get(name) != wanted[name]]
        raise PreprocessError(
            f"{output} is a list made with another {' and '.join(different)}; choose another "
            "--output or delete it"
        )
    return read_report(output)


def _write(
    published: Published, folder: Path, selection: Selection, unread: list[UnreadFile]
) -> ListReport:
    left_out: Counter[str] = Counter()
    draw = _Draw(selection.seed)
    if selection.sample is not None:
        first_pass = tqdm(
            _kept(published, selection, Counter()), "draw", unit="batch", disable=None
        )
        for start, mask, _ in first_pass:
            draw.count(start, mask)
        draw.choose(selection.sample)
    writer = _Files(folder)
    rows = 0
    for start, mask, table in tqdm(
        _kept(published, selection, left_out), "list", unit="batch", disable=None
    ):
        rows = start + len(mask)
        if selection.sample is not None:
            drawn = draw.drawn(start, mask)
            left_out["not drawn"] += int(mask.sum() - drawn.sum())
            mask = drawn
        writer.write(table, mask)
    writer.close()
    rows += published.left_out.total()
    left_out += published.left_out
    report = ListReport(
        rows,
        sum(count for _, count in writer.files),
        {reason: count for reason, count in left_out.items() if count},
        published.columns,
        writer.files,
        count_unread(unread),
    )
    if not writer.files:
        raise PreprocessError(f"no row of {published.paths[0]} is left: {report}")
    return report


def _kept(
    published: Published, selection: Selection, left_out: Counter[str]
) -> Iterator[tuple[int, np.ndarray, object]]:
    """Batches as (number of the first row, mask of the rows that stay: bool [rows], rows)."""
    start = 0
    for table in published.batches():
        kept = np.ones(table.num_rows, dtype=bool)
        for reason, bad in judgements(table, selection):
            left_out[reason] += int((kept & bad).sum())
            kept &= ~bad
        yield start, kept, table
        start += table.num_rows


class _Draw:
    """Draw of exactly n of the rows that stay, in two passes and 8 MB.

    Drawn are the least priorities, where the priority is a hash of the row's number; rows of the
    last bucket are taken in order.
    """

    def __init__(self, seed: int):
        self._key = np.uint64(combine(seed))
        self._counts = np.zeros(1 << _BUCKET_BITS, dtype=np.int64)
        self._last, self._room = len(self._counts), 0

    def count(self, start: int, mask: np.ndarray) -> None:
        self._counts += np.bincount(self._buckets(start, mask)[mask], minlength=len(self._counts))

    def choose(self, wanted: int) -> None:
        total = np.cumsum(self._counts)
        if wanted < total[-1]:
            self._last = int(np.searchsorted(total, wanted))
            self._room = int(wanted - total[self._last] + self._counts[self._last])

    def drawn(self, start: int, mask: np.ndarray) -> np.ndarray:
        buckets = self._buckets(start, mask)
        edge = np.flatnonzero(mask & (buckets == self._last))[: self._room]
        self._room -= len(edge)
        drawn = mask & (buckets < self._last)
        drawn[edge] = True
        return drawn

    def _buckets(self, start: int, mask: np.ndarray) -> np.ndarray:
        rows = np.arange(start, start + len(mask), dtype=np.uint64)
        buckets = splitmix64_array(rows ^ self._key) >> np.uint64(64 - _BUCKET_BITS)
        return buckets.astype(np.int64)


class _Files:
    """Parquet files of the list."""

    def __init__(self, folder: Path):
        self.files: list[list] = []
        self._folder = folder
        self._writer = None

    def write(self, table, mask: np.ndarray) -> None:
        import pyarrow as pa

        table = table.filter(pa.array(mask)).drop_columns(
            [name for name in ("width", "height") if name in table.column_names]
        )
        while table.num_rows:
            if self._writer is None:
                name = f"urls-{len(self.files):05d}.parquet"
                self._writer = parquet.import_pyarrow().ParquetWriter(
                    self._folder / name, table.schema
                )
                self.files.append([name, 0])
            head = table.slice(0, _ROWS_PER_FILE - self.files[-1][1])
            self._writer.write_table(head)
            self.files[-1][1] += head.num_rows
            table = table.slice(head.num_rows)
            if self.files[-1][1] == _ROWS_PER_FILE:
                self.close()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
