"""tools/preprocess_data.py on published formats: what is kept, what is counted, what is refused."""

import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import pytest
from preprocess_run import failed, records, report, succeeded, tool, tree
from tiny_data import encoded, make_image

from megatron_owl2.data.shards.dataset import ShardedDataset
from megatron_owl2.data.shards.records import Turn


def img2dataset_rows(shard: int) -> dict[str, bytes]:
    """Members of one shard: five good rows and one of each kind that must be skipped."""
    members = {}

    def row(number, image=True, caption="a picture", status="success", **changes):
        key = f"{shard:05d}{number:04d}"
        body = {"key": key, "status": status, "url": f"http://x/{key}", "caption": caption}
        parts = {
            "jpg": encoded(make_image(number)) if image is True else image,
            "txt": caption and caption.encode(),
            "json": json.dumps(body | {"original_width": 9, "exif": "{}"}).encode(),
        }
        for extension, data in (parts | changes).items():
            if data is not None:
                members[f"{key}.{extension}"] = data

    for number in range(5):
        row(number, caption=f"picture {number} é")
    row(5, status="failed_to_download", image=None)
    row(6, caption="  ")
    row(7, image=b"GIF89a")
    row(8, image=None)
    row(9, json=b"not json")
    return members


STORES_JPEG = "--max-side or --jpeg-quality stores it as JPEG"
SKIPPED = {
    "status failed_to_download": 1,
    "empty caption": 1,
    f"image is not JPEG, PNG or WebP ({STORES_JPEG})": 1,
    "no image": 1,
    "no readable .json member": 1,
}


