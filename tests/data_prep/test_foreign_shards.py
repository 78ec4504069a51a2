"""Shards of other programs: indexed where they lie and read like our own."""

import hashlib
import io
import os
import subprocess
import tarfile

import pytest
import webdataset
from tiny_data import encoded, make_image, record

from data_prep.check import check
from data_prep.index import index_directory, index_shard
from megatron_owl2.data.shards.dataset import ShardedDataset
from megatron_owl2.data.shards.manifest import write_manifest
from megatron_owl2.data.shards.records import Record
from megatron_owl2.data.shards.tar import members
from megatron_owl2.errors import ShardError

RECORDS = [record(i) for i in range(25)]
IMAGE = encoded(make_image(0))


def everything(folder) -> list[Record]:
    dataset = ShardedDataset(folder)
    return [dataset.read(s, i) for s, size in enumerate(dataset.sizes) for i in range(size)]


def adopt(folder) -> list[Record]:
    write_manifest(folder, [index_shard(path)[0] for path in sorted(folder.glob("*.tar"))])
    return everything(folder)


@pytest.mark.parametrize("options", [{}, {"mtime": 0}])
def test_webdatasets_writer(tmp_path, options):
    """By default its modification times have fractions, so that every member has a PAX header."""
    pattern = str(tmp_path / "w-%03d.tar")
    with webdataset.ShardWriter(pattern, maxcount=10, verbose=0, **options) as out:
        for item in RECORDS:
            parts = {name.split(".")[1]: data for name, data in item.to_members()}
            out.write({"__key__": item.key, **parts})
    assert adopt(tmp_path) == RECORDS
    index = (tmp_path / "w-000.tar.idx").read_bytes()
    with tarfile.open(tmp_path / "w-000.tar") as tar:
        offsets = {}
        for member in tar:
            offsets.setdefault(member.name.split(".")[0], member.offset)
    assert [int.from_bytes(index[i : i + 8], "little") for i in range(0, 80, 8)] == list(
        offsets.values()
    )


def test_pairs_as_webdataset_corpora_are_published(tmp_path):
    with webdataset.ShardWriter(str(tmp_path / "p-%d.tar"), verbose=0) as out:
        out.write({"__key__": "0", "jpg": IMAGE, "txt": " an owl\n"})
        out.write({"__key__": "1", "jpg": IMAGE, "json": {"caption": "a cat", "url": "u"}})
        both = {"caption": "ignored", "status": "success", "similarity": 0.3}
        out.write({"__key__": "2", "jpg": IMAGE, "txt": "a dog", "json": both})
    found = adopt(tmp_path)
    assert [r.caption for r in found] == ["an owl", "a cat", "a dog"]
    assert all(r.images[0] == IMAGE for r in found)
    assert found[2].metadata == both


@pytest.mark.parametrize("format", ["gnu", "pax", "ustar"])
def test_archives_of_tar_with_folders_and_long_names(tmp_path, format):
    names = ["a/0", "a/1", "b/" + "x" * (90 if format == "ustar" else 180)]
    files = tmp_path / "files"
    for name in names:
        (files / name).parent.mkdir(parents=True, exist_ok=True)
        (files / f"{name}.jpg").write_bytes(IMAGE)
        (files / f"{name}.txt").write_text(f"caption of {name}")
    data = tmp_path / "data"
    data.mkdir()
    command = ["tar", f"--format={format}", "--sort=name", "-cf", data / "t.tar", "-C", files]
    subprocess.run([*command, "a", "b"], check=True)
    assert [(r.key, r.caption) for r in adopt(data)] == [(n, f"caption of {n}") for n in names]


def add(tar: tarfile.TarFile, name: str, data: bytes, **fields) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    for field, value in fields.items():
        setattr(member, field, value)
    tar.addfile(member, io.BytesIO(data))


FOLDERS = {"type": tarfile.DIRTYPE}


@pytest.mark.parametrize(
    "names",
    [
        ["./", "./a", "./b"],
        [f"{'long' * 50}/", "a", "b"],
        ["a", "empty/", "b", "last/", f"{'long' * 50}/"],
        ["a", "b", "a"],
        ["a", "a"],
    ],
    ids=["folder first", "long folder first", "folders last", "key again", "key twice in a row"],
)
@pytest.mark.parametrize("headers", [{}, {"comment": "of the whole archive"}], ids=["", "global"])
def test_what_is_indexed_is_sound_when_it_is_checked(tmp_path, names, headers):
    path = tmp_path / "d.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, pax_headers=headers) as tar:
        for name in names:
            if name.endswith("/"):
                add(tar, name, b"", **FOLDERS)
            else:
                add(tar, f"{name}.jpg", IMAGE)
                add(tar, f"{name}.txt", name.encode())
    keys = [name for name in names if not name.endswith("/")]
    found = index_directory(tmp_path)
    assert not found.failures and [row["samples"] for row in found.rows] == [len(keys)]
    (result,) = check(str(tmp_path))
    assert (result.good, result.bad, result.faults) == (len(keys), [], [])
    assert [(r.key, r.caption) for r in everything(tmp_path)] == [(key, key) for key in keys]


