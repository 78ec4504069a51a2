"""Tables of a published corpus, read in batches under the column names that it declares."""

import codecs
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.downloads.corpus import Corpus
from data_prep.formats.common import parquet, tables
from data_prep.formats.common.encodings import check_text
from megatron_owl2.errors import PreprocessError

_BATCH = 1 << 16  # rows
_BLOCK = 1 << 24  # bytes


class Published:
    """Tables of a corpus; `batches` can be iterated as often as needed.

    `columns` are the scores and labels, the hash and the boxes that this version has. Raises
    PreprocessError if there is no address or caption.
    """

    def __init__(self, corpus: Corpus, paths: Sequence[Path]):
        parquet.import_pyarrow()
        self.corpus = corpus
        self.paths = paths
        self.left_out: Counter[str] = Counter()  # rows that the last pass could not read
        self._names = _resolve(corpus, paths[0], _columns(corpus, paths[0]))
        self._schema = None

    @property
    def columns(self) -> list[str]:
        return [n for n in self._names if n not in ("url", "caption", "width", "height")]

    @property
    def has_size(self) -> bool:
        return {"width", "height"} <= self._names.keys()

    def check(self, name: str, declared: dict[str, str], kind: str) -> None:
        """Check of a score or label; raises PreprocessError if these tables lack it."""
        if name not in declared or name not in self._names:
            known = [f"{n} ({declared[n]})" for n in self._names if n in declared]
            raise PreprocessError(
                f"{self.paths[0]} has no {kind} {name}; it has: {', '.join(known) or 'none'}"
            )

    def batches(self) -> Iterator:
        """pyarrow tables of up to 65,536 rows with `url`, `caption` (without the white space around
        it), `width` and `height` if published, and `columns`."""
        import pyarrow as pa
        import pyarrow.compute

        pc: Any = pyarrow.compute  # its functions are made at run time
        self.left_out.clear()
        for path in self.paths:
            names = _resolve(self.corpus, path, _columns(self.corpus, path))
            if names.keys() != self._names.keys():
                raise PreprocessError(
                    f"{path} has other columns than {self.paths[0]}: two versions of the corpus? "
                    "List them apart"
                )
            try:
                for batch in self._read(path, list(names.values())):
                    table = pa.Table.from_batches([batch])
                    table = table.select(list(names.values())).rename_columns(list(names))
                    table = self._readable(table)
                    for index, text in enumerate(("url", "caption")):
                        column = pc.utf8_trim_whitespace(table[text].cast("string"))
                        table = table.set_column(index, text, column)
                    if self._schema is None:
                        self._schema = table.schema.remove_metadata()
                    yield table.cast(self._schema)
            except pa.ArrowException:
                raise PreprocessError(f"{path} is cut or damaged, or not as published") from None
            except OSError as error:
                reason = error.strerror or "it is cut or damaged"
                raise PreprocessError(f"{path} cannot be read: {reason}") from None

    def _read(self, path: Path, columns: list[str]) -> Iterator:
        if tables.kind_of(path) == ".parquet":
            with parquet.open_parquet(path) as file:
                yield from file.iter_batches(_BATCH, columns=columns)
            return
        import pyarrow as pa
        import pyarrow.compute

        # pyarrow's reader of text decodes the rows that it leaves out, and fails at a wrong byte.
        pc: Any = pyarrow.compute
        header = self.corpus.header
        for lines in _lines(path):
            cells = pc.split_pattern(pa.array(filter(None, lines), pa.binary()), "\t")
            whole = pc.equal(pc.list_value_length(cells), len(header))
            self.left_out["row has another number of columns"] += len(cells) - whole.true_count
            cells = cells.filter(whole)
            values = [pc.list_element(cells, index) for index in range(len(header))]
            yield pa.record_batch(values, names=list(header))

    def _readable(self, table):
        """Rows whose address and caption are UTF-8; the others are counted."""
        for name in ("url", "caption"):
            bad = _not_utf8(table[name])
            if bad.any():
                self.left_out["row is not UTF-8"] += int(bad.sum())
                table = table.filter(~bad)
        return table


def _lines(path: Path) -> Iterator[list[bytes]]:
    """Lines of a file, a block of them at a time."""
    with path.open("rb") as file:
        file.seek(len(codecs.BOM_UTF8) if file.read(3) == codecs.BOM_UTF8 else 0)
        rest = b""
        while block := file.read(_BLOCK):
            head, end, rest = (rest + block).rpartition(b"\n")
            yield (head + end).splitlines()
        yield rest.splitlines()


def _not_utf8(column) -> np.ndarray:
    """Mask of the values that are not UTF-8: bool [rows]."""
    import pyarrow as pa

    try:
        column.cast("string").validate(full=True)
    except pa.ArrowInvalid:
        return np.array([not _is_utf8(value) for value in column.cast("binary").to_pylist()])
    return np.zeros(len(column), dtype=bool)


def _is_utf8(value: bytes | None) -> bool:
    try:
        (value or b"").decode()
    except UnicodeDecodeError:
        return False
    return True


def _columns(corpus: Corpus, path: Path) -> Sequence[str]:
    if tables.kind_of(path) == ".parquet":
        with parquet.open_parquet(path) as file:
            return file.schema_arrow.names
    if tables.kind_of(path) != ".tsv" or not corpus.header:
        raise PreprocessError(f"{path} is not a file of {corpus.name}: {corpus.about}")
    check_text(path)
    return corpus.header


def _resolve(corpus: Corpus, path: Path, columns: Sequence[str]) -> dict[str, str]:
    """Names of the file's columns by the declared names, for those that it has."""
    lower = {name.lower(): name for name in columns}
    usual = {
        "url": corpus.url,
        "caption": corpus.caption,
        "width": corpus.width,
        "height": corpus.height,
    }
    more = [*corpus.scores, *corpus.labels, corpus.sha256, corpus.faces]
    usual |= {name: (name,) for name in more if name is not None}
    found = {
        name: next((lower[n.lower()] for n in names if n.lower() in lower), None)
        for name, names in usual.items()
    }
    for name in ("url", "caption"):
        if found[name] is None:
            raise PreprocessError(
                f"{path} has no column {' or '.join(usual[name])} (it has {', '.join(columns)}); "
                f"{corpus.name} is {corpus.about}"
            )
    return {name: column for name, column in found.items() if column is not None}
