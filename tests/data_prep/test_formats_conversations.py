"""Conversations as the field's tools write them: lists, lines, roles, images in lists."""

import codecs
import gzip
import json
import pickle
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from read_corpus import collect, refused, write_images
from tiny_data import encoded, make_image

from data_prep.formats.registry import FORMATS
from data_prep.splits import ReadOptions
from megatron_owl2.data.shards.records import Turn


def talk(*texts: str, first: str = "human", second: str = "gpt") -> list[dict]:
    return [{"from": (first, second)[i % 2], "value": text} for i, text in enumerate(texts)]


def write(path: Path, entries: list) -> Path:
    rows = [entry if isinstance(entry, str) else json.dumps(entry) for entry in entries]
    path.write_text("\n".join(rows) if path.suffix == ".jsonl" else f"[{', '.join(rows)}]")
    return path


SYSTEM = {"from": "system", "value": "x"}
HELLO = {"id": 1, "conversations": talk("Hi", "Hello")}


@pytest.mark.parametrize("size", [1, 2, 100])
def test_lines_and_lists_give_the_same_records(tmp_path, size):
    entries = [HELLO | {"id": i} for i in range(5)]
    found = [
        collect("conversations", write(tmp_path / name, entries), samples_per_split=size)
        for name in ("talk.json", "talk.jsonl")
    ]
    (of_list, skipped), (of_lines, others) = found
    assert [r.key for r in of_list] == [f"{number:09d}" for number in range(5)]
    assert [r.key for r in of_lines] == [f"{number:09d}" for number in range(1, 6)]
    assert [replace(r, key="") for r in of_list] == [replace(r, key="") for r in of_lines]
    assert len(of_list) == 5 and not skipped and not others


TEXT = f"{json.dumps(HELLO)}\n{json.dumps(HELLO)}"


@pytest.mark.parametrize(
    "data",
    [
        TEXT.encode() + b"\n\n",
        codecs.BOM_UTF8 + TEXT.encode(),
        TEXT.replace("\n", "\r\n").encode(),
        TEXT.encode("utf-16"),
        f"\n [{TEXT.replace(chr(10), ',')}]".encode("utf-8-sig"),
        f"[{TEXT.replace(chr(10), ',')}]".encode("utf-16"),
    ],
)
def test_files_are_read_as_editors_save_them(tmp_path, data):
    path = tmp_path / "talk.json"
    path.write_bytes(data)
    records, skipped = collect("conversations", path)
    assert [r.turns for r in records] == [(Turn("Hi", "Hello"),)] * 2 and not skipped


def test_a_broken_line_costs_no_other(tmp_path):
    path = write(tmp_path / "talk.jsonl", [HELLO, '{"id": 2, "conv', "", HELLO, "[1]"])
    records, skipped = collect("conversations", path)
    assert [r.key for r in records] == ["000000001", "000000004"]  # as an editor counts lines
    assert skipped == {"line is not JSON": 1, "entry is not an object": 1}
    format_ = FORMATS["conversations"]
    (split,) = format_.plan(path, ReadOptions()).splits
    elsewhere = pickle.loads(pickle.dumps(split.payload))  # as worker processes get it
    assert list(format_.read(elsewhere)) == list(format_.read(split.payload))


@pytest.mark.parametrize("name", ["talk.json", "talk.jsonl"])
def test_an_entry_that_is_nested_too_deeply_costs_no_other(tmp_path, name):
    """It can be read, but not be sent to another process."""
    deep = f'{{"id": {"[" * 600}{"]" * 600}, {json.dumps(HELLO)[1:]}'.replace('"id": 1, ', "")
    path = write(tmp_path / name, [HELLO, deep, HELLO | {"id": [[{"a": 1}]]}])
    records, skipped = collect("conversations", path)
    assert [r.metadata["id"] for r in records] == [1, [[{"a": 1}]]]
    assert skipped == {"entry is nested too deeply": 1}
    for split in FORMATS["conversations"].plan(path, ReadOptions()).splits:
        pickle.dumps(split.payload)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b'[{"id": 1}, ', "is not JSON: Expecting"),
        (b"[" * 100_000, "nested too deeply"),
        (b"", "is empty"),
        (b"[]", "holds no conversation: its list is empty"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a pointer of Git LFS; fetch"),
        (b"no JSON\nat all", "is not JSON of conversations, neither"),
        (json.dumps({"data": [HELLO], "version": 1}).encode(), r"one object (data, version)"),
        (gzip.compress(TEXT.encode(), mtime=0), "is compressed with gzip; unpack it first"),
    ],
)
def test_what_holds_no_conversations_is_refused_by_name(tmp_path, data, reason):
    path = tmp_path / "talk.json"
    path.write_bytes(data)
    error = refused("conversations", path)
    assert str(path) in error and reason in error