def add_members(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size, member.mtime = len(data), 1.5  # img2dataset writes PAX headers
            tar.addfile(member, io.BytesIO(data))


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    folder = tmp_path_factory.mktemp("img2dataset") / "laion"
    folder.mkdir()
    for shard in range(3):
        add_members(folder / f"{shard:05d}.tar", img2dataset_rows(shard))
        (folder / f"{shard:05d}_stats.json").write_text("{}")
    return folder


def check_pairs(folder: Path, shards: int = 3) -> None:
    found = records(folder)
    assert [r.key for r in found] == [f"{s:05d}{i:04d}" for s in range(shards) for i in range(5)]
    for index, record in enumerate(found):
        assert record.caption == f"picture {index % 5} é" and record.source == "laion"
        assert record.images[0] == encoded(make_image(index % 5))
        assert record.metadata == {"url": f"http://x/{record.key}", "original_width": 9}
    assert report(folder)["kept"] == 5 * shards


def test_img2dataset_tars(tars, tmp_path):
    out = succeeded(tool(tars, "img2dataset", tmp_path / "set", "--workers", 2))
    check_pairs(tmp_path / "set")
    assert report(tmp_path / "set")["skipped"] == {k: 3 * n for k, n in SKIPPED.items()}
    assert "kept 15, skipped 15" in out and "3 x empty caption (such as 000000006)" in out


def test_img2dataset_files(tmp_path):
    source = tmp_path / "laion"
    for shard in range(2):
        folder = source / f"{shard:05d}"
        folder.mkdir(parents=True)
        for name, data in img2dataset_rows(shard).items():
            (folder / name).write_bytes(data)
        (source / f"{shard:05d}_stats.json").write_text("{}")
    succeeded(tool(source, "img2dataset", tmp_path / "set"))
    check_pairs(tmp_path / "set", shards=2)
    assert report(tmp_path / "set")["skipped"] == {k: 2 * n for k, n in SKIPPED.items()}


def test_a_folder_with_other_files_is_not_touched(tars, tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    error = failed(tool(tars, "img2dataset", tmp_path))
    assert "is not empty" in error and list(tree(tmp_path)) == ["thesis.txt"]


@pytest.mark.parametrize("damage", ["cut in a picture", "cut after a sample", "header"])
def test_the_rest_of_a_damaged_tar_is_reported(tmp_path, damage):
    source = tmp_path / "laion"
    source.mkdir()
    path = source / "00000.tar"
    add_members(path, img2dataset_rows(0))
    (source / "00000_stats.json").write_text("{}")
    with tarfile.open(path) as tar:
        third = tar.getmember("000000002.jpg").offset
    if damage == "header":
        data = bytearray(path.read_bytes())
        data[third + 600] ^= 1  # inside the extended header's block or the next
        data[third + 148 : third + 156] = b"99999999"
        path.write_bytes(data)
    else:
        os.truncate(path, third + (1800 if damage == "cut in a picture" else 0))
    out = succeeded(tool(source, "img2dataset", tmp_path / "set"))
    assert [r.key for r in records(tmp_path / "set")] == ["000000000", "000000001"]
    assert "1 x rest of a damaged file" in out and "00000.tar" in out


def message(speaker: str, text: str) -> dict:
    return {"from": speaker, "value": text}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures") / "images"
    (folder / "coco").mkdir(parents=True)
    (folder / "coco/1.jpg").write_bytes(encoded(make_image(1)))
    (folder / "2.png").write_bytes(encoded(make_image(2), "PNG"))
    (folder / "3.tif").write_bytes(b"II*\0")
    (folder.parent / "secret.jpg").write_bytes(encoded(make_image(3)))
    return folder


def write_json(path: Path, content) -> Path:
    path.write_text(json.dumps(content))
    return path


def test_conversations(images, tmp_path):
    human, gpt = (lambda text: message("human", text)), (lambda text: message("gpt", text))
    entries = [
        {
            "id": "x/1",
            "image": "coco/1.jpg",
            "conversations": [human("<image>\nWhat?"), gpt("A dog.\n"), human("Sure?"), gpt("Yes")],
        },
        {"image": "2.png", "conversations": [human("Describe.\n<image>"), gpt("é")]},
        {"image": "2.png", "conversations": [human("<|image|>Describe."), gpt("b")]},
        {"image": "2.png", "conversations": [human("No tag"), gpt("b")]},
        {"id": 7, "conversations": [human("Hi"), gpt("Hello")]},
    ]
    source = write_json(tmp_path / "llava v1.json", entries)
    options = ["--images", images, "--workers", 2, "--shard-size", 2]
    succeeded(tool(source, "conversations", tmp_path / "set", *options))
    found = records(tmp_path / "set")
    assert [r.turns for r in found] == [
        (Turn("<|image|>What?", "A dog."), Turn("Sure?", "Yes")),
        (Turn("Describe.\n<|image|>", "é"),),
        (Turn("<|image|>Describe.", "b"),),
        (Turn("<|image|>No tag", "b"),),
        (Turn("Hi", "Hello"),),
    ]
    assert [r.key for r in found] == [f"{i:09d}" for i in range(5)]
    assert [r.metadata for r in found] == [{"id": "x/1"}, {}, {}, {}, {"id": 7}]
    assert {r.source for r in found} == {"llava v1"}
    assert found[0].images[0] == encoded(make_image(1)) and not found[4].images
    names = [row["name"] for row in ShardedDataset(tmp_path / "set").shards]
    assert names == [f"llava_v1-{i:05d}-000000.tar" for i in range(3)]


def test_unusable_conversations_are_counted(images, tmp_path):
    human, gpt = (lambda text: message("human", text)), (lambda text: message("gpt", text))
    fine = [human("<image>\nq"), gpt("a")]
    bad = {
        "empty turn": {"conversations": [human("q"), gpt(" \n")]},
        "human and gpt do not take turns": {"conversations": [human("q"), human("q"), gpt("a")]},
        "system turn after the first turn": {
            "conversations": [human("q"), gpt("a"), message("system", "s")]
        },
        "speaker is neither human nor gpt": {"conversations": [message("tool", "s")]},
        "a message has no text": {"conversations": [human("q"), gpt(None)]},
        "no turns": {"conversations": [gpt("a"), human("q")]},
        "conversations is not a list of messages": {"conversations": "q"},
        "entry is not an object": "q",
        "image tag without an image": {"conversations": fine},
        "more image tags than images": {
            "image": "2.png",
            "conversations": [human("<image>q"), gpt("a"), human("<image>"), gpt("a")],
        },
        "fewer image tags than images": {"image": ["2.png", "2.png"], "conversations": fine},
        "image is not one path": {"image": {"path": "2.png"}, "conversations": fine},
        "image file is missing": {"image": "4.png", "conversations": fine},
        "image file cannot be read (Is a directory)": {"image": "coco", "conversations": fine},
        f"image is not JPEG, PNG or WebP ({STORES_JPEG})": {
            "image": "3.tif",
            "conversations": fine,
        },
        "question 1 is not valid Unicode": {"conversations": [human("\ud800"), gpt("a")]},
    }
    escapes = ["../secret.jpg", "coco/../../secret.jpg", str(images.parent / "secret.jpg")]
    entries = [*bad.values(), *({"image": path, "conversations": fine} for path in escapes)]
    entries.append({"id": "good", "image": "2.png", "conversations": fine})
    source = write_json(tmp_path / "llava.json", entries)
    succeeded(tool(source, "conversations", tmp_path / "set", "--images", images))
    assert [r.metadata["id"] for r in records(tmp_path / "set")] == ["good"]
    expected = dict.fromkeys(bad, 1) | {"image path leaves the images folder": 3}
    assert report(tmp_path / "set")["skipped"] == expected


def test_documents(tmp_path):
    source = tmp_path / "web.jsonl"
    bad = [b"no JSON", b'["text"]', b'{"txt": "a"}', b'{"text": 3}', b'{"text": " "}']
    good = [json.dumps({"text": f"text {number}"}).encode() for number in range(25)]
    source.write_bytes(b"\n".join([*good[:10], *bad, *good[10:]]))
    succeeded(tool(source, "documents", tmp_path / "set", "--shard-size", "10"))
    found = records(tmp_path / "set")
    assert [record.caption for record in found] == [f"text {number}" for number in range(25)]
    assert found[10].key == "000000015"
    assert all(not record.images and record.source == "web" for record in found)
    assert sum(report(tmp_path / "set")["skipped"].values()) == len(bad)
    assert "leave out --images" in failed(
        tool(source, "documents", tmp_path / "other", "--images", tmp_path)
    )


def test_wrong_use_is_a_clear_error(tars, images, tmp_path):
    out = tmp_path / "set"
    assert "does not exist" in failed(tool(tmp_path / "no", "img2dataset", out))
    assert "invalid choice: 'parquet'" in failed(tool(tars, "parquet", out))
    assert "is not a file" in failed(tool(tars, "conversations", out))
    assert "not from img2dataset" in failed(tool(tmp_path, "img2dataset", out))
    assert "leave out --images" in failed(tool(tars, "img2dataset", out, "--images", tmp_path))
    for partition in ("3/3", "1", "-1/3", "a/b", "1/b"):
        said = failed(tool(tars, "img2dataset", out, f"--partition={partition}"))
        assert f"--partition: '{partition}' is not I/N with I from 0 to N-1" in said
    for sample in ("abc", "1e3", "1.0", "0", "-3", "nan", ""):
        said = failed(tool(tars, "img2dataset", out, f"--sample={sample}"))
        assert f"--sample: '{sample}' is neither a number of samples, such as 1000" in said
    for option in ("--max-aspect", "--jpeg-quality", "--min-side"):
        said = failed(tool(tars, "img2dataset", out, f"{option}=abc"))
        assert f"{option}: abc is not " in said
    assert "--workers" in failed(tool(tars, "img2dataset", out, "--workers", 0))
    text = tmp_path / "t.json"
    text.write_text("{")
    assert "is not JSON" in failed(tool(text, "conversations", out))
    write_json(text, {"a": 1})
    assert "must hold a list" in failed(tool(text, "conversations", out))
    write_json(text, [{"image": "2.png", "conversations": []}])
    assert "--images DIR" in failed(tool(text, "conversations", out))
    assert not out.exists()


@pytest.mark.parametrize(("sample", "readings"), [("1e-3", 1), ("0.5", 1), (".5", 1), ("1000", 2)])
def test_a_sample_is_a_number_or_a_fraction(tars, tmp_path, sample, readings):
    out = succeeded(tool(tars, "img2dataset", tmp_path, "--sample", sample, "--plan"))
    assert out.endswith(f", {readings} readings\n")


def test_files_whose_shards_cannot_be_named_are_told_with_what_to_do(tars, tmp_path):
    source, out = tmp_path / "tars", tmp_path / "set"
    for name in ("a b.tar", "deep/c.tar", "a_b.tar"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(tars / "00000.tar", source / name)
    error = failed(tool(source, "webdataset", out))
    assert f"{source}/a b.tar and of {source}/a_b.tar would both be named a_b" in error
    assert "rename one of them" in error
    (source / "a_b.tar").rename(source / "deep_c.tar")
    error = failed(tool(source, "webdataset", out))
    assert f"{source}/deep/c.tar and of {source}/deep_c.tar would both" in error
    (source / "a b_stats.json").write_text("{}")
    (source / "deep_c.tar").unlink()
    error = failed(tool(source, "img2dataset", out))
    assert f"shards of {source}/a b.tar cannot be named 'a b'; rename it" in error
    assert not out.exists()


def test_a_corpus_without_a_usable_sample_is_an_error(tmp_path):
    source = write_json(tmp_path / "t.json", [{"conversations": []}, {"conversations": []}])
    error = failed(tool(source, "conversations", tmp_path / "set"))
    assert "no sample was kept" in error and "2 x no turns" in error
    assert not (tmp_path / "set/manifest.json").exists()
    write_json(source, [])
    error = failed(tool(source, "conversations", tmp_path / "other"))
    assert f"{source} holds no conversation: its list is empty" in error
