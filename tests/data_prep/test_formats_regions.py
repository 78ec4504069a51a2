"""RefCOCO and Visual Genome: boxes, both directions of questions, oddities of the files."""

import json
import pickle
import re
from pathlib import Path

import pytest
from read_corpus import collect, refused
from tiny_data import encoded, make_image

from data_prep.formats.common.inputs import SkipError
from data_prep.formats.common.json_lists import cut_list
from data_prep.formats.common.regions import questions, read_region, shuffled
from megatron_owl2.data.images import image_size
from megatron_owl2.data.shards.records import IMAGE_PLACEHOLDER, Record

BOX = r"\[[01]\.\d{3}(?:, [01]\.\d{3}){3}\]"


def both_ways(records: list[Record]) -> dict[str, set[str]]:
    """Boxes by their phrase in either direction of the turns, which must hold just one of each."""
    found: dict[str, set[str]] = {"find": set(), "describe": set()}
    for record in records:
        for number, turn in enumerate(record.turns):
            assert turn.question.startswith(IMAGE_PLACEHOLDER) == (number == 0)
            if re.fullmatch(BOX, turn.answer):
                assert not re.search(BOX, turn.question)
                phrase = re.search(r"(?:phrase|object) \d+", turn.question)
                found["find"].add(f"{phrase and phrase.group()} {turn.answer}")
            else:
                (box,) = re.findall(BOX, turn.question)
                found["describe"].add(f"{turn.answer} {box}")
    return found


@pytest.mark.parametrize(
    ("box", "text"),
    [
        ([0, 0, 640, 480], "[0.000, 0.000, 1.000, 1.000]"),
        ([320.5, 120, 64, 48.25], "[0.501, 0.250, 0.601, 0.351]"),
        ([-3, 470, 13, 40], "[0.000, 0.979, 0.016, 1.000]"),  # clipped to the image
        ([640, 0, 5, 5], "outside"),
        ([10, 10, 0, 5], "outside"),
        ([10, 10, 5, float("nan")], "four numbers"),
        ([10, 10, 5], "four numbers"),
        ([10, 10, 5, "5"], "four numbers"),
        ([10, 10, 5, None], "four numbers"),
        ([10, 10, 5, 10**400], "four numbers"),
        ([-0.0, -0.0, 64, 48], "[0.000, 0.000, 0.100, 0.100]"),
        ([639.8, 8, 5, 22], "too thin for three decimals"),  # [1.000, 0.017, 1.000, 0.062]
        ([5, 96, 20, 0.2], "too thin for three decimals"),
    ],
)
def test_boxes_are_shares_of_the_image(box, text):
    if text.startswith("["):
        region = read_region("a", " two\n words. ", box, (640, 480))
        assert (region.phrase, region.box) == ("two words", text)
    else:
        with pytest.raises(SkipError, match=text):
            read_region("a", "b", box, (640, 480))


@pytest.mark.parametrize(
    "phrase", ["is this", "is this??", " is  this ?. ", "is this!", "is this,"]
)
def test_questions_have_no_mark_of_the_phrase_before_their_own(phrase):
    asked = {
        turn.question
        for number in range(40)
        for turn in questions([read_region(str(number), phrase, [0, 0, 32, 24], (64, 48))])
        if turn.answer.startswith("[")
    }
    box = " Answer with a bounding box."
    assert asked == {
        f"<|image|>Where in the image is this: is this?{box}",
        "<|image|>Give the bounding box of what this phrase refers to: is this",
        "<|image|>Find this in the image and answer with its bounding box: is this",
        f"<|image|>Which region of the image fits this description: is this?{box}",
    }


def expression(number: int, **changes) -> tuple[dict, dict]:
    """Image and annotation as MDETR has them: an entry of both for every expression."""
    image = {
        "file_name": f"COCO_train2014_{number // 9:012d}.jpg",
        "height": 100,
        "width": 200,
        "id": number,
        "original_id": number // 9,
        "caption": f"object {number}",
        "dataset_name": "refcoco",
        "tokens_negative": [[0, 9]],
    }
    annotation = {
        "area": 12.5,
        "iscrowd": 0,
        "image_id": number,
        "category_id": 1,
        "id": number,
        "bbox": [number, 10.0, 20.0, 30.0],
        "tokens_positive": [[0, 9]],
        "original_id": 77,
    }
    return image | changes, annotation


def refcoco(folder: Path, pairs: list) -> Path:
    path = folder / "finetune_refcoco_train.json"
    content = {"info": {}, "licenses": [], "categories": []}
    content |= {"images": [p[0] for p in pairs], "annotations": [p[1] for p in pairs if p[1]]}
    path.write_text(json.dumps(content))
    return path


