"""Tables and texts as spreadsheets, editors and downloads leave them."""

import codecs
import decimal
import gzip
import io
from datetime import datetime

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from foreign_tars import pack, parts
from preprocess_run import failed, records, report, succeeded, tool
from read_corpus import collect, refused, write_images
from tiny_data import encoded, make_image

from data_prep.formats.registry import FORMATS
from data_prep.splits import ReadOptions, Skipped


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images") / "images")


ROWS = [("0.jpg", "zero"), ("1.jpg", 'a "b"\nc'), ("2.jpg", "two, 2"), ("3.jpg", "é")]


def csv_text(end: str) -> str:
    lines = ["image,caption"] + [f'{n},"{c.replace(chr(34), chr(34) * 2)}"' for n, c in ROWS]
    return end.join(lines) + end


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("size", [1, 2, 3, 100])
@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
def test_lines_of_csv_may_end_in_any_way(images, tmp_path, end, size, mark):
    path = tmp_path / "t.CSV"
    path.write_bytes(mark + csv_text(end).encode())
    records, skipped = collect("table", path, images=images, samples_per_split=size)
    assert [r.caption for r in records] == [c for _, c in ROWS] and skipped == {}
    assert [r.key for r in records] == [f"{i:012d}" for i in range(4)]


def test_lines_may_end_in_several_ways(images, tmp_path):
    path = tmp_path / "t.csv"
    path.write_bytes(b'image,caption\r0.jpg,a\r\n1.jpg,"b\rc"\n\r2.jpg,d')
    records, skipped = collect("table", path, images=images, samples_per_split=1)
    assert [r.caption for r in records] == ["a", "b\rc", "d"] and skipped == {"empty line": 1}


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("t.csv", csv_text("\n").encode("utf-16"), "is text in UTF-16 or UTF-32; save it in UTF-8"),
        ("t.csv", csv_text("\n").encode("utf-16-le"), "is text in UTF-16 or UTF-32"),
        ("t.tsv", csv_text("\n").encode("utf-16-be"), "is text in UTF-16 or UTF-32"),
        ("t.jsonl", b'{"image": 1}'.decode().encode("utf-32-le"), "is text in UTF-16 or UTF-32"),
        (
            "t.csv",
            gzip.compress(b"image,caption\n", mtime=0),
            "is compressed with gzip; unpack it first",
        ),
        (
            "t.csv.gz",
            gzip.compress(b"image,caption\n", mtime=0),
            "is compressed with gzip; unpack it first",
        ),
        ("t.jsonl", zstandard.compress(b"{}"), "is compressed with zstd; unpack it first"),
        ("t.csv", b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS; fetch"),
        ("t.tsv", b"<html>404</html>", "an HTML page, left by a failed download"),
        ("t.parquet", b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS"),
        ("t.csv", b"", "is empty"),
        ("t.tsv", b"image\tcaption\r0.jpg\ta\r", "lines end with a carriage return"),
        ("t.jsonl", b'\n[{"image": "0.jpg"}]', "is a JSON list, not JSON lines"),
        ("t.csv", b"image,caption,image\n0.jpg,a,b\n", "has the column 'image' twice"),
        ("t.csv", b"image;caption\n0.jpg;a\n", "it seems to be separated by semicolons"),
        ("t.csv", b"image\tcaption\n0.jpg\ta\n", "it seems to be separated by tabs"),
        ("t.csv", b'image,caption\n0.jpg,"a 5 inch\n1.jpg,b\n', "the quotes of row 1 do not end"),
        ("t.csv", b'image,caption\n0.jpg,a\n1.jpg,b\n2.jpg,"c\n', "the quotes of row 3 do not end"),
        ("t.csv", b'image,"caption\n0.jpg,a\n', "is not CSV"),
        ("t.csv", b"\n\nimage,caption\n0.jpg,a\n", "the first line is empty"),
        ("t.tsv", "image\tcaption\n".encode("utf-16-le") + b"\x2b\x73" * 900, "is text in UTF-16"),
        ("t.jsonl", b'{\n "image": "0.jpg"\n}\n', "none of its first lines is a JSON object"),
    ],
)
def test_a_table_that_cannot_be_read_is_told_with_the_remedy(images, tmp_path, name, data, reason):
    path = tmp_path / name
    path.write_bytes(data)
    error = refused("table", path, images=images)
    assert str(path) in error and reason in error


