"""Members of samples in tar files of other tools: what is none splits and spoils no sample."""

import codecs
import json
import tarfile
from pathlib import Path

import pytest
from foreign_tars import IMAGE, pack, parts
from preprocess_run import succeeded, tool
from read_corpus import collect
from tiny_data import encoded, make_image, record
from tool import run

from data_prep.check import check
from data_prep.index import index_directory, index_shard
from megatron_owl2.data.shards.dataset import ShardedDataset
from megatron_owl2.errors import ShardError

APPLE = bytes.fromhex("0005160700020000") + b"Mac OS X" + bytes(147)


def adopted(folder: Path) -> list[str]:
    """Captions of a folder of shards once it is indexed; all samples are sound and used."""
    found = index_directory(folder)
    assert not found.failures and not found.unusable
    (result,) = check(str(folder), decode=1.0)
    assert (result.bad, result.faults, result.unreadable) == ([], [], 0)
    dataset = ShardedDataset(folder)
    return [dataset.read(0, i).caption for i in range(dataset.sizes[0])]


STRANGERS = {
    "resource forks": lambda name: [(f"._{name}", APPLE)],
    "in a folder": lambda name: [(".DS_Store", b"x"), ("__MACOSX/._x", APPLE)],
    "hidden folder": lambda name: [(f".git/{name}", b"x")],
    "without an extension": lambda name: [("README", b"x"), ("Makefile.", b"x")],
    "extension alone": lambda name: [(".jpg", IMAGE)],
    "of webdataset": lambda name: [("__meta__", b"x"), ("__index__.x__", b"x")],
}


@pytest.mark.parametrize("kind", STRANGERS)
@pytest.mark.parametrize("folder", ["", "./", "d/", "./d/e/"])
def test_what_is_no_member_stands_between_members(tmp_path, kind, folder):
    members = []
    for number in range(6):
        for name, data in parts(f"{number:05d}", "jpg", "json", "txt"):
            members += [(folder + stranger, x) for stranger, x in STRANGERS[kind](name)]
            members.append((folder + name, data))
    members += [(folder + stranger, data) for stranger, data in STRANGERS[kind]("end.jpg")]
    pack(tmp_path / "in/a.tar", members)
    records, skipped = collect("webdataset", tmp_path / "in")
    captions = [f"caption {number:05d}" for number in range(6)]
    assert [r.caption for r in records] == captions and skipped == {}
    assert all(r.images[0] == IMAGE and r.metadata["id"] for r in records)
    assert adopted(tmp_path / "in") == captions


def test_labels_and_lists_of_gnu_tar_are_no_damage(tmp_path):
    path = pack(tmp_path / "a.tar", parts("0", "jpg", "txt") + parts("1", "jpg", "txt"))
    data = path.read_bytes()
    extra = []
    for kind in (b"V", b"D"):
        label = tarfile.TarInfo("label")
        label.type, label.size = kind, 5 if kind == b"D" else 0
        extra.append(label.tobuf(tarfile.GNU_FORMAT) + (bytes(512) if kind == b"D" else b""))
    path.write_bytes(b"".join(extra) + data)
    records, skipped = collect("webdataset", tmp_path)
    assert [r.key for r in records] == ["0", "1"] and skipped == {}
    assert adopted(tmp_path) == ["caption 0", "caption 1"]