def write_coco_images(folder: Path) -> Path:
    folder.mkdir()
    for number in range(6):
        (folder / f"COCO_train2014_{number:012d}.jpg").write_bytes(encoded(make_image(number)))
    return folder


def test_refcoco_asks_both_ways_about_a_few_expressions_at_a_time(tmp_path):
    images = write_coco_images(tmp_path / "train2014")
    path = refcoco(tmp_path, [expression(number) for number in range(54)])
    records, skipped = collect("refcoco", path, images=images)
    assert not skipped and len(records) == 6 * 3  # 9 expressions of an image: 4, 4 and 1
    assert [len(r.turns) for r in records] == [4, 4, 1] * 6
    assert records[4].key == "COCO_train2014_000000000001_1"
    assert records[4].images == (encoded(make_image(1)),)
    ways = both_ways(records)
    assert len(ways["find"] | ways["describe"]) == 54 and min(map(len, ways.values())) > 15
    expected = {
        f"object {n} [{n / 200:.3f}, 0.100, {(n + 20) / 200:.3f}, 0.400]" for n in range(54)
    }
    assert ways["find"] | ways["describe"] == expected
    assert collect("refcoco", path, images=images, samples_per_split=4)[0] == records


def test_expressions_of_refcoco_that_cannot_be_used_are_counted(tmp_path):
    images = write_coco_images(tmp_path / "train2014")
    pairs = [
        expression(0),
        expression(1, caption=" "),
        expression(2, width=None),
        (expression(3)[0], None),
        expression(4, height=5),
        expression(60, file_name="COCO_train2014_000000000009.jpg"),
        expression(61, file_name="../secret.jpg"),
    ]
    records, skipped = collect("refcoco", refcoco(tmp_path, pairs), images=images)
    assert [len(r.turns) for r in records] == [1]
    assert skipped == {
        "region without a phrase": 1,
        "box is not four numbers of pixels": 1,
        "expression without one box": 1,
        "box is empty or outside the image": 1,
        "image file is missing": 1,
        "image path leaves the images folder": 1,
    }


def test_one_object_is_asked_about_of_those_with_the_same_phrase(tmp_path):
    images = write_coco_images(tmp_path / "train2014")
    pairs = [
        expression(0),
        *(expression(n, caption=text) for n, text in enumerate(["man", "Man.", "man ?"], start=1)),
        expression(4),
        expression(9, caption="man"),  # in another image
    ]
    path = refcoco(tmp_path, pairs)
    records, skipped = collect("refcoco", path, images=images)
    assert [len(r.turns) for r in records] == [3, 1] and not skipped
    assert [r.metadata["other_regions"] for r in records] == [2, 0]
    texts = [f"{turn.question} {turn.answer}" for turn in records[0].turns]
    assert sum("man" in text.lower() for text in texts) == 1
    pairs[4:4] = [expression(n) for n in (5, 6, 7)]
    records, _ = collect("refcoco", refcoco(tmp_path, pairs), images=images)
    assert [(len(r.turns), r.metadata["other_regions"]) for r in records] == [
        (4, 2),
        (2, 0),
        (1, 0),
    ]


def test_refcoco_and_its_images_are_found_under_their_published_names(tmp_path):
    images = write_coco_images(tmp_path / "train2014")
    path = refcoco(tmp_path, [expression(0)])
    expected = collect("refcoco", path, images=images)
    assert len(expected[0]) == 1
    assert collect("refcoco", tmp_path, images=tmp_path) == expected
    path.unlink()
    assert "holds no finetune_refcoco_train.json" in refused("refcoco", tmp_path, images=images)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_pickles_of_refcoco_are_not_read(tmp_path, protocol):
    path = tmp_path / "refs(unc).p"
    path.write_bytes(pickle.dumps([{"ref_id": 1, "sentences": []}], protocol))
    error = refused("refcoco", path, images=tmp_path)
    assert "is a pickle" in error and "finetune_refcoco_train.json" in error


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([], "lists of images and annotations"),
        ({"images": [{}], "annotations": []}, "images[0] has no id"),
        ({"images": [{"id": 1}], "annotations": []}, "the image 1 has no file_name"),
        ({"images": [], "annotations": [{"image_id": 7}]}, "annotations of unknown images, 7"),
    ],
)
def test_other_files_are_not_refcoco(tmp_path, content, reason):
    path = tmp_path / "x.json"
    path.write_text(json.dumps(content))
    assert reason in refused("refcoco", path, images=tmp_path)


WIDTH, HEIGHT = image_size(encoded(make_image(1)))


def region(image: int, number: int, **changes) -> dict:
    return {
        "region_id": 1000 * image + number,
        "width": 10,
        "height": 8,
        "image_id": image,
        "phrase": f"phrase {number}",
        "y": 5,
        "x": number % 20,
    } | changes