def test_the_index_of_an_archive_with_folders_is_energons(tmp_path):
    """Where tarfile finds the first file of every sample, and the end of the last member."""
    with tarfile.open(tmp_path / "d.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for name in ("./", "a", "b/", "b/c", "d/"):
            if name.endswith("/"):
                add(tar, name, b"", **FOLDERS)
            else:
                add(tar, f"{name}.jpg", IMAGE)
                add(tar, f"{name}.txt", b"text")
    index_shard(tmp_path / "d.tar")
    with tarfile.open(tmp_path / "d.tar") as tar:
        expected = [member.offset for member in tar if member.name.endswith(".jpg")]
        expected.append(tar.offset)
    index = (tmp_path / "d.tar.idx").read_bytes()
    assert [int.from_bytes(index[i : i + 8], "little") for i in range(0, 24, 8)] == expected


@pytest.mark.parametrize("change", [0, 3])
def test_a_file_before_the_first_sample_is_a_fault(tmp_path, change):
    """The index has lost a sample and the manifest knows no better; perhaps its header is bad."""
    path = tmp_path / "d.tar"
    with tarfile.open(path, "w") as tar:
        for key in "ab":
            add(tar, f"{key}.jpg", IMAGE)
            add(tar, f"{key}.txt", b"text")
    row, _ = index_shard(path)
    for suffix, digest in ((".idx", "index_sha256"), (".sums", "sums_sha256")):
        sidecar = tmp_path / f"d.tar{suffix}"
        sidecar.write_bytes(sidecar.read_bytes()[8:])
        row[digest] = hashlib.sha256(sidecar.read_bytes()).hexdigest()
    write_manifest(tmp_path, [row | {"samples": 1}])
    data = bytearray(path.read_bytes())
    data[change] ^= change
    path.write_bytes(data)
    (result,) = check(str(tmp_path))
    assert result.good == 1 and len(result.faults) == 1
    assert "d.tar: not only folders lie before its first sample, at byte" in result.faults[0]


def test_names_that_lead_elsewhere_are_only_names(tmp_path):
    with tarfile.open(tmp_path / "d.tar", "w") as tar:
        for name in ("../../up", "/etc/root", "snö/猫"):
            add(tar, f"{name}.jpg", IMAGE)
            add(tar, f"{name}.txt", b"text")
    before = sorted(os.listdir(tmp_path))
    assert [r.key for r in adopt(tmp_path)] == ["../../up", "/etc/root", "snö/猫"]
    new = {"d.tar.idx", "d.tar.sums", "manifest.json"}
    assert sorted(os.listdir(tmp_path)) == sorted({*before, *new})


@pytest.mark.parametrize(
    "name, fields, reason",
    [
        ("sparse.jpg", {"type": tarfile.GNUTYPE_SPARSE}, "unknown type b'S'"),
        ("k.jpg", {"type": b"Z"}, "unknown type b'Z'"),
    ],
)
def test_members_of_an_unknown_type_are_refused(tmp_path, name, fields, reason):
    with tarfile.open(tmp_path / "d.tar", "w") as tar:
        add(tar, "k.txt", b"x")
        add(tar, name, b"", **fields)
    with pytest.raises(ShardError, match=f"d.tar behind byte 1024: .*{reason}"):
        index_shard(tmp_path / "d.tar")


def test_an_archive_without_samples_is_refused(tmp_path):
    with tarfile.open(tmp_path / "d.tar", "w") as tar:
        for name in ("README", "a/.hidden"):
            add(tar, name, b"x")
    with pytest.raises(ShardError, match="d.tar holds no sample"):
        index_shard(tmp_path / "d.tar")


def test_damaged_extended_headers_are_noticed(tmp_path):
    with tarfile.open(tmp_path / "d.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        add(tar, "k.txt", b"x", mtime=1.5)
    path = tmp_path / "d.tar"
    whole = path.read_bytes()
    assert b"mtime=1.5" in whole
    body = whole.index(b" mtime=1.5") - 2
    for change in (b"99 mtime=1.5", b"xx mtime=1.5", b"13 size=-512\n", b"13 size=1_02\n"):
        path.write_bytes(whole[:body] + change + whole[body + len(change) :])
        with pytest.raises(ShardError, match="extended header"):
            index_shard(path)


def test_bytes_that_are_missing_in_the_last_image_are_noticed(tmp_path):
    """The header behind it is read from its empty end on, which looks like the end marker."""
    path = tmp_path / "d.tar"
    with tarfile.open(path, "w") as tar:
        for key in "ab":
            add(tar, f"{key}.txt", b"text")
            add(tar, f"{key}.jpg", IMAGE)
        add(tar, "b.json", b"")
    data = path.read_bytes()
    place = data.rindex(IMAGE) + 100
    path.write_bytes(data[:place] + data[place + 400 :])
    with pytest.raises(ShardError, match=f"{len(data) - 400} bytes, no multiple of 512"):
        index_shard(path)


def test_members_are_where_tarfile_finds_them(tmp_path):
    path = tmp_path / "m.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for i in range(20):
            add(tar, f"{'n' * (i * 12)}{i}.bin", bytes(i * 100), mtime=i / 3)
    data = path.read_bytes()
    with tarfile.open(path) as tar:
        expected = [(m.offset, m.name, m.offset_data, m.size) for m in tar]
    assert list(members(lambda a, b: data[a:b], 0, len(data))) == expected


def test_files_that_do_not_lie_together_are_no_samples(tmp_path):
    with tarfile.open(tmp_path / "d.tar", "w") as tar:
        for extension, data in (("jpg", IMAGE), ("txt", b"text")):
            for i in range(10):
                add(tar, f"{i}.{extension}", data)
    with pytest.raises(ShardError, match="20 of 20 samples are .* puts together files that lie"):
        index_directory(tmp_path)


def test_a_small_shard_of_unusable_samples_does_not_refuse_the_others(tmp_path):
    for name, samples, parts in (("a", 20, ("jpg", "txt")), ("b", 1, ("jpg",))):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
            for i in range(samples):
                for extension in parts:
                    add(tar, f"{name}{i}.{extension}", IMAGE if extension == "jpg" else b"text")
    found = index_directory(tmp_path)
    assert [row["samples"] for row in found.rows] == [20, 1]
    assert found.unusable == {"no txt or json": 1} and found.failures == []
    assert (tmp_path / "manifest.json").exists()
