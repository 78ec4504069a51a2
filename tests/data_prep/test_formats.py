"""The readers of data_prep: published formats to records, and what is left out with its reason."""

import io
import json
import os
import shutil
import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import webdataset
import xxhash
from paths import DATA
from preprocess_run import failed, succeeded, tool
from read_corpus import collect, refused, write_images
from tiny_data import encoded, make_image, record, write

from megatron_owl2.data.shards.records import Record, Turn

REAL = DATA / "img2dataset"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images") / "images")


@pytest.mark.parametrize("form", ["webdataset", "files", "parquet"])
def test_img2dataset_as_the_real_one_writes_it(form):
    records, skipped = collect("img2dataset", REAL / form)
    by_url = {r.metadata["url"].rpartition("/")[2]: r for r in records}
    assert sorted(by_url) == ["0.jpg", "1.jpg", "3.png", "5.webp", "7.jpg"]
    assert skipped == {"status failed_to_download": 2, "status failed_to_resize": 2}
    for name, item in by_url.items():
        assert item.caption == f"caption of {name} é" and item.source == form
        assert item.images[0][:3] == b"\xff\xd8\xff"
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
    assert "has not finished 1 of 2 shards (00001)" in refused("img2dataset", folder)
    only_metadata = tmp_path / "metadata"
    only_metadata.mkdir()
    shutil.copy(REAL / "files/00000.parquet", only_metadata)
    assert "not from img2dataset" in refused("img2dataset", only_metadata)


@pytest.mark.parametrize("change", ["caption", "touch", "statistics", "new file"])
def test_img2dataset_a_change_of_files_in_a_folder_is_noticed(tmp_path, change):
    folder = shutil.copytree(REAL / "files", tmp_path / "files")
    before = os.stat(folder / "00000").st_mtime_ns
    succeeded(tool(folder, "img2dataset", tmp_path / "set"))
    again = succeeded(tool(folder, "img2dataset", tmp_path / "set"))
    assert "was finished already" in again
    text = folder / "00000/000000.txt"
    if change == "caption":
        text.write_text("x")
    elif change == "touch":
        os.utime(text, ns=(1, 1))
    elif change == "statistics":
        (folder / "00000_stats.json").write_text("{}")
    else:
        (folder / "00000/new.txt").write_text("x")
    os.utime(folder / "00000", ns=(before, before))
    said = failed(tool(folder, "img2dataset", tmp_path / "set"))
    assert "the input changed" in said and "split 00000: " in said


def test_img2dataset_folders_of_jobs_of_earlier_versions_go_on(tmp_path):
    """Their identity was size and change of the folder alone."""
    folder, path = REAL / "files", tmp_path / "set/preprocess/job.json"
    succeeded(tool(folder, "img2dataset", tmp_path / "set"))
    description = json.loads(path.read_text())
    for part in description["parts"]:
        status = (folder / part[0]).stat()
        part[1] = f"{status.st_size} bytes, changed {status.st_mtime_ns}"
    path.write_text(json.dumps(description))
    assert "was finished already" in succeeded(tool(folder, "img2dataset", tmp_path / "set"))
    part[1] = "1 bytes, changed 1"
    path.write_text(json.dumps(description))
    assert "the input changed" in failed(tool(folder, "img2dataset", tmp_path / "set"))


@pytest.mark.parametrize("form", ["webdataset", "files", "parquet"])
def test_img2dataset_stopped_in_its_first_shards(tmp_path, form):
    """Statistics come when a shard is complete; so without any, all may be half."""
    folder = shutil.copytree(REAL / form, tmp_path / form)
    for path in folder.glob("*_stats.json"):
        path.unlink()
    error = refused("img2dataset", folder)
    assert "has not finished 2 of 2 shards" in error and "start the download again" in error
    assert ("--format webdataset" if form == "webdataset" else "write {} to") in error
    if form == "webdataset":
        assert len(collect("webdataset", folder)[0]) == 5
        return
    for shard in range(2):
        (folder / f"{shard:05d}_stats.json").write_text("{}")
    assert len(collect("img2dataset", folder)[0]) == 5


def test_img2dataset_damaged_parquet(tmp_path):
    folder = shutil.copytree(REAL / "parquet", tmp_path / "parquet")
    path = folder / "00000.parquet"
    path.write_bytes(path.read_bytes()[:4000] + bytes(600) + path.read_bytes()[4600:])
    records, skipped = collect("img2dataset", folder)
    assert skipped["rest of a damaged file"] == 1
    assert len(records) + sum(skipped.values()) == 9 + 1


def stand_in(readable: str, key: str) -> str:
    return f"{readable}-{xxhash.xxh3_64_hexdigest(key.encode())}"


