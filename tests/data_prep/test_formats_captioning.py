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
        "image without a caption": 1,
        "image path leaves the images folder": 1,
    }
    assert collect("textcaps", path, images=images, samples_per_split=1)[0] == records


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
