"""Shards: what is written is read, by us and by webdataset; damage is named, never skipped."""

import hashlib
import json
import os
import pickle
import struct
import tarfile

import pytest
import webdataset
from processes import open_below
from tiny_data import encoded, make_image, record, write

from data_prep.index import index_shard
from megatron_owl2.data.shards.dataset import ShardedDataset
from megatron_owl2.data.shards.records import Record, Turn
from megatron_owl2.data.shards.writer import ShardWriter
from megatron_owl2.data.storage import StorageOptions
from megatron_owl2.errors import BadSampleError, ShardError, StorageError

RECORDS = [record(i) for i in range(25)]
ONCE = StorageOptions(attempts=1)


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "set", RECORDS)


def everything(dataset: ShardedDataset) -> list[Record]:
    return [dataset.read(s, i) for s, size in enumerate(dataset.sizes) for i in range(size)]


def test_a_reopened_data_set_shares_the_manifest_and_nothing_else(folder):
    dataset = ShardedDataset(folder)
    dataset.read(0, 0)
    other = dataset.reopened()
    assert other.shards is dataset.shards and other.storage is not dataset.storage
    assert other.storage.counters["reads"] == 0 < dataset.storage.counters["reads"]
    assert everything(other) == RECORDS


def test_reads_back_what_was_written(folder):
    dataset = ShardedDataset(folder)
    assert dataset.sizes == [10, 10, 5] and len(dataset) == 25
    assert everything(dataset) == RECORDS


def test_same_records_same_bytes(folder, tmp_path):
    again = write(tmp_path / "again", RECORDS)
    names = sorted(path.name for path in folder.iterdir())
    assert names == sorted(path.name for path in again.iterdir())
    assert len(names) == 10  # 3 tars, 3 indexes, 3 sums, the manifest, no temporary file
    for name in names:
        assert (folder / name).read_bytes() == (again / name).read_bytes()


def test_manifest_states_sizes_hashes_and_totals(folder):
    manifest = json.loads((folder / "manifest.json").read_bytes())
    tars = sorted(folder.glob("*.tar"))
    assert [row["name"] for row in manifest["shards"]] == [path.name for path in tars]
    for row, path in zip(manifest["shards"], tars, strict=True):
        assert row["bytes"] == path.stat().st_size
        for suffix in ("index", "sums"):
            sidecar = folder / f"{path.name}.{'idx' if suffix == 'index' else suffix}"
            assert row[f"{suffix}_sha256"] == hashlib.sha256(sidecar.read_bytes()).hexdigest()
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
        assert [sample[e] for e in ("jpg", "png") if e in sample] == [*expected.images]


def test_several_images_come_back_in_their_order(tmp_path):
    """By our reader, by plain webdataset, and from the index of another program's tar."""
    images = tuple(encoded(make_image(i), kind) for i, kind in enumerate(["PNG", *["JPEG"] * 11]))
    turns = (Turn("<|image|>" * 5 + "a", "b"), Turn("c" + "<|image|>" * 7, "d"))
    many = Record("many", images, turns=turns, system="Be kind.")
    folder = write(tmp_path / "set", [RECORDS[0], many, RECORDS[1]])
    assert ShardedDataset(folder)[1] == many
    urls = [str(folder / "shard-000000.tar")]
    sample = list(webdataset.WebDataset(urls, shardshuffle=False))[1]
    names = ["0.png", *(f"{i}.jpg" for i in range(1, 12))]
    assert sample["__key__"] == "many" and [sample[name] for name in names] == [*images]
    rows = ShardedDataset(folder).shards
    assert [index_shard(folder / row["name"]) for row in rows] == [(row, {}) for row in rows]


def test_data_sets_of_the_format_before_are_read(folder):
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace("megatron_owl2 shards 3", "megatron_owl2 shards 2"))
    assert [ShardedDataset(folder)[i] for i in range(len(RECORDS))] == list(RECORDS)