def test_webdataset_tars_of_other_tools(tmp_path):
    (tmp_path / "data/deep").mkdir(parents=True)
    jpg = encoded(make_image(1))
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
        (stand_in("x_two", "x/two"), "in json", {"score": 0.5, "key": "x/two"}),
        ("three", "t", {"n": 1}),
        (stand_in("k" * 60, "k" * 95), "long key", {"key": "k" * 95}),
        (stand_in("y" * 60, "y" * 120), "long name", {"key": "y" * 120}),
    ]
    assert all(item.images[0] == jpg for item in records)
    assert skipped == {
        "no caption in the .json member; name its field with --caption-column": 1,
        "no image": 1,
        "more than one image": 1,
        "the .json member is not an object": 1,
    }
    records, _ = collect("webdataset", tmp_path / "data/a.tar", caption_column="caption")
    assert [r.caption for r in records] == ["in json", "j"]


def test_a_key_that_stands_in_for_another_is_like_no_other(tmp_path):
    """Samples numbered as img2dataset does it, beside keys that a record cannot have."""
    names = ["000000001", "a/000000001", "b/000000001", "a_000000001", "a b", "a_b", "é" * 70, "猫"]
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as tar:
        for name in names:
            tar.write({"__key__": name, "jpg": encoded(make_image(1)), "txt": name})
    records, skipped = collect("webdataset", tmp_path)
    assert [r.caption for r in records] == names and skipped == {}
    assert len({r.key for r in records}) == len(names)
    assert all(r.to_members() for r in records)
    assert [r.metadata.get("key", r.key) for r in records] == names


def test_folders_in_a_tar_are_no_damage(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("./", "one.jpg", "one.txt", "empty/"):
            member = tarfile.TarInfo(name)
            member.type = tarfile.DIRTYPE if name.endswith("/") else tarfile.REGTYPE
            data = {"one.jpg": encoded(make_image(1)), "one.txt": b"text"}.get(name, b"")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    records, skipped = collect("webdataset", tmp_path)
    assert [r.caption for r in records] == ["text"] and skipped == {}


def test_webdataset_reads_our_shards_back(tmp_path):
    turns = (Turn("first?", "yes"), Turn("second?", "no"))
    two = tuple(encoded(make_image(seed)) for seed in (1, 2))
    originals = [record(index) for index in range(25)]
    originals.append(Record("plain", caption="text alone", metadata={"url": "u"}))
    for name, pictures in (("none", ()), ("one", two[:1]), ("two", two)):
        for system in ("", "You are an owl."):
            key = f"{name}{len(system)}"
            originals.append(Record(key, pictures, turns=turns, system=system, source="talks"))
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
    (tmp_path / "empty").mkdir()
    assert "holds no tar file" in refused("webdataset", tmp_path / "empty")
    with tarfile.open(path, mode="w") as tar:
        for _ in range(2):
            tar.addfile(tarfile.TarInfo("one.txt"))
    records, skipped = collect("webdataset", folder)
    assert records == [] and skipped == {"a member of the sample occurs twice": 1}
    assert "leave out --images" in refused("webdataset", folder, images=tmp_path)


def test_bytes_that_are_missing_before_an_empty_last_file_are_damage(tmp_path):
    """What is left of the last header is empty, like the end of the archive."""
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        parts = {"one.jpg": encoded(make_image(1)), "one.txt": b"text", "two.txt": b""}
        for name, part in parts.items():
            member = tarfile.TarInfo(name)
            member.size = len(part)
            tar.addfile(member, io.BytesIO(part))
    data = path.read_bytes()
    place = data.index(b"text") + 4
    path.write_bytes(data[:place] + data[place + 400 :])
    _, skipped = collect("webdataset", tmp_path)
    assert skipped == {"rest of a damaged file": 1}


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
    records, skipped = collect("coco", coco(tmp_path), images=images, samples_per_split=4)
    assert [r.caption for r in records[:6]] == [f"caption {i}" for i in (0, 3, 6, 9, 12, 1)]
    assert records[5].key == "31_101" and records[5].images[0] == encoded(make_image(1))
    assert records[5].metadata == {"image_id": 31, "file_name": "1.jpg"}
    assert len(records) == 15 == len({r.key for r in records})
    assert skipped == {
        "image without a caption": 1,
        "image file is missing": 1,
        "caption of an unknown image": 1,
        "empty caption": 1,
    }
    assert "--images DIR" in refused("coco", coco(tmp_path))
    (tmp_path / "x.json").write_text('{"images": []}')
    assert "does not hold COCO captions" in refused("coco", tmp_path / "x.json", images=images)


def test_coco_draws_one_caption_of_every_image(images, tmp_path):
    records, skipped = collect("coco-one-caption", coco(tmp_path), images=images)
    again, _ = collect("coco-one-caption", coco(tmp_path), images=images, samples_per_split=1)
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
    records, _ = collect("documents", path, samples_per_split=5)
    assert [r.caption for r in records] == [f"text {i} é" for i in range(23)]
    assert [r.key for r in records] == [f"{i:09d}" for i in range(23)]
