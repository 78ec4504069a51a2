"""Conversations with several images, system texts and image parts, and files as published."""

import base64
import json
from pathlib import Path

import pytest
from read_corpus import collect, refused, write_images
from tiny_data import encoded, make_image

from data_prep.formats.registry import FORMATS
from data_prep.splits import ReadOptions, Skipped
from megatron_owl2.data.shards.records import Turn


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images") / "images")


def talk(*texts: str) -> list[dict]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def read(folder: Path, entries: list, images: Path | None = None):
    path = folder / "talk.json"
    path.write_text(json.dumps(entries))
    return collect("conversations", path, images=images)


def numbers(record) -> list[int]:
    """The numbers of the files that a record's images come from."""
    known = {encoded(make_image(number)): number for number in range(10)}
    return [known[image] for image in record.images]


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (("<image>\n<image>\nSame?", "no"), ("<|image|><|image|>Same?",)),
        (("Is <image> like <|image|>?", "no"), ("Is <|image|> like <|image|>?",)),
        (("<image> one", "a", "and\n<image>", "b"), ("<|image|>one", "and\n<|image|>")),
        (("Hi", "a", " <image>\n\n<image> two", "b"), ("Hi", "<|image|><|image|>two")),
        (("<image>", "a", "<image>", "b"), ("<|image|>", "<|image|>")),
        (("no tag", "a", "x", "b"), ("<|image|><|image|>no tag", "x")),
        (("a <image>\n", "<image> is a tag", "<image>", "b"), ("a <|image|>", "<|image|>")),
    ],
)
def test_tags_are_the_places_of_the_images_in_order(tmp_path, images, texts, expected):
    entry = {"image": ["3.jpg", "./5.jpg"], "conversations": talk(*texts)}
    (record,), skipped = read(tmp_path, [entry], images)
    assert tuple(turn.question for turn in record.turns) == expected
    assert tuple(turn.answer for turn in record.turns) == texts[1::2]
    assert numbers(record) == [3, 5] and not skipped


def test_tags_and_images_that_do_not_match_are_named_by_file_and_place(tmp_path, images):
    entries = [
        {"id": 1, "image": "1.jpg", "conversations": talk("<image><image>", "a")},
        {"id": 2, "images": ["1.jpg", "2.jpg"], "conversations": talk("<image>", "a")},
        {"id": 3, "conversations": talk("q", "a", "<|image|>", "a")},
        {"id": 4, "image": "gone.jpg", "conversations": talk("q", "a")},
        {"id": 5, "image": "1.jpg", "conversations": talk("q <image>", "a", "<image>")},
        {"id": 6, "image": ["1.jpg", "../secret.jpg"], "conversations": talk("q", "a")},
    ]
    path = tmp_path / "talk.jsonl"
    path.write_text("\ufeff" + "\n".join(map(json.dumps, entries)) + '\n{"id": 7')
    format_ = FORMATS["conversations"]
    (split,) = format_.plan(path, ReadOptions(images)).splits
    found = list(format_.read(split.payload))
    assert all(isinstance(item, Skipped) for item in found)
    assert [(item.reason, item.detail) for item in found] == [
        ("more image tags than images", "talk.jsonl, line 1, id 1: 2 for 1"),
        ("fewer image tags than images", "talk.jsonl, line 2, id 2: 1 for 2"),
        ("image tag without an image", "talk.jsonl, line 3, id 3"),
        ("image file is missing", f"talk.jsonl, line 4, id 4: {images}/gone.jpg"),
        ("image tag in a question that is dropped", "talk.jsonl, line 5, id 5"),
        ("image path leaves the images folder", "talk.jsonl, line 6, id 6: '../secret.jpg'"),
        ("line is not JSON", "talk.jsonl, line 7, id None"),
    ]


def test_system_texts_of_entries_and_of_turns(tmp_path):
    turn = {"from": "system", "value": " Be kind. "}
    entries = [
        {"system": "Be kind.", "conversations": talk("q", "a")},
        {"conversations": [turn, *talk("q", "a")]},
        {"system": "Be kind.", "conversations": [turn, *talk("q", "a")]},
        {"system": None, "conversations": [turn | {"value": ""}, *talk("q", "a")]},
        {"system": "", "conversations": [*talk("q", "a"), turn, *talk("q", "a")]},
    ]
    records, skipped = read(tmp_path, entries)
    assert [r.system for r in records] == ["Be kind."] * 3 + [""]
    assert {r.turns for r in records} == {(Turn("q", "a"),)}
    assert skipped == {"system turn after the first turn": 1}


def ask(*parts, answer="red") -> list[dict]:
    texts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return [{"role": "user", "content": texts}, {"role": "assistant", "content": answer}]


DATA_URL = f"data:image/jpeg;base64,{base64.b64encode(encoded(make_image(7))).decode()}"
BY_URL = {"type": "image_url", "image_url": {"url": DATA_URL}}


def test_image_parts_are_places_and_name_their_files(tmp_path, images):
    entries = [
        {"messages": ask({"type": "image_url", "image_url": {"url": "1.jpg"}}, "a ", BY_URL)},
        {"messages": ask({"type": "image", "path": "4.jpg"}, {"type": "image"}), "image": "2.jpg"},
        {
            "messages": ask("a <image> b", {"type": "image_url", "image_url": "3.jpg"}),
            "image": "6.jpg",
        },
        {"messages": ask({"type": "image"}, {"type": "image"}, "c"), "images": ["1.jpg", DATA_URL]},
    ]
    records, skipped = read(tmp_path, entries, images)
    assert [r.turns[0].question for r in records] == [
        "<|image|>a <|image|>",
        "<|image|><|image|>",
        "a <|image|> b<|image|>",
        "<|image|><|image|>c",
    ]
    assert [numbers(r) for r in records] == [[1, 7], [4, 2], [6, 3], [1, 7]] and not skipped
    assert "names images; say where" in refused("conversations", tmp_path / "talk.json")