def visual_genome(folder: Path, entries: list) -> tuple[Path, Path]:
    """The published file, and a folder with the two folders of images."""
    path = folder / "region_descriptions.json"
    path.write_text(json.dumps(entries))
    for name, number in (("VG_100K", 1), ("VG_100K_2", 2), ("VG_100K_2", 3)):
        (folder / name).mkdir(exist_ok=True)
        (folder / name / f"{number}.jpg").write_bytes(encoded(make_image(1)))
    return path, folder


def test_visual_genome_has_one_sample_an_image(tmp_path):
    entries = [{"id": i, "regions": [region(i, n) for n in range(40)]} for i in (1, 2, 3)]
    (tmp_path / "vg").mkdir()
    path, images = visual_genome(tmp_path / "vg", entries)
    records, skipped = collect("visual-genome", path, images=images)
    assert [(r.key, len(r.turns)) for r in records] == [("1", 10), ("2", 10), ("3", 10)]
    assert records[0].metadata == {"image_id": 1, "other_regions": 30} and not skipped
    ways = both_ways(records)
    assert min(map(len, ways.values())) > 5
    for number in range(40):
        left = number % 20
        box = [left / WIDTH, 5 / HEIGHT, min(left + 10, WIDTH) / WIDTH, 13 / HEIGHT]
        text = f"phrase {number} [{', '.join(f'{share:.3f}' for share in box)}]"
        for way in ways.values():
            assert {found for found in way if found.startswith(f"phrase {number} ")} <= {text}
    assert len({tuple(r.turns) for r in records}) == 3  # drawn anew for every image
    assert collect("visual-genome", path, images=images, samples_per_split=1)[0] == records
    assert collect("visual-genome", tmp_path / "vg", images=tmp_path)[0] == records
    path.unlink()
    assert "holds no region_descriptions" in refused("visual-genome", images, images=images)


def test_regions_of_visual_genome_that_cannot_be_used_are_counted(tmp_path):
    old = {"id": 7, "image": 2, "phrase": "Old", "x": 1, "y": 1, "width": 4, "height": 4}
    entries = [
        {"id": 1, "regions": []},
        {
            "id": 2,
            "regions": [
                old,
                region(2, 1, phrase="old."),  # the same phrase: which of them could not be told
                region(2, 2, phrase=""),
                region(2, 3, phrase=None),
                region(2, 4, x=WIDTH),
                region(2, 5, width=0),
                region(2, 6, x=-4, y=-2, width=500, height=500),
                "no object",
            ],
        },
        {"id": 9, "regions": [region(9, 1)]},
        {"id": 3, "regions": None},
        {"regions": []},
    ]
    path, images = visual_genome(tmp_path, entries)
    (record,), skipped = collect("visual-genome", path, images=images)
    assert len(record.turns) == 2 and record.metadata["other_regions"] == 1
    assert skipped == {
        "image without a usable region": 1,
        "region without a phrase": 2,
        "box is empty or outside the image": 2,
        "region is not an object": 1,
        "image file is missing": 1,
        "entry without a list of regions": 1,
        "entry without an id": 1,
    }


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{}", "it is not a list"),
        ("[]", "its list is empty"),
        ('[{"id": 1} {"id": 2}]', "entry 1 is not followed by a comma"),
        ('[{"id": 1}, {"id"', "is not a JSON list of images: "),
        ('[{"id": 1}', "entry 1 is not followed by a comma"),
        ('[{"id": 1}] x', "more follows after the list"),
        (f"[{'[' * 100_000}", "nested too deeply"),
    ],
)
def test_other_files_are_not_visual_genome(tmp_path, text, reason):
    path = tmp_path / "region_descriptions.json"
    path.write_text(text)
    assert reason in refused("visual-genome", path, images=tmp_path)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_lists_are_cut_into_lists(encoding):
    entries = [1, "a ], [", {"b": [2, 3]}, [], None, "é"]
    data = json.dumps(entries, indent=1, ensure_ascii=False).encode(encoding)
    for size in range(1, 8):
        pieces = [(start, json.loads(text)) for start, text in cut_list(data, size)]
        assert pieces == [(i, entries[i : i + size]) for i in range(0, len(entries), size)]


def test_neighbours_in_a_file_are_apart_in_a_sample():
    regions = [read_region(str(n), "a", [n, 0, 1, 1], (100, 1)) for n in range(60)]
    found = shuffled(regions)
    assert shuffled(reversed(regions)) == found != regions
    places = [int(region.name) for region in found]
    assert sum(abs(a - b) == 1 for a, b in zip(places, places[1:], strict=False)) < 10
