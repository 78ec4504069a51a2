"""Shards: what is written is read, by us and by webdataset; damage is named, never skipped."""

import hashlib
import json
import os
import pickle
import struct
import tarfile

import pytest
import webdataset
from tiny_data import encoded, picture, record, write

from megatron_owl2.data.records import BadSampleError, Record, Turn
from megatron_owl2.data.shards import (
    Dataset,
    ShardError,
    ShardWriter,
    index_shard,
    read_manifest,
    write_manifest,
)

RECORDS = [record(i) for i in range(25)]


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "set", RECORDS)


def everything(dataset: Dataset) -> list[Record]:
    return [dataset.read(s, i) for s, size in enumerate(dataset.sizes) for i in range(size)]


def test_reads_back_what_was_written(folder):
    dataset = Dataset(folder)
    assert dataset.sizes == [10, 10, 5] and len(dataset) == 25
    assert everything(dataset) == RECORDS


def test_same_records_same_bytes(folder, tmp_path):
    again = write(tmp_path / "again", RECORDS)
    names = sorted(path.name for path in folder.iterdir())
    assert names == sorted(path.name for path in again.iterdir())
    assert len(names) == 7  # 3 tars, 3 indexes, the manifest, no temporary file
    for name in names:
        assert (folder / name).read_bytes() == (again / name).read_bytes()