def test_zeros_that_a_crash_left_cost_one_row(images, tmp_path):
    path = tmp_path / "t.tsv"
    path.write_bytes(b"image\tcaption\n0.jpg\ta\n" + bytes(3000) + b"\n1.jpg\tb\n")
    records, skipped = collect("table", path, images=images)
    assert [r.caption for r in records] == ["a", "b"] and sum(skipped.values()) == 1


def test_a_folder_of_tables_is_read_with_the_folders_in_it(images, tmp_path):
    folder = tmp_path / "in"
    (folder / "deep").mkdir(parents=True)
    for name in ("a.csv", "deep/a.csv", "deep/B.CSV"):
        (folder / name).write_text("image,caption\n0.jpg,x\n")
    (folder / "._a.csv").write_bytes(bytes(100))
    (folder / "rows.csv").write_text("image,caption\n")
    (folder / "empty.csv").touch()
    (folder / "more.csv.gz").write_bytes(gzip.compress(b"image,caption\n0.jpg,x\n"))
    (folder / "0.jpg").write_bytes(encoded(make_image(0)))
    plan = FORMATS["table"].plan(folder, ReadOptions(images))
    names = [split.name for split in plan.splits]
    assert names == ["a-00000", "deep_B-00000", "deep_a-00000"]
    reasons = {file.path.name: file.reason for file in plan.unread}
    assert reasons == {
        "._a.csv": "hidden file",
        "rows.csv": "table without rows",
        "empty.csv": "empty file",
        "more.csv.gz": "extension .gz is not read",
    }


def test_parquet_may_hold_the_images(images, tmp_path):
    data = [encoded(make_image(i)) for i in range(3)]
    struct = [{"bytes": data[0], "path": "x"}, {"bytes": None, "path": "1.jpg"}, None]
    for column, kept in ((struct, 1), (data, 3), (pa.array(data, pa.large_binary()), 3)):
        path = tmp_path / "t.parquet"
        pq.write_table(pa.table({"image": column, "caption": ["a", "b", "c"]}), path)
        records, skipped = collect("table", path)
        assert [r.images[0] for r in records] == data[:kept]
        assert sum(skipped.values()) == 3 - kept
    pq.write_table(pa.table({"image": struct, "caption": ["a", "b", "c"]}), path)
    _, skipped = collect("table", path)
    assert skipped["row names its image alone: say where it is with --images"] == 1
    records, skipped = collect("table", path, images=images)
    assert [r.images[0] for r in records] == data[:2] and skipped == {"row names no image": 1}


def test_columns_of_any_type_cost_no_row(images, tmp_path):
    table = {
        "image": pa.array(["0.jpg", "1.jpg"]).dictionary_encode(),
        "caption": pa.array(["a", "b"], pa.large_string()),
        "captions": [["a", "b"], ["c"]],
        "when": pa.array([datetime(2020, 1, 1)] * 2, pa.timestamp("ns")),
        "odd": pa.array([1, 2**62 + 1], pa.timestamp("ns")),
        "price": [decimal.Decimal("1.5")] * 2,
        "box": [{"x": 1}, None],
        "score": pa.array([0.5, None], pa.float16()),
    }
    pq.write_table(pa.table(table), path := tmp_path / "t.parquet")
    records, skipped = collect("table", path, images=images)
    assert [(r.caption, r.metadata) for r in records] == [("a", {"score": 0.5}), ("b", {})]
    assert skipped == {}
    _, skipped = collect("table", path, images=images, caption_column="captions")
    assert skipped == {"caption is not a text: name another column with --caption-column": 2}
    data = path.read_bytes()
    for damaged in (data[:-30], b"PAR1", data[:200] + bytes(200) + data[400:]):
        path.write_bytes(damaged)
        said = failed(tool(path, "table", tmp_path / "out", "--images", images))
        assert str(path) in said and "Arrow" not in said and "<" not in said.splitlines()[-1]