@pytest.mark.parametrize("folder", ["", "long" * 40 + "/"])
@pytest.mark.parametrize("format_", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_name_that_is_not_utf8_spoils_no_sample(tmp_path, folder, format_):
    names = [f"{folder}{key}.{e}" for key in ("0", "caf\udce9", "2") for e in ("jpg", "txt")]
    members = [(name, IMAGE if name.endswith("jpg") else b"text") for name in names]
    pack(tmp_path / "a.tar", members, format=format_, errors="surrogateescape")
    records, skipped = collect("webdataset", tmp_path)
    assert [r.caption for r in records] == ["text"] * 3 and skipped == {}


def test_members_that_lie_apart_are_put_together(tmp_path):
    keys = [f"{i}" for i in range(8)]
    members = [m for e in ("jpg", "txt", "json") for key in keys for m in parts(key, e)]
    pack(tmp_path / "in/a.tar", members)
    records, skipped = collect("webdataset", tmp_path / "in")
    assert [(r.key, r.caption) for r in records] == [(key, f"caption {key}") for key in keys]
    assert [r.metadata["id"] for r in records] == keys and skipped == {}
    with pytest.raises(ShardError, match="tools/preprocess_data.py .* puts together files that"):
        index_directory(tmp_path / "in")


def test_whole_samples_of_one_key_stay_two(tmp_path):
    members = parts("a", "jpg", "txt") + parts("b", "jpg", "txt") + parts("a", "png", "json")
    pack(tmp_path / "in/a.tar", members)
    records, skipped = collect("webdataset", tmp_path / "in")
    assert [r.key for r in records] == ["a", "b"]
    assert skipped == {"no caption in the .json member; name its field with --caption-column": 1}


DOTS = "files of several samples: their names have dots"


@pytest.mark.parametrize(
    "members, kept, reasons",
    [
        ([m for i in range(3) for m in parts(f"photo{i}.v1", "jpg", "txt")], 3, {}),
        ([m for i in range(3) for m in parts(f"s{i}", "input.jpg", "outputs.txt")], 3, {}),
        ([m for i in range(3) for m in parts(f"s{i}", "image.png", "meta.json", "txt")], 3, {}),
        ([m for i in range(6) for m in parts(f"i_{i // 2}.{i % 2}5", "jpg", "txt")], 0, {DOTS: 3}),
        (
            [m for i in (0, 2, 1, 3) for m in parts(f"i_{i % 2}.{i}5", "jpg", "txt")],
            0,
            {DOTS: 2},
        ),
        (
            [m for i in (0, 1, 2, 3) for m in parts(f"i_{i % 2}.{i}5", "jpg", "txt")],
            4,
            {},
        ),
        (parts("s", "jpg", "seg.png", "txt"), 0, {"more than one image": 1}),
        (parts("s", "jpg", "txt", "ocr.txt"), 1, {}),
        (parts("s", "jpg", "a.txt", "b.txt"), 0, {"more than one text": 1}),
        (parts("s", "jpg", "a.json", "b.json"), 0, {"more than one json": 1}),
        (parts("s", "heic", "txt"), 0, {"no image": 1}),
        (parts("s", "jpg", "cls"), 0, {"no .txt or .json with a caption": 1}),
    ],
)
def test_image_and_caption_are_found_by_one_rule(tmp_path, members, kept, reasons):
    pack(tmp_path / "a.tar", members)
    records, skipped = collect("webdataset", tmp_path)
    assert len(records) == kept and skipped == reasons
    assert len({r.key for r in records}) == kept and all(r.to_members() for r in records)


def test_a_reason_names_the_members_that_were_met(tmp_path):
    pack(tmp_path / "a.tar", parts("ok", "jpg", "txt") + parts("s", "heic", "txt"))
    said = succeeded(tool(tmp_path, "webdataset", tmp_path / "out"))
    assert "1 x no image (such as a.tar, s (.heic, .txt))" in said


TEXT = "a red house é"
MARKED = {
    "UTF-8": codecs.BOM_UTF8 + TEXT.encode(),
    "UTF-8 twice": 2 * codecs.BOM_UTF8 + b"\n" + TEXT.encode() + b"\r\n",
    "UTF-16 LE": codecs.BOM_UTF16_LE + TEXT.encode("utf-16-le"),
    "UTF-16 BE": codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be"),
}


@pytest.mark.parametrize("data", MARKED.values(), ids=MARKED)
def test_a_caption_does_not_begin_with_a_byte_order_mark(tmp_path, data):
    pack(tmp_path / "in/a.tar", [("0.jpg", IMAGE), ("0.txt", data)])
    records, _ = collect("webdataset", tmp_path / "in")
    assert [r.caption for r in records] == [TEXT]
    assert adopted(tmp_path / "in") == [TEXT]
    row = json.dumps({"status": "success", "caption": "x"}).encode()
    pack(tmp_path / "dl/00000.tar", [("0.jpg", IMAGE), ("0.txt", data), ("0.json", row)])
    (tmp_path / "dl/00000_stats.json").write_text('{"count": 1}')
    records, skipped = collect("img2dataset", tmp_path / "dl")
    assert [r.caption for r in records] == [TEXT] and skipped == {}


@pytest.mark.parametrize("mark", ["\ufeff", " \ufeff "])
def test_a_mark_inside_json_goes_too(tmp_path, mark):
    row = codecs.BOM_UTF8 + json.dumps({"caption": mark + TEXT + mark}).encode()
    pack(tmp_path / "a.tar", [("0.jpg", IMAGE), ("0.json", row)])
    assert [r.caption for r in collect("webdataset", tmp_path)[0]] == [TEXT]


def test_a_caption_of_other_bytes_is_refused_everywhere(tmp_path):
    row = json.dumps({"status": "success"}).encode()
    members = [("0.jpg", IMAGE), ("0.txt", b"caf\xe9"), ("0.json", row)]
    pack(tmp_path / "00000.tar", members + parts("1", "jpg", "txt"))
    (tmp_path / "00000_stats.json").write_text('{"count": 2}')
    for kind in ("webdataset", "img2dataset"):
        _, skipped = collect(kind, tmp_path)
        assert skipped["caption is not valid Unicode"] == 1
    assert index_directory(tmp_path).unusable == {"caption is not valid Unicode": 1}


AVIF = b"\0\0\0\x20ftypavif"


@pytest.mark.parametrize(
    "members, reason",
    [
        ([("x.jpg", b"<html>"), ("x.txt", b"t")], "image cannot be decoded: it is an HTML page"),
        ([("x.jpg", AVIF), ("x.txt", b"t")], "image cannot be decoded: AVIF is not read"),
        ([("x.jpg", IMAGE), ("x.txt", b" \n")], "caption is empty"),
        ([("x.jpg", IMAGE), ("x.json", b"{")], "its .json member is not JSON"),
        (
            [("x.jpg", IMAGE), ("x.json", b'{"alt": "t"}')],
            "its .json member lacks a value or has one of the wrong type",
        ),
        (
            [("x.v1.jpg", IMAGE), ("x.v1.txt", b"t")],
            "a name with several dots, of which training reads the first as its end",
        ),
    ],
)
def test_what_training_cannot_use_is_counted_by_the_index(tmp_path, members, reason):
    pack(tmp_path / "a.tar", parts("0", "jpg", "txt") + members + parts("1", "jpg", "txt"))
    done = run("index_data", tmp_path)
    assert done.returncode == 0 and "3 samples in 1 sound shards" in done.stdout
    assert "1 of them cannot be used" in done.stdout and f"1 x {reason}" in done.stdout
    (result,) = check(str(tmp_path), decode=1.0)
    assert result.good + len(result.bad) == 3 and len(result.bad) <= 1


def test_the_index_calls_sound_every_kind_of_image_that_training_decodes(tmp_path):
    images = [encoded(make_image(i), kind) for i, kind in enumerate(("GIF", "BMP", "TIFF", "PNG"))]
    members = [[(f"{i}.jpg", image), (f"{i}.txt", b"t")] for i, image in enumerate(images)]
    pack(tmp_path / "a.tar", sum(members, []))
    assert not index_directory(tmp_path).unusable
    (result,) = check(str(tmp_path), decode=1.0)
    assert (result.good, result.decoded, result.bad) == (4, 4, [])


def test_an_archive_of_strangers_alone_is_said_to_hold_no_sample(tmp_path):
    pack(tmp_path / "a.tar", [("README", b"x"), ("._0.jpg", APPLE)])
    pack(tmp_path / "b.tar", parts("0", "jpg", "txt"))
    _, skipped = collect("webdataset", tmp_path)
    assert skipped == {"tar file without a sample": 1}


def test_archives_put_together_with_cat_are_read_to_the_end(tmp_path):
    first = pack(tmp_path / "one/a.tar", parts("0", "jpg", "txt")).read_bytes()
    second = pack(tmp_path / "two/a.tar", parts("0", "jpg", "txt") + parts("1", "jpg", "txt"))
    (tmp_path / "in").mkdir()
    path = tmp_path / "in/a.tar"
    for end, kept, reasons in (
        (b"", ["0", "0", "1"], {}),
        (b"rubbish" * 100, ["0", "0", "1"], {"rest of a damaged file": 1}),
        (b"x" * 512, ["0", "0", "1"], {"rest of a damaged file": 1}),
    ):
        path.write_bytes(first + second.read_bytes() + end)
        records, skipped = collect("webdataset", tmp_path / "in")
        assert [r.key for r in records] == kept and skipped == reasons
    said = succeeded(tool(tmp_path / "in", "webdataset", tmp_path / "out"))
    assert "kept 2, skipped 2" in said and "1 x key occurs twice" in said
    with pytest.raises(ShardError, match="data after the end marker"):
        index_shard(path)


def test_files_of_a_sample_that_lie_apart_are_no_texts(tmp_path):
    members = [m for e in ("jpg", "json") for i in range(6) for m in parts(str(i), e)]
    pack(tmp_path / "a.tar", members)
    with pytest.raises(ShardError, match=r"12 of 12 .*6 x files of one name that lie apart"):
        index_directory(tmp_path)


def test_archives_joined_with_cat_share_no_samples(tmp_path):
    first = pack(tmp_path / "1/a.tar", parts("0", "jpg", "txt") + parts("1", "jpg")).read_bytes()
    second = pack(tmp_path / "2/a.tar", parts("1", "txt") + parts("2", "jpg", "txt")).read_bytes()
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.tar").write_bytes(first + second)
    records, skipped = collect("webdataset", tmp_path / "in")
    assert [r.key for r in records] == ["0", "2"]
    assert skipped == {"no image": 1, "no .txt or .json with a caption": 1}


def test_our_own_shards_unpacked_and_packed_again_are_read(tmp_path):
    originals = [record(i) for i in range(4)]
    members = [(f"./{name}", data) for r in originals for name, data in r.to_members()]
    pack(tmp_path / "a.tar", members)
    assert collect("webdataset", tmp_path) == (originals, {})
    pack(tmp_path / "a.tar", [(f"x/{name[2:]}", data) for name, data in members])
    records, skipped = collect("webdataset", tmp_path)
    assert [r.caption for r in records] == [r.caption for r in originals] and skipped == {}
    assert records[0].metadata["key"] == f"x/{originals[0].key}"
    assert all(r.to_members() for r in records)


def test_json_of_others_that_looks_like_ours_keeps_its_own_reason(tmp_path):
    body = {"caption": "c", "source": "web", "metadata": "none"}
    members = [("0.jpg", IMAGE), ("0.json", json.dumps(body).encode())]
    members += [("1.heic", b"x"), ("1.json", json.dumps(body).encode())]
    pack(tmp_path / "a.tar", members)
    records, skipped = collect("webdataset", tmp_path)
    assert [(r.caption, r.metadata["source"]) for r in records] == [("c", "web")]
    assert skipped == {"no image": 1}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "Git LFS; fetch"),
        (b"<!DOCTYPE html><html>404</html>", "an HTML page, left by a failed download"),
        (b"PK\3\4" + bytes(600), "a zip archive; unpack it"),
    ],
)
def test_what_is_no_tar_is_told_as_what_it_is(tmp_path, data, words):
    (tmp_path / "a.tar").write_bytes(data)
    _, skipped = collect("webdataset", tmp_path)
    (reason,) = skipped
    assert reason.startswith("not a tar file: it is ") and words in reason
    (failure,) = index_directory(tmp_path).failures
    assert words in failure


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le"])
def test_a_caption_of_zero_bytes_is_no_caption(tmp_path, encoding):
    bad = [("1.jpg", IMAGE), ("1.txt", TEXT.encode(encoding))]
    pack(tmp_path / "a.tar", parts("0", "jpg", "txt") + bad)
    _, skipped = collect("webdataset", tmp_path)
    assert skipped == {"caption holds zero bytes: text in UTF-16 or UTF-32?": 1}
    assert index_directory(tmp_path).unusable == skipped