def test_manifest_states_sizes_hashes_and_totals(folder):
    manifest = read_manifest(folder)
    tars = sorted(folder.glob("*.tar"))
    assert [row["name"] for row in manifest["shards"]] == [path.name for path in tars]
    for row, path in zip(manifest["shards"], tars, strict=True):
        assert row["bytes"] == path.stat().st_size
        assert row["tar_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        index = folder / f"{path.name}.idx"
        assert row["index_sha256"] == hashlib.sha256(index.read_bytes()).hexdigest()
    assert manifest["samples"] == 25
    assert manifest["bytes"] == sum(path.stat().st_size for path in tars)


def test_index_is_energons(folder):
    """Offsets of every sample and the end of the last one, where tarfile finds them."""
    with tarfile.open(folder / "shard-000001.tar") as tar:
        members = tar.getmembers()
        assert {(m.mtime, m.uid, m.gid, m.isreg()) for m in members} == {(0, 0, 0, True)}
        first = {m.name.split(".")[0]: m.offset for m in reversed(members)}
        end = members[-1].offset_data + -(-members[-1].size // 512) * 512
    raw = (folder / "shard-000001.tar.idx").read_bytes()
    assert list(struct.unpack("<11Q", raw)) == [*sorted(first.values()), end]


def test_plain_webdataset_reads_the_shards(folder):
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [r.key for r in RECORDS]
    for sample, expected in zip(samples, RECORDS, strict=True):
        body = json.loads(sample["json"])
        assert body.get("caption") == expected.caption
        assert sample.get("jpg", sample.get("png")) == expected.image


def test_shards_of_webdatasets_writer_can_be_indexed(tmp_path):
    with webdataset.ShardWriter(
        str(tmp_path / "w-%03d.tar"), maxcount=10, mtime=0, verbose=0
    ) as out:
        for item in RECORDS:
            parts = {name.split(".")[1]: data for name, data in item.to_members()}
            out.write({"__key__": item.key, **parts})
    write_manifest(tmp_path, [index_shard(path) for path in sorted(tmp_path.glob("*.tar"))])
    assert everything(Dataset(tmp_path)) == RECORDS


def test_indexing_reproduces_the_writers_row(folder):
    rows = read_manifest(folder)["shards"]
    assert [index_shard(folder / row["name"]) for row in rows] == rows


def test_extended_headers_are_refused_with_the_fix(tmp_path):
    with webdataset.ShardWriter(str(tmp_path / "w-%d.tar"), verbose=0) as out:
        out.write({"__key__": "a", "json": b'{"caption": "x"}'})  # a fractional time: PAX
    with pytest.raises(ShardError, match=r"w-0.tar at byte 0.*mtime=0"):
        index_shard(tmp_path / "w-0.tar")


@pytest.mark.parametrize("keep", [700, 2048, -1024, -512, -100])
def test_indexing_a_cut_tar_fails(folder, keep):
    """In a header, between samples, without the end marker: tarfile accepts some of these."""
    path = folder / "shard-000000.tar"
    os.truncate(path, keep if keep > 0 else path.stat().st_size + keep - 512)
    with pytest.raises(ShardError, match="shard-000000.tar"):
        index_shard(path)


def test_interrupted_writing_is_not_a_data_set(tmp_path):
    with pytest.raises(KeyboardInterrupt), ShardWriter(tmp_path, samples_per_shard=2) as writer:
        for item in RECORDS[:3]:
            writer.write(item)
        raise KeyboardInterrupt
    assert not list(tmp_path.glob("*.tmp")) and not list(tmp_path.glob(".*"))
    with pytest.raises(ShardError, match="did not finish"):
        Dataset(tmp_path)


def test_writer_refuses_a_finished_folder_and_an_empty_set(folder, tmp_path):
    with pytest.raises(FileExistsError, match="finished"):
        ShardWriter(folder)
    with pytest.raises(ValueError, match="at least one sample"), ShardWriter(tmp_path / "empty"):
        pass


def test_a_record_that_cannot_be_stored_leaves_no_trace(tmp_path):
    with ShardWriter(tmp_path) as writer:
        for bad in (
            Record("with.dot", caption="x"),
            Record("x" * 91, caption="x"),
            Record("gif", image=b"GIF89a", caption="x"),
            Record("meta", caption="x", metadata={"a": float("nan")}),
        ):
            with pytest.raises(BadSampleError):
                writer.write(bad)
        writer.write(RECORDS[0])
    assert everything(Dataset(tmp_path)) == RECORDS[:1]


@pytest.mark.parametrize("change", [-512, +512])
def test_another_size_than_the_manifest_names_the_shard(folder, change):
    path = folder / "shard-000001.tar"
    os.truncate(path, path.stat().st_size + change)
    dataset = Dataset(folder)
    assert dataset.read(0, 0) == RECORDS[0]
    with pytest.raises(ShardError, match="shard-000001.tar has .* manifest says"):
        dataset.read(1, 0)


def test_a_changed_or_missing_index_names_the_shard(folder):
    path = folder / "shard-000000.tar.idx"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ShardError, match="shard-000000.tar.idx does not match"):
        Dataset(folder).read(0, 0)
    path.unlink()
    with pytest.raises(ShardError, match="shard-000000.tar.idx"):
        Dataset(folder).read(0, 0)


def test_an_edited_manifest_is_refused(folder):
    path = folder / "manifest.json"
    whole = path.read_text()
    for damaged in (
        whole.replace('"samples": 5', '"samples": 4'),
        whole.replace("shard-000000", "../shard-000000"),
        whole.replace("shards 1", "shards 2"),
        whole[:-20],
        "[]",
    ):
        assert damaged != whole
        path.write_text(damaged)
        with pytest.raises(ShardError, match="manifest.json"):
            Dataset(folder)


def test_every_flipped_header_byte_is_noticed(folder):
    """A damaged header is one bad sample with its place; its neighbours stay readable."""
    path = folder / "shard-000000.tar"
    whole = bytearray(path.read_bytes())
    dataset = Dataset(folder)
    name, offset = dataset.location(0, 4)
    for byte in (0, 3, 100, 125, 140, 150, 156, 260, 400, 511):
        changed = whole.copy()
        changed[offset + byte] ^= 0x01
        path.write_bytes(changed)
        with pytest.raises(BadSampleError, match=f"{name} at byte {offset}: "):
            Dataset(folder).read(0, 4)
        assert Dataset(folder).read(0, 3) == RECORDS[3]
        assert Dataset(folder).read(0, 5) == RECORDS[5]


def test_open_files_are_bounded_and_survive_pickling(tmp_path):
    folder = write(tmp_path / "many", RECORDS, samples_per_shard=1)
    dataset = Dataset(folder, max_open=4)
    before = len(os.listdir("/proc/self/fd"))
    assert everything(dataset) == RECORDS
    assert len(os.listdir("/proc/self/fd")) == before + 4
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy.read(7, 0) == RECORDS[7]
    dataset.close()
    copy.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_longest_unused_file_is_closed(tmp_path):
    dataset = Dataset(write(tmp_path / "many", RECORDS, samples_per_shard=1), max_open=2)
    for shard in (0, 1, 0, 2):
        dataset.read(shard, 0)
    links = (f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd"))
    targets = [os.readlink(link) for link in links if os.path.islink(link)]
    opened = sorted(os.path.basename(target) for target in targets if str(tmp_path) in target)
    assert opened == ["shard-000000.tar", "shard-000002.tar"]


def test_a_shard_that_is_cut_while_open_is_an_error(folder):
    dataset = Dataset(folder)
    dataset.read(0, 0)
    end = dataset.location(0, 9)[1] + 100
    os.truncate(folder / "shard-000000.tar", end)
    with pytest.raises(ShardError, match=f"shard-000000.tar ended at byte {end}: cut"):
        dataset.read(0, 9)


IMAGE = encoded(picture(0))


@pytest.mark.parametrize(
    "parts, reason",
    [
        (dict(), "exactly one"),
        (dict(caption="a", turns=(Turn("q", "a"),)), "exactly one"),
        (dict(caption="  "), "caption is empty"),
        (dict(caption="a \ud800"), "not valid Unicode"),
        (dict(caption="<|image|>a", image=IMAGE), "inside a caption"),
        (dict(turns=(Turn("", "a"),)), "question 1 is empty"),
        (dict(turns=(Turn("q", "a"), Turn("q", "\n")), image=IMAGE), "answer 2 is empty"),
        (dict(turns=(Turn("<|image|>q", "a"),)), "without an image"),
        (dict(turns=(Turn("<|image|><|image|>q", "a"),), image=IMAGE), "2 placeholders"),
        (dict(turns=(Turn("q", "a"), Turn("<|image|>", "a")), image=IMAGE), "outside the first"),
        (dict(turns=(Turn("q", "<|image|>"),), image=IMAGE), "inside an answer"),
        (dict(caption="a", metadata=None), "metadata"),
    ],
)
def test_contradicting_records_are_refused(parts, reason):
    with pytest.raises(BadSampleError, match=reason):
        Record("key", **parts)


@pytest.mark.parametrize(
    "parts, reason",
    [
        ({"jpg": IMAGE}, "no .json"),
        ({"json": b"{"}, "not JSON"),
        ({"json": b"[" * 100_000}, "not JSON"),
        ({"json": b'{"caption": "a", "extra": 1}'}, "only"),
        ({"json": b'{"caption": 5}'}, "not a text"),
        ({"json": b'{"turns": 5}'}, "wrong type"),
        ({"json": b'{"turns": [{"question": "q"}]}'}, "wrong type"),
        ({"json": b'{"turns": [{"question": 1, "answer": "a"}]}'}, "not a text"),
        ({"json": b'{"caption": "a"}', "txt": b"a"}, "expected one .json"),
        ({"json": b'{"caption": "a"}', "jpg": IMAGE, "png": IMAGE}, "expected one .json"),
    ],
)
def test_malformed_members_are_refused(parts, reason):
    with pytest.raises(BadSampleError, match=reason):
        Record.from_members("key", parts)