@pytest.mark.parametrize(
    ("name", "met"),
    [
        ({"bytes": b""}, "row names no image"),
        ("HTTPS://e.org/1.jpg", "download it (tools/prepare_downloads.py)"),
        ("gone\\1.jpg", "image file is missing"),
    ],
)
def test_reasons_say_what_was_met(images, tmp_path, name, met):
    pq.write_table(pa.table({"image": [name], "caption": ["a"]}), tmp_path / "t.parquet")
    format_ = FORMATS["table"]
    plan = format_.plan(tmp_path / "t.parquet", ReadOptions(images))
    (item,) = format_.read(plan.splits[0].payload)
    assert met in item.reason and "t.parquet, row 0" in item.detail
    if isinstance(name, str):
        assert name.split("\\")[0] in item.detail


def test_columns_that_spreadsheets_leave_without_a_name_are_no_fault(images, tmp_path):
    (tmp_path / "t.csv").write_text("image,caption,,\n0.jpg,a,,\n1.jpg,b,c\n")
    plan = FORMATS["table"].plan(tmp_path / "t.csv", ReadOptions(images))
    record, left_out = FORMATS["table"].read(plan.splits[0].payload)
    assert (record.caption, record.metadata) == ("a", {})
    assert left_out == Skipped("row has another number of columns", "t.csv, row 1: 3, not 4")


def not_utf8(values: list[bytes]) -> pa.Array:
    return pa.array(values, pa.binary()).view("string")


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("times", pa.array([[1], [2**62 + 1]], pa.list_(pa.timestamp("ns")))),
        ("times", pa.array([{"t": 1}, {"t": 2**62 + 1}], pa.struct([("t", pa.timestamp("ns"))]))),
        ("note", not_utf8([b"n", b"\xff"])),
    ],
)
def test_a_value_that_python_cannot_hold_costs_no_caption(images, tmp_path, column, value):
    table = {"image": ["0.jpg", "1.jpg"], "caption": ["a", "b"], column: value}
    pq.write_table(pa.table(table), tmp_path / "t.parquet")
    records, skipped = collect("table", tmp_path / "t.parquet", images=images)
    assert [r.caption for r in records] == ["a", "b"] and skipped == {}


def test_what_is_not_utf8_beside_the_text_costs_no_sample(images, tmp_path):
    """Columns that training does not read, and the name of the file."""
    table = tmp_path / "caf\udce9.csv"
    table.write_bytes(b"image,caption,author,title\xe9\n0.jpg,a,Andr\xe9,x\n1.jpg,\xe9,y,z\n")
    succeeded(tool(table, "table", tmp_path / "rows", "--images", images))
    (kept,) = records(tmp_path / "rows")
    assert (kept.caption, kept.source) == ("a", r"caf\udce9")
    assert kept.metadata == {"author": r"Andr\udce9", r"title\udce9": "x"}
    assert report(tmp_path / "rows")["skipped"] == {"caption is not valid Unicode": 1}

    lines = tmp_path / "caf\udce9.jsonl"
    lines.write_text('{"image": "0.jpg", "caption": "a", "url": "u\\udce9", "n": 1}\n')
    succeeded(tool(lines, "table", tmp_path / "lines", "--images", images, "--sample", 5))
    (kept,) = records(tmp_path / "lines")
    assert kept.metadata == {"url": r"u\udce9", "n": 1}

    lines.write_text('{"text": "a"}\n')
    succeeded(tool(lines, "documents", tmp_path / "documents"))
    lines.write_text(
        '{"id": "\\udce9", "messages": [{"role": "user", "content": "q"},'
        ' {"role": "assistant", "content": "a"}]}\n'
    )
    succeeded(tool(lines, "conversations", tmp_path / "talks"))
    assert [r.metadata for r in records(tmp_path / "talks")] == [{"id": r"\udce9"}]
    for name in ("documents", "talks"):
        assert [r.source for r in records(tmp_path / name)] == [r"caf\udce9"]


