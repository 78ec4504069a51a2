"""The table reader: JSON lines, TSV, CSV and Parquet that name images by their paths."""

import csv
import errno
import io
import json
import tracemalloc
from itertools import accumulate
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from read_corpus import collect, refused, write_images
from tiny_data import encoded, make_image

from data_prep.formats.common import tables
from data_prep.formats.registry import FORMATS
from data_prep.splits import ReadOptions


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images") / "images")


def rows(count: int) -> list[dict]:
    """Rows that are a trial for a table: commas, quotes, line breaks; scores of every kind."""
    return [
        {
            "image_path": f"{i}.jpg",
            "TEXT": f'a "quoted", picture\nof {i} é',
            "score": i / 10,
            "words": i,
            "id": f"00{i}",
            "nothing": None,
        }
        for i in range(count)
    ]


def write_table(path: Path, table: list[dict]) -> Path:
    if path.suffix == ".jsonl":
        text = "".join(json.dumps(row) + "\n" for row in table)
        path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(table), path, row_group_size=3)
    else:
        with path.open("w", encoding="utf-8-sig", newline="") as file:
            writer = csv.DictWriter(file, table[0])
            writer.writeheader()
            writer.writerows(table)
    return path


@pytest.mark.parametrize("kind", [".jsonl", ".csv", ".parquet"])
@pytest.mark.parametrize("size", [4, 10, 100])
def test_tables(images, tmp_path, kind, size):
    path = write_table(tmp_path / f"my corpus{kind}", rows(10))
    records, skipped = collect("table", path, images=images, samples_per_split=size)
    assert skipped == {}
    for number, item in enumerate(records):
        assert item.key == f"{number:012d}" and item.source == "my corpus"
        assert item.caption == f'a "quoted", picture\nof {number} é'
        assert item.images[0] == encoded(make_image(number))
        expected = {"score": number / 10, "words": number, "id": f"00{number}"}
        assert item.metadata == expected and type(item.metadata["words"]) is int
    assert len(records) == 10
    splits = FORMATS["table"].plan(path, ReadOptions(images, size)).splits
    assert [split.name for split in splits] == [f"my_corpus-{i:05d}" for i in range(-(-10 // size))]


def test_tsv_takes_quotes_as_they_are(images, tmp_path):
    path = tmp_path / "a.tsv"
    path.write_bytes(
        b'file\tcaption\tn\n0.jpg\t5" screen\t1\r\n1.jpg\t"open\t2\n2.jpg\ttoo\tmany\tcells\n'
        b"3.jpg\tbad \xff byte\t3\n4.jpg\tno end\t4"
    )
    records, skipped = collect("table", path, images=images, samples_per_split=2)
    assert [(r.caption, r.metadata) for r in records] == [
        ('5" screen', {"n": 1}),
        ('"open', {"n": 2}),
        ("no end", {"n": 4}),
    ]
    assert skipped == {
        "row has another number of columns": 1,
        "caption is not valid Unicode": 1,
    }


def test_table_rows_that_are_left_out(images, tmp_path):
    table = [
        {"image": None, "caption": "a"},
        {"caption": "a"},
        {"image": "", "caption": "a"},
        {"image": "1.jpg", "caption": " \n"},
        {"image": "1.jpg"},
        {"image": "1.jpg", "caption": 7},
        {"image": ["1.jpg"], "caption": "a"},
        {"image": "99.jpg", "caption": "a"},
        {"image": "https://example.com/1.jpg", "caption": "a"},
        {"image": "../secret.jpg", "caption": "a"},
        {"image": "deep/../../secret.jpg", "caption": "a"},
        {"image": str(images.parent / "secret.jpg"), "caption": "a"},
        {"image": "deep", "caption": "a"},
        {"image": "\ud800.jpg", "caption": "a"},
        {"image": "deep/a.gif", "caption": " as found ", "score": float("nan"), "boxes": [1]},
    ]
    path = write_table(tmp_path / "a.jsonl", table)
    path.write_bytes(path.read_bytes() + b"[1]\nnot json\n\n")
    records, skipped = collect("table", path, images=images)
    assert [(r.caption, r.metadata) for r in records] == [("as found", {})]
    assert records[0].images[0] == (images / "deep/a.gif").read_bytes()
    assert skipped == {
        "row names no image": 3,
        "empty caption": 2,
        "caption is not a text: name another column with --caption-column": 1,
        "image is not one path: name another column with --image-column": 1,
        "image file is missing": 1,
        "image is an address, not a file: download it (tools/prepare_downloads.py)": 1,
        "image path leaves the images folder": 3,
        "image file cannot be read (Is a directory)": 1,
        "image path is not valid Unicode": 1,
        "row is not a JSON object": 2,
        "empty line": 1,
    }


def test_a_disk_that_fails_is_no_reason_to_skip(images, tmp_path, monkeypatch):
    path = write_table(tmp_path / "a.jsonl", [{"image": "1.jpg", "caption": "a"}])
    read = Path.read_bytes

    def fail(self):
        if self.suffix == ".jpg":
            raise OSError(errno.EIO, "Input/output error", str(self))
        return read(self)

    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(OSError, match="Input/output error.*1.jpg"):
        collect("table", path, images=images)


def test_table_columns_and_wrong_use(images, tmp_path):
    table = [{"picture": "1.jpg", "text": "usual", "alt": "named"}]
    path = write_table(tmp_path / "a.csv", table)
    error = refused("table", path, images=images)
    assert "--image-column" in error and "picture, text, alt" in error
    records, _ = collect("table", path, images=images, image_column="picture")
    assert records[0].caption == "usual" and records[0].metadata == {"alt": "named"}
    records, _ = collect("table", path, images=images, image_column="picture", caption_column="alt")
    assert records[0].caption == "named"
    wrong = {"image_column": "picture", "caption_column": "ALT"}
    assert "no column ALT" in refused("table", path, images=images, **wrong)
    assert "--images DIR" in refused("table", path)
    assert "is not a table" in refused("table", images / "1.jpg", images=images)
    assert "holds no table" in refused("table", images, images=images)
    broken = tmp_path / "broken.csv"
    broken.write_bytes(b"image,caption\n" + b'1.jpg,"never closed ' + b"x" * (1 << 24) + b"\n")
    assert "a quote left open" in refused("table", broken, images=images)
    broken = tmp_path / "b.parquet"
    broken.write_bytes(b"PAR1")
    assert "is not Parquet" in refused("table", broken, images=images)
    assert "several kinds (.csv, .parquet)" in refused("table", tmp_path, images=images)


def test_table_of_several_files(images, tmp_path):
    for name in ("b", "a"):
        write_table(tmp_path / f"{name}.parquet", rows(3))
    records, _ = collect("table", tmp_path, images=images)
    assert [r.source for r in records] == ["a"] * 3 + ["b"] * 3


def test_a_changed_table_is_another_job(images, tmp_path):
    for kind in (".jsonl", ".csv", ".parquet"):
        path = write_table(tmp_path / f"a{kind}", rows(4))
        options = ReadOptions(images, 2)
        before = [split.identity for split in FORMATS["table"].plan(path, options).splits]
        assert len(set(before)) == 2
        assert before == [split.identity for split in FORMATS["table"].plan(path, options).splits]
        changed = rows(4)
        changed[3]["TEXT"] = changed[3]["TEXT"].replace("3", "x")
        size = path.stat().st_size
        assert write_table(path, changed).stat().st_size == size
        after = [split.identity for split in FORMATS["table"].plan(path, options).splits]
        assert not set(before) & set(after)


@given(
    lines=st.lists(st.text(alphabet="ab\r", max_size=6), max_size=30),
    ends=st.booleans(),
    size=st.integers(1, 9),
    chunk=st.integers(1, 11),
)
def test_lines_are_cut_where_they_begin(lines, ends, size, chunk):
    data = "\n".join(lines).encode() + b"\n" * ends
    expected = io.BytesIO(data).readlines()
    digest = xxhash.xxh3_128()
    with patch.object(tables, "_READ_BYTES", chunk):
        starts, count = tables.cut_lines(io.BytesIO(data), size, digest)
    offsets = [0, *accumulate(map(len, expected))]
    assert count == len(expected) and starts == offsets[:-1:size]
    assert digest.digest() == xxhash.xxh3_128_digest(data)


def test_a_large_row_group_is_read_in_little_memory(tmp_path):
    path = tmp_path / "a.parquet"
    blob = [np.random.default_rng(i).bytes(100_000) for i in range(500)]
    table = pa.table({"n": range(500), "jpg": blob})
    pq.write_table(
        table,
        path,
        row_group_size=500,
        use_dictionary=False,
        write_batch_size=8,
        compression="none",
    )
    assert pq.ParquetFile(path).num_row_groups == 1
    pool = pa.default_memory_pool()
    del table, blob
    start, peak, numbers = pool.bytes_allocated(), 0, []
    tracemalloc.start()
    for piece in tables.cut(path, 200):
        for number, row in tables.read(piece):
            assert row["n"] == number
            numbers.append(number)
            peak = max(peak, pool.bytes_allocated() - start)
    python = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert numbers == list(range(500))
    assert peak < 40e6 and python < 40e6, (peak, python)  # of 50 MB
