"""Files of a corpus: everything in its folder is read, or counted and named."""

import bz2
import gzip
import io
import lzma
import os
import re
import shutil
import tarfile
from pathlib import Path

import pytest
import zstandard
from paths import DATA
from preprocess_run import failed, records, report, succeeded, tool
from read_corpus import collect, refused
from tiny_data import encoded, make_image

from data_prep.check import unlisted
from data_prep.corpus_files import find_files
from data_prep.formats.registry import FORMATS
from data_prep.index import index_directory
from data_prep.splits import ReadOptions
from megatron_owl2.errors import PreprocessError, ShardError

APPLE = bytes.fromhex("0005160700020000") + b"Mac OS X" + bytes(147)
PACK = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstandard.compress}


def archive(names: list[str], first: int = 0) -> bytes:
    """A tar file of an image and a caption for every name."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for number, name in enumerate(names, first):
            for extension, data in (
                ("jpg", encoded(make_image(number))),
                ("txt", f"caption {number}".encode()),
            ):
                member = tarfile.TarInfo(f"{name}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return out.getvalue()


def shard(path: Path, first: int, count: int = 3) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(archive([f"{i:05d}" for i in range(first, first + count)], first))
    return path


def unread(kind: str, source: Path, **options) -> dict[str, str]:
    """Names of files that are not read, and why."""
    plan = FORMATS[kind].plan(source, ReadOptions(**options))
    return {str(file.path.relative_to(source)): file.reason for file in plan.unread}


@pytest.fixture
def crowd(tmp_path):
    """A corpus of four shards of three samples, with everything that lies beside such shards."""
    corpus = tmp_path / "corpus"
    shard(corpus / "00000.tar", 0)
    shard(corpus / "deep/UPPER.TAR", 10)
    shard(tmp_path / "elsewhere/00001.tar", 20)
    (corpus / "linked").symlink_to("../elsewhere")
    (corpus / "single.tar").symlink_to(shard(tmp_path / "other.tar", 30))
    for hidden in ("._00000.tar", ".DS_Store", "deep/._UPPER.TAR"):
        (corpus / hidden).write_bytes(APPLE)
    shard(corpus / "__MACOSX/x.tar", 40)
    shard(corpus / ".cache/x.tar", 40)
    (corpus / "deep/up").symlink_to("..")
    (corpus / "gone.tar").symlink_to("nowhere.tar")
    os.mkfifo(corpus / "pipe.tar")
    (corpus / "empty.tar").touch()
    for other in ("README", "labels.csv", "00009.zip"):
        (corpus / other).write_text("x")
    return corpus


def test_every_file_is_read_or_named(crowd):
    found, skipped = collect("webdataset", crowd)
    assert sorted(int(r.key) for r in found) == [
        number + i for number in (0, 10, 20, 30) for i in range(3)
    ]
    assert skipped == {}
    assert unread("webdataset", crowd) == {
        "._00000.tar": "hidden file",
        ".DS_Store": "hidden file",
        "deep/._UPPER.TAR": "hidden file",
        "__MACOSX": "hidden folder",
        ".cache": "hidden folder",
        "deep/up": "link to a folder above it",
        "gone.tar": "broken link",
        "pipe.tar": "neither file nor folder",
        "empty.tar": "empty file",
        "README": "no extension",
        "labels.csv": "extension .csv is not read",
        "00009.zip": "extension .zip is not read",
    }


def test_what_is_not_read_stands_in_summary_and_report(crowd, tmp_path):
    output = tmp_path / "out"
    for _ in range(2):  # a finished job says the same
        said = succeeded(tool(crowd, "webdataset", output))
        assert "kept 12, skipped 0" in said
        assert f"not read: 3 x hidden file (such as {crowd}/.DS_Store)" in said
        assert f"not read: 1 x empty file (such as {crowd}/empty.tar)" in said
    counts = report(output)["unread"]
    assert counts["hidden folder"] == {
        "files": 2,
        "examples": [f"{crowd}/.cache", f"{crowd}/__MACOSX"],
    }
    assert sum(entry["files"] for entry in counts.values()) == 12
    page = (output / "report.html").read_text()
    assert "Files that were not read" in page and f"{crowd}/labels.csv" in page
    planned = succeeded(tool(crowd, "webdataset", tmp_path / "none", "--plan"))
    assert "4 splits" in planned and "3 x hidden file" in planned


def test_our_own_data_set_leaves_nothing_to_mention(crowd, tmp_path):
    succeeded(tool(crowd, "webdataset", tmp_path / "out"))
    assert unread("webdataset", tmp_path / "out") == {}
    assert len(collect("webdataset", tmp_path / "out")[0]) == 12


@pytest.mark.parametrize("kind", ["webdataset", "img2dataset", "table", "documents"])
def test_an_output_in_the_input_is_no_part_of_it(tmp_path, kind):
    corpus, more = tmp_path / "corpus", ()
    if kind == "img2dataset":
        shutil.copytree(DATA / "img2dataset/webdataset", corpus)
    else:
        shard(corpus / "a.tar", 0)
        (corpus / "a.jsonl").write_text('{"image": "0.jpg", "caption": "a", "text": "b"}\nx\n')
        (corpus / "0.jpg").write_bytes(encoded(make_image(0)))
        more = ("--images", corpus) if kind == "table" else ()
    output = corpus / "sets/one"
    succeeded(tool(corpus, kind, output, *more))
    kept = records(output)
    (output / "manifest.json").unlink()
    (tmp_path / "link").symlink_to(output)
    for same in (output, tmp_path / "link"):
        assert "kept" in succeeded(tool(corpus, kind, same, *more))
    assert records(output) == kept
    assert "sets/one" not in str(report(output)["unread"])


def test_a_folder_without_shards_says_what_is_in_it(tmp_path):
    (tmp_path / "a.zip").write_bytes(b"PK")
    (tmp_path / "._b.tar").write_bytes(APPLE)
    error = refused("webdataset", tmp_path)
    assert "holds no tar file" in error and "1 x extension .zip is not read" in error
    assert "._b.tar" in error
    (tmp_path / "none").symlink_to("nowhere")
    assert "does not exist" in failed(tool(tmp_path / "none", "webdataset", tmp_path / "out"))


@pytest.mark.parametrize("ending", [*PACK, "tgz", "as .tar"])
def test_compressed_shards_are_read(tmp_path, ending):
    pack = PACK.get(ending, gzip.compress)
    name = {"tgz": "b.tgz", "as .tar": "b.tar"}.get(ending, f"b.tar.{ending}")
    corpus = tmp_path / "corpus"
    plain = shard(corpus / "a.tar", 0)
    (corpus / name).write_bytes(pack(archive(["x", "y/z"], 5)))
    found, skipped = collect("webdataset", corpus)
    assert [r.caption for r in found] == [f"caption {i}" for i in (0, 1, 2, 5, 6)]
    assert skipped == {}
    splits = FORMATS["webdataset"].plan(corpus, ReadOptions()).splits
    assert [split.name for split in splits] == ["a", "b"]
    assert len(collect("webdataset", corpus / name)[0]) == 2
    plain.with_name("b.tar.old.tar").write_bytes(plain.read_bytes())
    said = succeeded(tool(corpus, "webdataset", tmp_path / "out", "--workers", 1))
    assert "kept 8, skipped 0" in said and len(records(tmp_path / "out")) == 8


@pytest.mark.parametrize("ending", PACK)
def test_a_compressed_shard_that_is_cut_or_damaged_is_counted(tmp_path, ending):
    data = PACK[ending](archive([str(i) for i in range(200)]))
    path = tmp_path / f"a.tar.{ending}"
    for damaged in (data[: len(data) // 2], data[:-3], data[:-40] + bytes(40), data[:20]):
        path.write_bytes(damaged)
        found, skipped = collect("webdataset", path)
        assert len(found) <= 200 and skipped["rest of a damaged file"] == 1
        assert sum(skipped.values()) <= 2  # and a sample that lies at the end


def test_a_shard_and_its_compressed_twin_are_refused_by_name(tmp_path):
    plain = shard(tmp_path / "corpus/a.tar", 0)
    (tmp_path / "corpus/a.tar.gz").write_bytes(gzip.compress(plain.read_bytes()))
    error = failed(tool(tmp_path / "corpus", "webdataset", tmp_path / "out"))
    assert "a.tar and of" in error and "a.tar.gz would both be named a" in error


def test_no_room_to_unpack_names_the_remedy(tmp_path, monkeypatch):
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(archive(["a"])))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.SpooledTemporaryFile.write", full)
    with pytest.raises(PreprocessError, match="a.tar.gz cannot be unpacked in .*TMPDIR"):
        collect("webdataset", tmp_path)


def test_an_index_names_what_it_leaves_out(crowd, tmp_path):
    for path in ("empty.tar", "single.tar", "gone.tar", "pipe.tar"):
        (crowd / path).unlink()
    found = index_directory(crowd)
    assert [row["name"] for row in found.rows] == ["00000.tar"] and not found.failures
    reasons = {str(file.path.relative_to(crowd)): file.reason for file in found.unread}
    below = "tar file in a folder below, which needs an index of its own"
    assert reasons["deep/UPPER.TAR"] == reasons["linked/00001.tar"] == below
    assert reasons["00009.zip"] == "extension .zip is not read"
    assert reasons["._00000.tar"] == "hidden file" and unlisted(str(crowd)) == []
    shard(crowd / "late.tar", 50)
    assert unlisted(str(crowd)) == ["late.tar"]


@pytest.mark.parametrize(
    "name, data, remedy",
    [
        (
            "b.tar",
            gzip.compress(archive(["b"]), mtime=0),
            r"is compressed with gzip; unpack .*\(gunzip\), or",
        ),
        ("b.tar.zst", zstandard.compress(archive(["b"])), r"with zstd; unpack it first \(unzstd\)"),
        ("b.tgz", archive(["b"]), "is not compressed; rename it to end in .tar"),
        ("b.tar", b"", "is empty; copy it again"),
    ],
)
def test_an_index_refuses_with_the_remedy(tmp_path, name, data, remedy):
    shard(tmp_path / "a.tar", 0)
    (tmp_path / name).write_bytes(data)
    (failure,) = index_directory(tmp_path).failures
    assert str(tmp_path / name) in failure and re.search(remedy, failure)
    assert not (tmp_path / "manifest.json").exists()


def test_hidden_files_stop_no_img2dataset_output(tmp_path):
    for form in ("webdataset", "files", "parquet"):
        folder = shutil.copytree(DATA / "img2dataset" / form, tmp_path / form)
        expected, skipped = collect("img2dataset", folder)
        for path in [p for p in folder.rglob("*") if p.is_file()]:
            path.with_name(f"._{path.name}").write_bytes(APPLE)
        (folder / "logs").mkdir()
        (folder / "notes.txt").write_text("x")
        assert collect("img2dataset", folder) == (expected, skipped)
        reasons = unread("img2dataset", folder)
        assert reasons["logs"] == "folder that is no shard of img2dataset"
        assert reasons["notes.txt"] == "extension .txt is not read"
        assert reasons["._00000_stats.json"] == "hidden file"


def test_a_lost_shard_of_img2dataset_is_named(tmp_path):
    folder = shutil.copytree(DATA / "img2dataset/webdataset", tmp_path / "set")
    (folder / "00001.tar").unlink()
    lost = "statistics of a shard that is not there"
    assert unread("img2dataset", folder) == {"00001_stats.json": lost}


def read_only(path, mode):  # os.access of a user who may only read; root may do all
    return not mode & os.W_OK


def test_a_folder_that_may_not_be_written_to_is_told_before_it_is_indexed(tmp_path, monkeypatch):
    (tmp_path / "a.tar").write_bytes(b"not looked at")
    monkeypatch.setattr(os, "access", read_only)
    with pytest.raises(ShardError, match=f"{tmp_path} may not be written to; .* folder of links"):
        index_directory(tmp_path)
    monkeypatch.undo()
    shard(tmp_path / "b/a.tar", 0)
    (tmp_path / "links").mkdir()
    (tmp_path / "links/a.tar").symlink_to(tmp_path / "b/a.tar")
    assert [row["name"] for row in index_directory(tmp_path / "links").rows] == ["a.tar"]
    assert len(records(tmp_path / "links")) == 3 and os.listdir(tmp_path / "b") == ["a.tar"]


def test_links_in_a_circle_end(tmp_path):
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/x.tar").write_bytes(b"x")
    (tmp_path / "a/b/up").symlink_to("../../a")
    (tmp_path / "c").symlink_to("a")
    found = find_files(tmp_path)
    assert [str(p.relative_to(tmp_path)) for p in found.files] == ["a/x.tar"]
    reasons = {str(file.path.relative_to(tmp_path)): file.reason for file in found.unread}
    assert reasons["a/b/up"] == reasons["c/b/up"] == "link to a folder above it"
    assert reasons["c/x.tar"] == "another name of a file that is read"


def test_a_folder_that_may_not_be_entered_stops_nothing(tmp_path, monkeypatch):
    shard(tmp_path / "a.tar", 0)
    (tmp_path / "lost+found").mkdir()
    scandir = os.scandir

    def refuse(path):
        if Path(path).name == "lost+found":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert unread("webdataset", tmp_path) == {"lost+found": "folder that may not be entered"}
    assert index_directory(tmp_path).rows[0]["samples"] == 3


def test_many_kinds_of_other_files_take_few_lines(tmp_path):
    shard(tmp_path / "a.tar", 0)
    for number in range(40):
        (tmp_path / f"part.{number:05d}").touch()
        (tmp_path / f"x.e{chr(97 + number % 26)}").touch()
    said = succeeded(tool(tmp_path, "webdataset", tmp_path.parent / "few", "--plan"))
    assert "40 x extension .N is not read" in said
    assert said.count("not read:") == 13 and "x other reasons" in said


def test_a_folder_of_the_users_named_preprocess_is_no_exception(tmp_path):
    shard(tmp_path / "preprocess/corpus/a.tar", 0)
    (tmp_path / "preprocess/corpus/b.zip").write_bytes(b"PK")
    (tmp_path / "preprocess/c.npy").write_bytes(b"x")
    assert len(unread("webdataset", tmp_path)) == 2
    assert list(unread("webdataset", tmp_path / "preprocess/corpus")) == ["b.zip"]


def test_an_index_is_made_of_folders(tmp_path):
    for path in (shard(tmp_path / "a.tar", 0), tmp_path / "nowhere"):
        with pytest.raises(ShardError, match=f"{path.name} is not a folder; name the folder that"):
            index_directory(path)