@pytest.mark.parametrize(
    ("names", "kept"),
    [
        ({"image": "1.jpg"}, 1),
        ({"image": ["1.jpg"]}, 1),
        ({"images": ["1.jpg"]}, 1),
        ({"images": "1.jpg"}, 1),
        ({"image": None, "images": ["1.jpg"]}, 1),
        ({"image": "deep\\..\\1.jpg"}, 0),
        ({"image": ".\\1.jpg"}, 1),
        ({"image": ["1.jpg", "2.jpg"]}, 0),
        ({"images": ["1.jpg", "1.jpg"]}, 0),
        ({"image": [["1.jpg"]]}, 0),
        ({"image": []}, 0),
        ({"image": [], "images": ["1.jpg"]}, 1),
        ({"image": "", "images": ["1.jpg"]}, 1),
        ({"image": "1.jpg", "images": ""}, 1),
        ({"image": "1.jpg", "images": ["1.jpg"]}, 1),
    ],
)
def test_a_list_of_one_image_is_that_image(tmp_path, names, kept):
    images = write_images(tmp_path / "images")
    entries = [{"conversations": talk("<image>\nWhat?", "red")} | names, HELLO]
    records, skipped = collect("conversations", write(tmp_path / "t.json", entries), images=images)
    assert len(records) == kept + 1 and sum(skipped.values()) == 1 - kept
    if kept:
        assert records[0].images[0] == encoded(make_image(1))
        assert records[0].turns[0].question == "<|image|>What?"
    elif len(next(iter(names.values()))) == 2:
        assert skipped == {"fewer image tags than images": 1}


def test_images_that_are_named_twice_are_taken_once_and_must_agree(tmp_path):
    images = write_images(tmp_path / "images")
    entries = [
        {"image": "1.jpg", "images": ["1.jpg"], "conversations": talk("What?", "red")},
        {"image": ["1.jpg", "2.jpg"], "images": ["1.jpg", "2.jpg"], "messages": talk("q", "a")},
        {"image": "1.jpg", "images": ["2.jpg"], "conversations": talk("What?", "red")},
        {"image": "1.jpg", "images": ["1.jpg", "1.jpg"], "conversations": talk("What?", "red")},
    ]
    records, skipped = collect("conversations", write(tmp_path / "t.json", entries), images=images)
    assert [len(r.images) for r in records] == [1, 2]
    assert skipped == {"image and images name different files": 2}


@pytest.mark.parametrize("none", ["", None, []])
def test_text_samples_of_a_mixed_file_name_no_image(tmp_path, none):
    entries = [HELLO | {"image": none}, HELLO | {"images": none}, HELLO | {"video": none}]
    records, skipped = collect("conversations", write(tmp_path / "t.json", entries))
    assert [r.images for r in records] == [()] * 3 and not skipped


MEDIA, OTHER_KEY, MEDIA_TAG, PART = (
    "video and audio are not read",
    "images are named by another key than image and images",
    "tag of a video or an audio file in a question",
    "part of a message is neither a text nor an image",
)


def test_entries_with_files_that_are_not_read_are_not_taken_for_text(tmp_path):
    keys = {key: MEDIA for key in ("video", "videos", "audio", "audios", "video_path", "Audio")}
    keys |= {key: OTHER_KEY for key in ("image_path", "image_paths", "Image", "image_url", "img")}
    left_out = [(HELLO | {key: value}, why) for key, why in keys.items() for value in ("x", ["x"])]
    left_out += [
        ({"conversations": talk("<video>\nWhat?", "a")}, MEDIA_TAG),
        ({"conversations": talk("q", "a", "What do you hear?\n<Audio> ", "b")}, MEDIA_TAG),
        ({"image": "1.jpg", "conversations": talk("<image> or <video>?", "a")}, MEDIA_TAG),
        *(
            ({"messages": [{"role": "user", "content": [{"type": kind}]}]}, PART)
            for kind in ("video", "input_audio")
        ),
    ]
    kept = [HELLO | {key: [7]} for key in ("image_id", "image_size", "video_length")]
    kept.append({"conversations": talk("Does <video> work in HTML 4?", "<video> is new")})
    kept.append({"image": "", "video": "", "conversations": talk("q", "a")})
    path = write(tmp_path / "t.json", [entry for entry, _ in left_out] + kept)
    records, skipped = collect("conversations", path, images=write_images(tmp_path / "images"))
    assert [r.images for r in records] == [()] * len(kept)
    assert skipped == Counter(reason for _, reason in left_out)


