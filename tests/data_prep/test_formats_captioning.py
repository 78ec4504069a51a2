"""Captioning as an instruction: COCO and TextCaps, one caption of an image."""

import json
from collections import Counter

import pytest
from read_corpus import collect, refused, write_images
from tiny_data import encoded, make_image

QUESTION = "<|image|>Provide a one-sentence caption for the provided image."


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images") / "images")


def write(path, content):
    path.write_text(json.dumps(content))
    return path


def test_coco_as_an_instruction_asks_for_the_caption_that_is_drawn(tmp_path, images):
    content = {
        "images": [{"id": i, "file_name": f"{i % 10}.jpg"} for i in range(100)],
        "annotations": [
            {"id": 5 * i + k, "image_id": i, "caption": f" {i} {k}\n"}
            for k in range(5)
            for i in range(100)
        ],
    }
    content["images"].append({"id": 200, "file_name": "1.jpg"})
    path = write(tmp_path / "captions_train2014.json", content)
    drawn, _ = collect("coco-one-caption", path, images=images)
    asked, skipped = collect("coco-instruction", path, images=images, samples_per_split=7)
    assert [r.turns[0].question for r in asked] == [QUESTION] * 100
    assert [(r.key, r.turns[0].answer) for r in asked] == [(r.key, r.caption) for r in drawn]
    assert skipped == {"image without a caption": 1}
    places = Counter(r.turns[0].answer.split()[1] for r in asked)
    assert len(places) == 5 and max(places.values()) < 40


def test_captions_that_cannot_be_used_are_not_drawn(tmp_path, images):
    unusable = [" ", None, 3, "\0a\0", "\ud800"]
    content = {
        "images": [{"id": i, "file_name": f"{i % 10}.jpg"} for i in range(60)],
        "annotations": [
            {"id": 6 * i + k, "image_id": i, "caption": text}
            for i in range(60)
            for k, text in enumerate([*unusable, f"caption {i}"] if i < 50 else [" ", "", None])
        ],
    }
    path = write(tmp_path / "captions_train2014.json", content)
    for kind in ("coco-one-caption", "coco-instruction"):
        records, skipped = collect(kind, path, images=images)
        assert [r.caption or r.turns[0].answer for r in records] == [
            f"caption {i}" for i in range(50)
        ]
        assert skipped == {"empty caption": 10}
    data = [row("9", text) for text in (" ", "", None)]
    data += [row(str(i), text) for i in range(9) for text in [*unusable, f"caption {i}"]]
    path = write(tmp_path / "TextCaps_0.1_train.json", {"data": data})
    records, skipped = collect("textcaps", path, images=images)
    assert [r.turns[0].answer for r in records] == [f"caption {i}" for i in range(9)]
    assert skipped == {"empty caption": 1}


@pytest.mark.parametrize("kind", ["coco", "coco-one-caption", "coco-instruction"])
def test_images_of_coco_are_found_in_the_published_folders(tmp_path, images, kind):
    names = ["train2014/COCO_train2014_000000000001.jpg", "val2017/000000000002.jpg"]
    for number, name in enumerate(names):
        path = tmp_path / "coco" / name
        path.parent.mkdir(parents=True)
        path.write_bytes(encoded(make_image(number)))
    files = [*(name.split("/")[1] for name in names), "gone.jpg", "../train2014/x.jpg", 5, ""]
    content = {
        "images": [{"id": i, "file_name": name} for i, name in enumerate(files)],
        "annotations": [{"id": i, "image_id": i, "caption": "a"} for i in range(len(files))],
    }
    path = write(tmp_path / "captions_train2014.json", content)
    for folder in (tmp_path / "coco", tmp_path):
        records, skipped = collect(kind, path, images=folder)
        assert [r.images[0] for r in records] == [encoded(make_image(n)) for n in range(2)]
        assert skipped == {
            "image file is missing": 1,
            "image path leaves the images folder": 1,
            "image is not one path": 2,
        }
    assert "such as captions_train2014.json" in refused(kind, tmp_path, images=images)


def row(image_id, caption, **changes) -> dict:
    return {
        "image_id": image_id,
        "image_classes": ["Sign"],
        "flickr_original_url": "https://x/1_o.jpg",
        "image_width": 1024,
        "image_height": 768,
        "set_name": "train",
        "image_name": image_id,
        "image_path": f"train/{image_id}.jpg",
        "caption_id": 1,
        "caption_str": caption,
        "reference_strs": ["a", "b"],
    } | changes


def test_textcaps_has_one_sample_an_image(tmp_path, images):
    (images / "0054c91397f2fe05.jpg").write_bytes(encoded(make_image(4)))
    data = [
        row("0054c91397f2fe05", "A sign says stop. "),
        row("1", "one"),
        row("0054c91397f2fe05", "A stop sign."),
        row("0054c91397f2fe05", None),
        row("gone", "gone"),
        row("2", " "),
        row("2", None),
        row("../secret", "secret"),
    ]
    content = {"dataset_type": "train", "dataset_name": "textcaps", "data": data}
    path = write(tmp_path / "TextCaps_0.1_train.json", content)
    records, skipped = collect("textcaps", path, images=images)
    assert [r.key for r in records] == ["0054c91397f2fe05", "1"]
    assert records[0].turns[0].question == QUESTION
    assert records[0].turns[0].answer in ("A sign says stop.", "A stop sign.")
    assert records[0].images == (encoded(make_image(4)),)
    assert skipped == {
        "image file is missing": 1,
        "empty caption": 1,
        "image path leaves the images folder": 1,
    }
    assert collect("textcaps", path, images=images, samples_per_split=1)[0] == records
    images.rename(tmp_path / "train_images")
    assert collect("textcaps", tmp_path, images=tmp_path)[0] == records
    (tmp_path / "train_images").rename(images)
    path.unlink()
    assert "holds no TextCaps_0.1_train.json" in refused("textcaps", tmp_path, images=images)
    assert "neither a file nor a folder" in refused("textcaps", path, images=images)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([], "an object with a list data"),
        ({"data": [{"caption_str": "a"}]}, "data[0] has no image_id"),
    ],
)
def test_other_files_are_not_textcaps(tmp_path, content, reason):
    path = write(tmp_path / "x.json", content)
    assert reason in refused("textcaps", path, images=tmp_path)