def test_a_caption_of_parquet_that_is_not_utf8_is_left_out_alone(images, tmp_path):
    table = {"image": [f"{i}.jpg" for i in range(3)], "caption": not_utf8([b"a", b"\xff", b"c"])}
    pq.write_table(pa.table(table), tmp_path / "t.parquet")
    records, skipped = collect("table", tmp_path / "t.parquet", images=images)
    assert [r.caption for r in records] == ["a", "c"]
    assert skipped == {"caption is not valid Unicode": 1}


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary_view(), "dictionary"])
def test_bytes_of_any_type_are_images(tmp_path, kind):
    data = [encoded(make_image(i)) for i in range(2)]
    column = pa.array(data).dictionary_encode() if kind == "dictionary" else pa.array(data, kind)
    pq.write_table(pa.table({"image": column, "caption": ["a", "b"]}), tmp_path / "t.parquet")
    records, skipped = collect("table", tmp_path / "t.parquet")
    assert [r.images[0] for r in records] == data and skipped == {}


def test_two_columns_of_one_name_are_refused(images, tmp_path):
    columns = [pa.array(["0.jpg"]), pa.array(["a"]), pa.array(["b"])]
    table = pa.Table.from_arrays(columns, ["image", "caption", "caption"])
    pq.write_table(table, tmp_path / "t.parquet")
    assert "the column 'caption' twice" in refused("table", tmp_path / "t.parquet", images=images)


def test_documents_begin_without_a_byte_order_mark(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"text": "\ufeff x"}\n{"text": "\ufeff"}\n')
    records, skipped = collect("documents", tmp_path / "t.jsonl")
    assert [r.caption for r in records] == [" x"] and skipped == {"caption is empty": 1}


def test_documents_are_read_from_files_and_folders(tmp_path):
    (tmp_path / "in/deep").mkdir(parents=True)
    for name in ("a.jsonl", "deep/a.jsonl"):
        (tmp_path / "in" / name).write_text(
            '{"text": "x"}\n\n{"content": "y"}\n{"te\n{"text": null}'
        )
    records, skipped = collect("documents", tmp_path / "in")
    assert [r.caption for r in records] == ["x", "x"]
    assert skipped == {"empty line": 2, "not an object with a text": 4, "line is not JSON": 2}
    (tmp_path / "texts").write_bytes(gzip.compress(b'{"text": "x"}'))
    assert "is compressed with gzip" in refused("documents", tmp_path / "texts")


@pytest.mark.parametrize(
    ("kind", "option"),
    [
        ("documents", "caption_column"),
        ("coco", "image_column"),
        ("conversations", "caption_column"),
        ("img2dataset", "caption_column"),
        ("webdataset", "image_column"),
    ],
)
def test_an_option_without_use_is_refused(tmp_path, kind, option):
    assert f"leave out --{option.replace('_', '-')}" in refused(kind, tmp_path, **{option: "x"})


def test_zstd_of_a_large_window_and_a_member_that_looks_like_bzip2(tmp_path):
    path = pack(tmp_path / "in/a.tar", [("BZh.jpg", parts("x", "jpg")[0][1]), ("BZh.txt", b"t")])
    assert [r.key for r in collect("webdataset", tmp_path / "in")[0]] == ["BZh"]
    parameters = zstandard.ZstdCompressionParameters(window_log=28)
    packed = io.BytesIO()
    with zstandard.ZstdCompressor(compression_params=parameters).stream_writer(
        packed, closefd=False
    ) as writer:
        writer.write(path.read_bytes())
    path.write_bytes(packed.getvalue())
    assert [r.key for r in collect("webdataset", tmp_path / "in")[0]] == ["BZh"]


def test_ids_that_a_key_cannot_have_cost_no_caption(images, tmp_path):
    (tmp_path / "c.json").write_text(
        '{"images": [{"id": "0.jpg", "file_name": "0.jpg"}],'
        ' "annotations": [{"id": 1, "image_id": "0.jpg", "caption": "a"}]}'
    )
    records, skipped = collect("coco", tmp_path / "c.json", images=images)
    assert skipped == {} and records[0].to_members()
    assert records[0].metadata == {"image_id": "0.jpg", "file_name": "0.jpg", "key": "0.jpg_1"}
