"""The readers of data_prep: published formats to records, and what is left out with its reason."""

import csv
import io
import json
import shutil
import tarfile
import tracemalloc
from collections import Counter
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from tiny_data import encoded, picture, record, write

from data_prep import tables
from data_prep.formats import FORMATS
from megatron_owl2.data.records import Record
from megatron_owl2.preprocess.parts import PreprocessError, ReadOptions, Skipped

REAL = Path(__file__).parent / "data/img2dataset"


def collect(kind: str, source: Path, **options) -> tuple[list[Record], Counter]:
    """All records of all parts, and the reasons why others were left out."""
    reader = FORMATS[kind]
    parts = reader.plan(source, ReadOptions(**options))
    assert len({part.name for part in parts}) == len(parts)
    items = [item for part in parts for item in reader.read(part.payload)]
    records = [item for item in items if isinstance(item, Record)]
    assert all(item.detail for item in items if isinstance(item, Skipped))
    return records, Counter(item.reason for item in items if isinstance(item, Skipped))


def refused(kind: str, source: Path, **options) -> str:
    with pytest.raises(PreprocessError) as error:
        collect(kind, source, **options)
    return str(error.value)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Pictures 0.jpg to 9.jpg, and one outside of their folder."""
    folder = tmp_path_factory.mktemp("pictures") / "images"
    (folder / "deep").mkdir(parents=True)
    for number in range(10):
        (folder / f"{number}.jpg").write_bytes(encoded(picture(number)))
    (folder / "deep/a.gif").write_bytes(encoded(picture(0), "GIF"))
    (folder.parent / "secret.jpg").write_bytes(encoded(picture(3)))
    return folder


@pytest.mark.parametrize("form", ["webdataset", "files", "parquet"])
def test_img2dataset_as_the_real_one_writes_it(form):
    records, skipped = collect("img2dataset", REAL / form)
    by_url = {r.metadata["url"].rpartition("/")[2]: r for r in records}
    assert sorted(by_url) == ["0.jpg", "1.jpg", "3.png", "5.webp", "7.jpg"]
    assert skipped == {"status failed_to_download": 2, "status failed_to_resize": 2}
    for name, item in by_url.items():
        assert item.caption == f"caption of {name} é" and item.source == form
        assert item.image[:3] == b"\xff\xd8\xff"
    assert {name: r.metadata["similarity"] for name, r in by_url.items()} == pytest.approx(
        {"0.jpg": 0.3, "1.jpg": 0.31, "3.png": 0.33, "5.webp": 0.35, "7.jpg": 0.37}
    )
    assert "pwatermark" not in by_url["0.jpg"].metadata  # null in the corpus
    large = by_url["7.jpg"].metadata
    assert (large["original_width"], large["original_height"]) == (67, 60)
    assert (large["width"], large["height"], large["pwatermark"]) == (36, 32, 0.25)
    assert not large.keys() & {"key", "status", "error_message", "caption", "jpg"}


def test_img2dataset_the_three_forms_agree():
    found = [
        {r.metadata["url"]: replace(r, source="") for r in collect("img2dataset", REAL / form)[0]}
        for form in ("webdataset", "files", "parquet")
    ]
    assert found[0] == found[1] == found[2]


def test_img2dataset_unfinished_and_lost(tmp_path):
    folder = shutil.copytree(REAL / "files", tmp_path / "files")
    (folder / "00000/000001.jpg").unlink()
    for name in ("jpg", "txt", "json"):
        (folder / f"00000/000000.{name}").unlink()
    _, skipped = collect("img2dataset", folder)
    assert skipped["counted in the statistics but not there"] == 1 and skipped["no image"] == 1
    (folder / "00001_stats.json").unlink()
    assert "has not finished 00001" in refused("img2dataset", folder)
    only_metadata = tmp_path / "metadata"
    only_metadata.mkdir()
    shutil.copy(REAL / "files/00000.parquet", only_metadata)
    assert "not from img2dataset" in refused("img2dataset", only_metadata)


def test_img2dataset_damaged_parquet(tmp_path):
    folder = shutil.copytree(REAL / "parquet", tmp_path / "parquet")
    path = folder / "00000.parquet"
    path.write_bytes(path.read_bytes()[:4000] + bytes(600) + path.read_bytes()[4600:])
    records, skipped = collect("img2dataset", folder)
    assert skipped["rest of a damaged file"] == 1
    assert len(records) + sum(skipped.values()) == 9 + 1


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
    records, skipped = collect("table", path, images=images, samples_per_part=size)
    assert skipped == {}
    for number, item in enumerate(records):
        assert item.key == f"{number:012d}" and item.source == "my corpus"
        assert item.caption == f'a "quoted", picture\nof {number} é'
        assert item.image == encoded(picture(number))
        expected = {"score": number / 10, "words": number, "id": f"00{number}"}
        assert item.metadata == expected and type(item.metadata["words"]) is int
    assert len(records) == 10
    parts = FORMATS["table"].plan(path, ReadOptions(images, size))
    assert [part.name for part in parts] == [f"my_corpus-{i:05d}" for i in range(-(-10 // size))]


def test_tsv_takes_quotes_as_they_are(images, tmp_path):
    path = tmp_path / "a.tsv"
    path.write_bytes(
        b'file\tcaption\tn\n0.jpg\t5" screen\t1\r\n1.jpg\t"open\t2\n2.jpg\ttoo\tmany\tcells\n'
        b"3.jpg\tbad \xff byte\t3\n4.jpg\tno end\t4"
    )
    records, skipped = collect("table", path, images=images, samples_per_part=2)
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
        {"image": "deep/a.gif", "caption": " as found ", "score": float("nan"), "boxes": [1]},
    ]
    path = write_table(tmp_path / "a.jsonl", table)
    path.write_bytes(path.read_bytes() + b"[1]\nnot json\n\n")
    records, skipped = collect("table", path, images=images)
    assert [(r.caption, r.metadata) for r in records] == [("as found", {})]
    assert records[0].image == (images / "deep/a.gif").read_bytes()
    assert skipped == {
        "row names no image": 3,
        "empty caption": 2,
        "caption is not a text": 1,
        "image is not one path": 1,
        "image file is missing": 1,
        "image is an address, not a file": 1,
        "image path leaves the images folder": 3,
        "image file cannot be read (Is a directory)": 1,
        "row is not a JSON object": 3,
    }


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
        before = [part.identity for part in FORMATS["table"].plan(path, options)]
        assert len(set(before)) == 2
        assert before == [part.identity for part in FORMATS["table"].plan(path, options)]
        changed = rows(4)
        changed[3]["TEXT"] = changed[3]["TEXT"].replace("3", "x")
        size = path.stat().st_size
        assert write_table(path, changed).stat().st_size == size
        after = [part.identity for part in FORMATS["table"].plan(path, options)]
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
    with patch.object(tables, "_CHUNK", chunk):
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


def test_webdataset_tars_of_other_tools(tmp_path):
    (tmp_path / "data/deep").mkdir(parents=True)
    jpg = encoded(picture(1))
    with webdataset.TarWriter(str(tmp_path / "data/a.tar")) as tar:  # PAX headers
        tar.write({"__key__": "one", "jpg": jpg, "txt": " in txt "})
        tar.write({"__key__": "x/two", "png": jpg, "json": {"caption": "in json", "score": 0.5}})
        tar.write({"__key__": "three", "jpg": jpg, "txt": "t", "json": {"caption": "j", "n": 1}})
        tar.write({"__key__": "four", "jpg": jpg, "json": {"other": "o"}})
        tar.write({"__key__": "five", "txt": "no picture"})
        tar.write({"__key__": "six", "jpg": jpg, "png": jpg, "txt": "two pictures"})
        tar.write({"__key__": "seven", "jpg": jpg, "json": [1]})
        tar.write({"__key__": "k" * 95, "jpg": jpg, "txt": "long key"})
    with tarfile.open(tmp_path / "data/deep/a.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for name, data in (("y" * 120 + ".jpg", jpg), ("y" * 120 + ".txt", b"long name")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    records, skipped = collect("webdataset", tmp_path / "data")
    assert [(r.key, r.caption, r.metadata) for r in records] == [
        ("one", "in txt", {}),
        ("000000001", "in json", {"score": 0.5, "key": "x/two"}),
        ("three", "t", {"n": 1}),
        ("000000007", "long key", {"key": "k" * 95}),
        ("000000000", "long name", {"key": "y" * 120}),
    ]
    assert all(item.image == jpg for item in records)
    assert skipped == {
        "empty caption": 1,
        "no image": 1,
        "more than one image": 1,
        "the .json part is not an object": 1,
    }
    records, _ = collect("webdataset", tmp_path / "data/a.tar", caption_column="caption")
    assert [r.caption for r in records] == ["in json", "j"]


def test_webdataset_reads_our_shards_back(tmp_path):
    originals = [record(index) for index in range(25)]
    folder = write(tmp_path / "set", originals)
    records, skipped = collect("webdataset", folder)
    assert records == originals and skipped == {}


def test_webdataset_damage_is_counted(tmp_path):
    folder = write(tmp_path / "set", [record(index) for index in range(10)])
    path = next(folder.glob("*.tar"))
    data = path.read_bytes()
    for cut in (len(data) // 2, len(data) // 2 // 512 * 512):
        path.write_bytes(data[:cut])
        records, skipped = collect("webdataset", folder)
        assert 0 < len(records) < 10 and skipped["rest of a damaged file"] == 1
    (tmp_path / "a.tar.gz").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    assert "must be unpacked" in refused("webdataset", tmp_path / "empty")
    with tarfile.open(path, mode="w") as tar:
        for _ in range(2):
            tar.addfile(tarfile.TarInfo("one.txt"))
    records, skipped = collect("webdataset", folder)
    assert records == [] and skipped == {"a part of the sample occurs twice": 1}
    assert "leave out --images" in refused("webdataset", folder, images=tmp_path)


def coco(folder: Path) -> Path:
    content = {
        "info": {},
        "images": [
            {"id": 30 + number, "file_name": f"{number}.jpg", "height": 30} for number in range(4)
        ]
        + [{"id": 90, "file_name": "gone.jpg"}],
        "annotations": [
            {"id": 100 + index, "image_id": 30 + index % 3, "caption": f"caption {index} \n"}
            for index in range(15)
        ]
        + [
            {"id": 200, "image_id": 90, "caption": "a"},
            {"id": 201, "image_id": 77, "caption": "b"},
            {"id": 202, "image_id": 30, "caption": " "},
        ],
    }
    path = folder / "captions_tiny.json"
    path.write_text(json.dumps(content))
    return path


def test_coco_makes_a_record_of_every_caption(images, tmp_path):
    records, skipped = collect("coco", coco(tmp_path), images=images, samples_per_part=4)
    assert [r.caption for r in records[:6]] == [f"caption {i}" for i in (0, 3, 6, 9, 12, 1)]
    assert records[5].key == "31_101" and records[5].image == encoded(picture(1))
    assert records[5].metadata == {"image_id": 31, "file_name": "1.jpg"}
    assert len(records) == 15 == len({r.key for r in records})
    assert skipped == {
        "picture without a caption": 1,
        "image file is missing": 1,
        "caption of an unknown picture": 1,
        "empty caption": 1,
    }
    assert "--images DIR" in refused("coco", coco(tmp_path))
    (tmp_path / "x.json").write_text('{"images": []}')
    assert "does not hold COCO captions" in refused("coco", tmp_path / "x.json", images=images)


def test_coco_draws_one_caption_of_every_picture(images, tmp_path):
    records, skipped = collect("coco-one-caption", coco(tmp_path), images=images)
    again, _ = collect("coco-one-caption", coco(tmp_path), images=images, samples_per_part=1)
    assert records == again
    assert len(records) + skipped["empty caption"] == 3
    assert [r.metadata["image_id"] for r in records] == [30, 31, 32][-len(records) :]
    content = {"images": [], "annotations": []}
    for number in range(300):
        content["images"].append({"id": number, "file_name": "0.jpg"})
        content["annotations"] += [
            {"id": 5 * number + k, "image_id": number, "caption": str(k)} for k in range(5)
        ]
    path = tmp_path / "many.json"
    path.write_text(json.dumps(content))
    drawn, _ = collect("coco-one-caption", path, images=images)
    counts = Counter(item.caption for item in drawn)
    assert len(drawn) == 300 and set(counts) == set("01234") and min(counts.values()) > 35


def test_documents_start_where_their_part_starts(tmp_path):
    path = tmp_path / "web.jsonl"
    path.write_text("".join(json.dumps({"text": f"text {i} é"}) + "\n" for i in range(23)))
    records, _ = collect("documents", path, samples_per_part=5)
    assert [r.caption for r in records] == [f"text {i} é" for i in range(23)]
    assert [r.key for r in records] == [f"{i:09d}" for i in range(23)]