def test_indexing_reproduces_the_writers_row(folder):
    rows = ShardedDataset(folder).shards
    assert [index_shard(folder / row["name"]) for row in rows] == [(row, {}) for row in rows]


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
        ShardedDataset(tmp_path)


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
            Record("gif", images=(b"GIF89a",), caption="x"),
            Record("meta", caption="x", metadata={"a": float("nan")}),
        ):
            with pytest.raises(BadSampleError):
                writer.write(bad)
        writer.write(RECORDS[0])
        with pytest.raises(BadSampleError, match="'tiny00000' is already in shard-000000.tar"):
            writer.write(RECORDS[0])
    assert everything(ShardedDataset(tmp_path)) == RECORDS[:1]


@pytest.mark.parametrize("change", [-512, +512])
def test_another_size_than_the_manifest_names_the_shard(folder, change):
    path = folder / "shard-000001.tar"
    os.truncate(path, path.stat().st_size + change)
    dataset = ShardedDataset(folder)
    assert dataset.read(0, 0) == RECORDS[0]
    with pytest.raises(ShardError, match="shard-000001.tar has .* manifest says"):
        dataset.read(1, 0)


@pytest.mark.parametrize("suffix", [".idx", ".sums"])
def test_a_changed_or_missing_sidecar_is_named(folder, suffix):
    path = folder / f"shard-000000.tar{suffix}"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ShardError, match=f"shard-000000.tar{suffix} does not match"):
        ShardedDataset(folder).read(0, 0)
    path.write_bytes(whole[:-8])
    with pytest.raises(StorageError, match=f"shard-000000.tar{suffix}"):
        ShardedDataset(folder, ONCE).read(0, 0)
    path.unlink()
    with pytest.raises(StorageError, match=f"shard-000000.tar{suffix}"):
        ShardedDataset(folder, ONCE).read(0, 0)


def test_an_edited_manifest_is_refused(folder):
    path = folder / "manifest.json"
    whole = path.read_text()
    for damaged in (
        whole.replace('"samples": 5', '"samples": 4'),
        whole.replace("shard-000000", "../shard-000000"),
        whole.replace('"samples": 25', '"samples": 24'),
        whole.replace(' "samples": 25,\n', ""),
        whole.replace("shards 3", "shards 4"),
        whole[:-20],
        "[]",
    ):
        assert damaged != whole
        path.write_text(damaged)
        with pytest.raises(ShardError, match="manifest.json"):
            ShardedDataset(folder)


def test_every_flipped_byte_is_noticed(folder):
    """In a header, a caption or an image: one bad sample with its place; its neighbours stay."""
    path = folder / "shard-000000.tar"
    whole = path.read_bytes()
    dataset = ShardedDataset(folder)
    name, (offset, stop) = "shard-000000.tar", dataset.range_of(0, 4)
    for byte in range(offset, stop, 7):
        changed = bytearray(whole)
        changed[byte] ^= 0x01
        path.write_bytes(changed)
        with pytest.raises(BadSampleError, match=f"{name} at byte {offset}: .*checksum"):
            dataset.read(0, 4)
        assert dataset.read(0, 3) == RECORDS[3]
        assert dataset.read(0, 5) == RECORDS[5]


def test_a_data_set_survives_pickling_and_closing(folder):
    dataset = ShardedDataset(folder)
    assert dataset.read(0, 0) == RECORDS[0]
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy.read(1, 7) == RECORDS[17]
    assert open_below(folder) > 0
    dataset.close()
    copy.close()
    assert open_below(folder) == 0
    assert dataset.read(2, 0) == RECORDS[20]


def test_only_so_much_of_the_indexes_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_owl2.data.shards.dataset._MAX_BLOCKS", 3)
    dataset = ShardedDataset(write(tmp_path / "many", RECORDS, samples_per_shard=2))
    for _ in range(2):
        assert everything(dataset) == RECORDS
        assert len(dataset._blocks) == 3