def test_text_parts_follow_each_other_as_chat_templates_write_them(tmp_path):
    answer = [{"type": "text", "text": "Two"}, {"type": "text", "text": " parts."}]
    (record,), _ = read(tmp_path, [{"messages": ask("What", " is\n", "it?", answer=answer)}])
    assert record.turns == (Turn("What is\nit?", "Two parts."),)


def test_image_parts_that_cannot_be_read_are_counted(tmp_path):
    url = {"type": "image_url", "image_url": {"url": "http://x/1.jpg"}}
    bad = {"type": "image_url", "image_url": {"url": "data:image/png;base64,%%%"}}
    answer = [{"type": "text", "text": "red"}, {"type": "image"}]
    entries = [
        {"messages": ask("q", BY_URL)},
        {"messages": ask(url, "q")},
        {"messages": ask(bad, "q")},
        {"messages": ask({"type": "image_url", "image_url": {"url": "data:,x"}})},
        {"messages": ask("q", answer=answer)},
        {"messages": ask({"type": "image"}, "q")},
        {"messages": ask({"type": "image", "image": {"bytes": 3}}, "q")},
        {"messages": ask(BY_URL, "q"), "image": DATA_URL},
    ]
    records, skipped = read(tmp_path, entries)  # without a folder: no entry names a file
    assert [numbers(r) for r in records] == [[7]]
    assert skipped == {
        "image is an address, not a file: download it (tools/prepare_downloads.py)": 1,
        "data: URL of an image is not base64": 2,
        "image part outside a question": 1,
        "image tag without an image": 1,
        "image is not one path": 1,
        "fewer image tags than images": 1,
    }


SLIM_ORCA = """
{"conversations": [{"from": "system", "value": "You are an AI assistant.", "weight": null}, \
{"from": "human", "value": "Q: 2+2?\\nA:", "weight": 0.0}, \
{"from": "gpt", "value": "4", "weight": 1.0}]}
{"conversations": [{"from": "system", "value": "", "weight": null}, \
{"from": "human", "value": "Name <image>.", "weight": 0.0}, \
{"from": "gpt", "value": "x", "weight": 1.0}]}
{"conversations": [{"from": "human", "value": "Hi", "weight": 0.0}, \
{"from": "gpt", "value": "", "weight": 1.0}]}
{"conversations": [{"from": "system", "value": "", "weight": null}, \
{"from": "human", "value": "Hi", "weight": 0.0}, {"from": "gpt", "value": "Ho", "weight": 1.0}]}
"""


def test_slim_orca_as_published(tmp_path):
    path = tmp_path / "oo-labeled_correct.gpt4.sharegpt.jsonl"
    path.write_text(SLIM_ORCA.lstrip())
    records, skipped = collect("conversations", path)
    assert [(r.system, r.turns, r.metadata) for r in records] == [
        ("You are an AI assistant.", (Turn("Q: 2+2?\nA:", "4"),), {}),
        ("", (Turn("Hi", "Ho"),), {}),
    ]
    assert skipped == {"image tag without an image": 1, "empty turn": 1}


def test_sharegpt_as_published(tmp_path):
    html = '<div class="markdown"><p>Sure, <b>two</b>.</p></div>'
    entries = [
        {"id": "QWJhYvA_0", "conversations": talk("Write two", html)},
        {"id": "QWJhYvA_17", "conversations": [{"from": "gpt", "value": "..."}, *talk("q", "a")]},
        {"id": "i6IyJda_0", "conversations": talk("q", "a", "r", "b", "more")},
        {"id": "x_0", "conversations": []},
        {"id": "y_0", "conversations": talk("q", "a")[:1]},
        {
            "id": "z_0",
            "conversations": [{"from": "human", "value": "q"}, {"from": "bard", "value": "a"}],
        },
    ]
    records, skipped = read(tmp_path, entries)
    assert [r.metadata for r in records] == [
        {"id": "QWJhYvA_0"},
        {"id": "QWJhYvA_17", "dropped_turns": 1},
        {"id": "i6IyJda_0", "dropped_turns": 1},
        {"id": "z_0"},
    ]
    assert records[0].turns == (Turn("Write two", html),)
    assert skipped == {"no turns": 2}


def test_llava_instruct_as_published(tmp_path, images):
    name = "000000033471.jpg"
    (images / name).write_bytes(encoded(make_image(8)))
    turns = talk("What are the colors of the bus?\n<image>", "White and red.", "Where?", "There.")
    entries = [
        {"id": "000000033471", "image": name, "conversations": turns},
        {"id": "000000033471", "image": name, "conversations": talk("<image>\nWhy?", "So.")},
    ]
    records, skipped = read(tmp_path, entries, images)
    assert [r.turns[0].question for r in records] == [
        "What are the colors of the bus?\n<|image|>",
        "<|image|>Why?",
    ]
    assert [numbers(r) for r in records] == [[8], [8]] and not skipped
    assert len({r.key for r in records}) == 2  # the ids repeat, the keys do not