def test_other_keys_beside_an_image_are_about_it_but_not_video(tmp_path):
    entry = HELLO | {"image": "1.jpg", "image_url": "http://x/1.jpg"}
    path = write(tmp_path / "t.json", [entry, entry | {"video": "1.mp4"}])
    records, skipped = collect("conversations", path, images=write_images(tmp_path / "images"))
    assert [len(r.images) for r in records] == [1] and skipped == {MEDIA: 1}


def test_a_tag_of_any_letter_case_is_a_place_where_the_entry_has_images(tmp_path):
    images = write_images(tmp_path / "images")
    entries = [
        {"image": "1.jpg", "conversations": talk("<Image>\nWhat?", "<IMAGE>")},
        {"images": ["1.jpg", "2.jpg"], "conversations": talk("<IMAGE><image>", "a")},
        {"conversations": talk("A custom <Image> element?", "yes")},
        {"image": "1.jpg", "conversations": talk("<image> is <Image>?", "yes")},
    ]
    records, skipped = collect("conversations", write(tmp_path / "t.json", entries), images=images)
    assert [r.turns[0].question for r in records] == [
        "<|image|>What?",
        "<|image|><|image|>",
        "A custom <Image> element?",
    ]
    assert records[0].turns[0].answer == "<IMAGE>"
    assert skipped == {"more image tags than images": 1}


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("user", "assistant"),
        ("Human", "GPT"),
        ("human", "chatgpt"),
        (" user ", "gpt"),
        ("human", "bing"),
        ("user", "Bard"),
    ],
)
def test_other_names_of_the_speakers(tmp_path, first, second):
    entry = {"conversations": talk("q", "a", "r", "b", first=first, second=second)}
    records, _ = collect("conversations", write(tmp_path / "t.json", [entry]))
    assert records[0].turns == (Turn("q", "a"), Turn("r", "b")) and records[0].metadata == {}


def test_messages_of_openai(tmp_path):
    images = write_images(tmp_path / "images")
    parts = [
        {"type": "text", "text": "What "},
        {"type": "image"},
        {"type": "text", "text": "is it?"},
    ]
    entries = [
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]},
        {
            "images": ["2.jpg"],
            "messages": [
                {"role": "user", "content": parts},
                {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
            ],
        },
        {"messages": [{"role": "user", "content": [{"type": "audio"}]}]},
    ]
    records, skipped = collect("conversations", write(tmp_path / "t.json", entries), images=images)
    assert [r.turns for r in records] == [
        (Turn("Hi", "Ho"),),
        (Turn("What <|image|>is it?", "red"),),
    ]
    assert skipped == {"part of a message is neither a text nor an image": 1}


def test_a_first_answer_and_a_last_question_go_alone_and_are_counted(tmp_path):
    entries = [
        {"id": 1, "conversations": talk("as I said", "q", "a", first="gpt", second="human")},
        {"conversations": talk("q", "a", "thanks")},
        {"conversations": talk("x", "q", "a", "thanks", first="gpt", second="human")[:4]},
        {"conversations": talk("q")},
        {"conversations": talk("a", "b", second="human")},
    ]
    records, skipped = collect("conversations", write(tmp_path / "t.json", entries))
    assert [r.turns for r in records] == [(Turn("q", "a"),)] * 3
    assert [r.metadata for r in records] == [
        {"id": 1, "dropped_turns": 1},
        {"dropped_turns": 1},
        {"dropped_turns": 2},
    ]
    assert skipped == {"no turns": 1, "human and gpt do not take turns": 1}