def test_a_shard_that_is_cut_while_in_use_is_an_error(folder):
    dataset = ShardedDataset(folder, ONCE)
    dataset.read(0, 0)
    end = dataset.range_of(0, 9)[0] + 100
    os.truncate(folder / "shard-000000.tar", end)
    with pytest.raises(StorageError, match=f"shard-000000.tar: .* ended at byte {end}"):
        dataset.read(0, 9)


IMAGE = encoded(make_image(0))


@pytest.mark.parametrize(
    "parts, reason",
    [
        (dict(), "exactly one"),
        (dict(caption="a", turns=(Turn("q", "a"),)), "exactly one"),
        (dict(caption="  "), "caption is empty"),
        (dict(caption="a \ud800"), "not valid Unicode"),
        (dict(caption="a", images=(IMAGE, IMAGE)), "a caption of 2 images"),
        (dict(caption="a", system="s"), "a caption with a system text"),
        (dict(turns=(Turn("q", "a"),), system=1), "system is not a text"),
        (dict(turns=(Turn("", "a"),)), "question 1 is empty"),
        (dict(turns=(Turn("q", "a"), Turn("q", "\n")), images=(IMAGE,)), "answer 2 is empty"),
        (dict(turns=(Turn("<|image|><|image|>q", "a"),), images=(IMAGE,)), "2 placeholders"),
        (dict(turns=(Turn("<|image|>q", "a"),), images=(IMAGE,) * 3), "1 placeholders .* 3 images"),
        (dict(caption="a", metadata=None), "metadata"),
    ],
)
def test_contradicting_records_are_refused(parts, reason):
    with pytest.raises(BadSampleError, match=reason):
        Record("key", **parts)


@pytest.mark.parametrize(
    "parts, reason",
    [
        ({"jpg": IMAGE}, "no txt or json"),
        ({"json": b"{"}, "not JSON"),
        ({"json": b"[" * 100_000}, "not JSON"),
        ({"json": b"[]"}, "not an object"),
        ({"json": b'{"caption": "a", "extra": 1}'}, "no image"),
        ({"json": b'{"extra": 1}', "jpg": IMAGE}, "lacks a value"),
        ({"txt": b"a"}, "no image"),
        ({"txt": b"\xff", "jpg": IMAGE}, "caption is not valid Unicode"),
        ({"txt": b" ", "jpg": IMAGE}, "caption is empty"),
        ({"json": b'{"caption": 5}'}, "not a text"),
        ({"json": b'{"turns": 5}'}, "wrong type"),
        ({"json": b'{"turns": [{"question": "q"}]}'}, "wrong type"),
        ({"json": b'{"turns": [{"question": 1, "answer": "a"}]}'}, "not a text"),
        ({"json": b'{"caption": "a"}', "txt": b"a"}, "no image"),
        ({"json": b'{"caption": "a"}', "cls": b"1"}, "neither an image .* nor txt nor json"),
        ({"json": b'{"caption": "a"}', "jpg": IMAGE, "png": IMAGE}, "more than one image"),
        ({"json": b'{"caption": "a"}', "jpg": IMAGE, "1.png": IMAGE}, "more than one image"),
        ({"json": b'{"caption": "a"}', "0.jpg": IMAGE, "0.png": IMAGE}, "not 0, 1 and so on"),
        ({"json": b'{"caption": "a"}', "1.jpg": IMAGE, "2.jpg": IMAGE}, "not 0, 1 and so on"),
        ({"json": b'{"caption": "a"}', "0.jpg": IMAGE, "1.jpg": IMAGE}, "a caption of 2 images"),
        ({"txt": b"a", "0.jpg": IMAGE, "1.jpg": IMAGE}, "a caption of several images"),
        ({"json": b'{"caption": "a"}', "01.jpg": IMAGE}, "a name with several dots"),
    ],
)
def test_malformed_members_are_refused(parts, reason):
    with pytest.raises(BadSampleError, match=reason):
        Record.from_members("key", parts)