def test_reasons_name_what_was_met(tmp_path):
    entries = [
        {"id": "s", "conversations": [*talk("q", "a"), SYSTEM]},
        {"id": "t", "system": ["x"], "conversations": talk("q", "a")},
        {"id": "u", "system": "y", "conversations": [SYSTEM, *talk("q", "a")]},
        {"id": "v", "conversations": [SYSTEM, SYSTEM, *talk("q", "a")]},
        {"id": "b", "conversations": talk("q", "a", second="tool")},
        {"id": "n", "conversations": [{"value": "q"}]},
        {"id": "o", "chat": []},
        {"id": "l", "conversations": talk("q", "a", second="x" * 1000)},
    ]
    (split,) = (
        FORMATS["conversations"].plan(write(tmp_path / "t.json", entries), ReadOptions()).splits
    )
    found = list(FORMATS["conversations"].read(split.payload))
    assert [(item.reason, item.detail.partition("id ")[2]) for item in found] == [
        ("system turn after the first turn", "'s': human, gpt, system"),
        ("system is not a text", "'t': ['x']"),
        ("system text and another one in a system turn", "'u'"),
        ("several system turns", "'v': system, system, human, gpt"),
        ("speaker is neither human nor gpt", "'b': 'tool'"),
        ("speaker is neither human nor gpt", "'n': None"),
        ("no conversations or messages", "'o': 'id', 'chat'"),
        ("speaker is neither human nor gpt", f"'l': '{'x' * 76}..."),
    ]


def test_all_speakers_are_shown_where_turns_are_out_of_order(tmp_path):
    entries = [
        {"conversations": [SYSTEM, *talk("q", "a"), SYSTEM]},
        {"conversations": [SYSTEM, *talk("q", "a"), *talk("q", "a", first="gpt", second="human")]},
    ]
    path = write(tmp_path / "t.json", entries)
    (split,) = FORMATS["conversations"].plan(path, ReadOptions()).splits
    details = [item.detail for item in FORMATS["conversations"].read(split.payload)]
    assert [detail.rpartition(": ")[2] for detail in details] == [
        "system, human, gpt, system",
        "system, human, gpt, gpt, human",
    ]


COCO = {
    "images": [{"id": 1, "file_name": "1.jpg"}, {"id": "2", "file_name": "2.jpg"}],
    "annotations": [
        {"id": 1, "image_id": 1, "caption": "one"},
        {"id": 2, "image_id": "2", "caption": None},
        {"id": 3, "image_id": 1, "caption": ["a", "b"]},
        {"id": 4, "image_id": "2"},
    ],
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_every_caption_of_coco_has_its_own_fate(tmp_path, encoding):
    images = write_images(tmp_path / "images")
    path = tmp_path / "captions.json"
    path.write_text(json.dumps(COCO), encoding=encoding)
    records, skipped = collect("coco", path, images=images)
    assert [r.caption for r in records] == ["one"]
    assert skipped == {"empty caption": 2, "caption is not a text": 1}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"images": [{"id": 1}]}, "images[0] has no file_name"),
        ({"images": [{"id": 1, "file_name": "a"}, 7]}, "images[1] is not an object (7)"),
        (
            {"images": [{"id": [1], "file_name": "a"}]},
            "images[0] has the id [1], neither",
        ),
        ({"annotations": [{"id": 1, "caption": "c"}]}, "annotations[0] has no image_id"),
        ({"annotations": None}, "an object with lists of images and annotations"),
        ({"images": 2 * [COCO["images"][0]] + [{"id": 1, "file_name": "x"}]}, "both 1.jpg and x"),
    ],
)
def test_coco_that_is_not_as_published_is_told_by_the_entry(tmp_path, change, reason):
    path = tmp_path / "captions.json"
    path.write_text(json.dumps(COCO | change))
    error = refused("coco", path, images=tmp_path)
    assert str(path) in error and reason in error


def test_a_tag_in_a_turn_that_is_dropped_moves_nowhere(tmp_path):
    images = write_images(tmp_path / "images")
    entries = [
        {"image": "1.jpg", "conversations": talk("q", "a", "<image>what?")},
        {"conversations": talk("see <image>", "q", "a", first="gpt", second="human")},
        {"conversations": None, "messages": talk("r", "a")},
    ]
    records, skipped = collect("conversations", write(tmp_path / "t.json", entries), images=images)
    assert [r.turns for r in records] == [(Turn("q", "a"),), (Turn("r", "a"),)]
    assert skipped == {"image tag in a question that is dropped": 1}
