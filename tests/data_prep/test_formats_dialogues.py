"""Instructions of mPLUG-Owl's second stage: Alpaca, Baize, and its own JSON lines."""

import codecs
import json
from pathlib import Path

import pytest
from paths import ROOT
from read_corpus import collect, refused, write_images
from tiny_data import encoded, make_image

from data_prep.formats.registry import FORMATS
from data_prep.splits import ReadOptions
from megatron_owl2.data.shards.records import Turn

PREAMBLE = (
    "The following is a conversation between a curious human and AI assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images") / "images")


def write(path: Path, entries: list) -> Path:
    rows = [entry if isinstance(entry, str) else json.dumps(entry) for entry in entries]
    path.write_text("\n".join(rows) if path.suffix == ".jsonl" else f"[{', '.join(rows)}]")
    return path


def ask(instruction, output="a", **more) -> dict:
    return {"instruction": instruction, "input": "", "output": output} | more


def test_alpaca_asks_with_the_input_in_the_line_below(tmp_path):
    entries = [
        ask("Name a colour.", "Red."),
        ask(" Add up. ", "3\n", input=" 1, 2\n"),
        ask("Why?", input="<noinput>"),
        ask("", input="2 + 2"),
        {"instruction": "How?", "output": "So."},
        ask("What?", input=None),
    ]
    records, skipped = collect("alpaca", write(tmp_path / "alpaca_data.json", entries))
    assert [r.turns for r in records] == [
        (Turn("Name a colour.", "Red."),),
        (Turn("Add up.\n1, 2", "3"),),
        (Turn("Why?", "a"),),
        (Turn("2 + 2", "a"),),
        (Turn("How?", "So."),),
        (Turn("What?", "a"),),
    ]
    assert not skipped and {(r.source, r.system) for r in records} == {("alpaca_data", "")}
    assert [r.key for r in records] == [f"{number:09d}" for number in range(6)]


def test_what_alpaca_cannot_be_asked_is_counted(tmp_path):
    entries = [
        ask("q", ""),
        ask("q", " \n"),
        ask("", "a"),
        {"instruction": "q"},
        {"output": "a"},
        ask("q", 7),
        ask("q", input=["x"]),
        ask("Describe <image>."),
        ask("q", "half a pair \ud800"),
        "7",
        ask("Is &lt;image> a tag?", "<image> is one"),
    ]
    records, skipped = collect("alpaca", write(tmp_path / "a.json", entries))
    assert [r.turns[0].answer for r in records] == ["<image> is one"]
    assert skipped == {
        "empty turn": 3,
        "no instruction and output": 3,
        "input is not a text": 1,
        "image tag without an image": 1,
        "answer 1 is not valid Unicode": 1,
        "entry is not an object": 1,
    }


def talk(*texts: str, end: str = "\n[|Human|] ") -> dict:
    """An entry as Baize's preprocess.py writes it."""
    lines = [f"[|{('Human', 'AI')[i % 2]}|] {text}" for i, text in enumerate(texts)]
    head = "The conversation between human and AI assistant.\n"
    return {"topic": texts[0], "input": head + "\n".join(lines) + end}


def test_baize_is_cut_at_its_marks(tmp_path):
    entries = [
        talk("Hi", "Ho", "And?", "So\n\n- it is."),
        talk("Hi", "Ho", end=""),
        talk("Hi", "Ho", end="\n[|Human|]\n"),
        talk("Hi", "Ho", "Bye", end=""),
        {"input": "[|AI|] Hm[|Human|]Hi[|AI|]Ho"},
    ]
    records, skipped = collect("baize", write(tmp_path / "quora_chat_data.json", entries))
    assert [r.turns for r in records] == [
        (Turn("Hi", "Ho"), Turn("And?", "So\n\n- it is.")),
        *[(Turn("Hi", "Ho"),)] * 4,
    ]
    dropped = [r.metadata.get("dropped_turns") for r in records]
    assert dropped == [None, None, None, 1, 1] and not skipped
    assert {r.system for r in records} == {""}


def test_what_baize_cannot_be_cut_into_is_counted(tmp_path):
    entries = [
        {"topic": "t"},
        {"topic": "t", "input": None},
        {"input": "no marks [Human] at all"},
        {"input": ""},
        talk("Hi"),
        talk("", "Ho"),
        talk("Hi", ""),
        {"input": "[|Human|] a [|Human|] b [|AI|] c"},
        {"input": "[|Human|] "},
    ]
    records, skipped = collect("baize", write(tmp_path / "b.json", entries))
    assert not records
    assert skipped == {
        "no input with a dialogue": 2,
        "no [|Human|] and [|AI|]": 2,
        "no turns": 3,
        "empty turn": 1,
        "human and gpt do not take turns": 1,
    }


def owl1(*lines: str, image=(), task="llava_sft", head=PREAMBLE) -> dict:
    text = "\n".join([head, *lines] if head else lines)
    return {"text": text, "task_type": task} | ({"image": list(image)} if image else {})


def test_owl1_is_cut_at_its_lines(tmp_path, images):
    ask = ("Human: <image>", "Human: What?", "AI: red")
    entries = [
        owl1("Human: Past tense of\nshudder", "AI: She shuddered.\nAnd more.", task="g_sft"),
        owl1(*ask, image=["1.jpg"]),
        owl1(*ask, "Human: Sure?", "AI: yes", image=["1.jpg"]),
        owl1("Human: <image>", *ask, image=["1.jpg", "deep/../2.jpg"]),
        owl1("Human: <image>", *ask, image=["1.jpg", "./2.jpg"]),
        owl1("Human: Hi", "AI: Ho", *ask, image=["3.jpg"]),
        owl1("Human: What is <image>?", "AI: red", image=["4.jpg"]),
        owl1("Human: <image>", "Human: Same?", "Human: <image>", "AI: no", image=["1.jpg"] * 2),
        owl1("Human: What does OpenAI: mean?", "AI: It makes AI: so", head=""),
        owl1("Human: What?", "AI: red", image=["5.jpg"]),
        {"text": "Human: Hi\nAI: Ho"},
    ]
    path = write(tmp_path / "train.jsonl", entries)
    records, skipped = collect("owl1", path, images=images)
    assert [[turn.question for turn in r.turns] for r in records] == [
        ["Past tense of\nshudder"],
        ["<|image|>What?"],
        ["<|image|>What?", "Sure?"],
        ["<|image|><|image|>What?"],
        ["Hi", "<|image|>What?"],
        ["What is <|image|>?"],
        ["<|image|>Same?\n<|image|>"],
        ["What does OpenAI: mean?"],
        ["<|image|>What?"],
        ["Hi"],
    ]
    assert records[0].turns[0].answer == "She shuddered.\nAnd more."
    assert records[7].turns[0].answer == "It makes AI: so"
    assert records[3].images == tuple(encoded(make_image(number)) for number in (1, 2))
    assert [bool(r.system) for r in records] == [True] * 7 + [False, True, False]
    assert records[0].system == PREAMBLE
    assert skipped == {"image path leaves the images folder": 1}


def test_what_owl1_cannot_be_cut_into_is_counted(tmp_path, images):
    hello = ("Human: Hi", "AI: Ho")
    entries = [
        {"image": ["1.jpg"], "task_type": "x_sft"},
        owl1(*hello, task="caption"),
        owl1(*hello, task="x_sft_v2"),
        owl1("No lines"),
        owl1("Human: Hi", "AI:Ho"),
        owl1("Human: Hi", "AI: "),
        owl1("Human: <image>", "Human: Hi", "AI: ", image=["1.jpg"]),
        owl1("Human: Hi", "Human: there", "AI: Ho"),
        owl1("Human: Hi", "AI: Ho", "AI: Ho"),
        owl1("<image>", *hello, image=["1.jpg"]),
        owl1("Human: <image>", *hello),
        owl1("Human: <image>", *hello, image=["1.jpg", "2.jpg"]),
        owl1("Human: <image>", *hello, image=["gone.jpg"]),
        owl1("Human: <|video|>", *hello),
        owl1(*hello) | {"video": ["1.mp4"]},
        '{"text": "cut',
    ]
    records, skipped = collect("owl1", write(tmp_path / "t.jsonl", entries), images=images)
    assert not records
    assert skipped == {
        "no text": 1,
        "task_type does not end in _sft": 2,
        "no lines of Human: and AI:": 1,
        "no turns": 1,
        "empty turn": 2,
        "human and gpt do not take turns": 2,
        "tag of a video or an audio file in a question": 1,
        "image tag before the first line of Human:": 1,
        "image tag without an image": 1,
        "fewer image tags than images": 1,
        "image file is missing": 1,
        "video and audio are not read": 1,
        "line is not JSON": 1,
    }


def test_the_texts_of_the_official_recordings_are_read_or_counted(tmp_path, images):
    recorded = json.loads((ROOT / "tests/data/official_v1_tiny/conversations.json").read_text())
    texts = {row["name"]: row["text"] for row in recorded["rows"]}
    entries = [
        {"text": text, "image": ["1.jpg"] * text.count("<image>"), "task_type": "x_sft"}
        for text in texts.values()
    ]
    path = write(tmp_path / "t.jsonl", entries)
    records, skipped = collect("owl1", path, images=images)
    assert sum(skipped.values()) + len(records) == len(texts) == 20
    assert skipped == {
        "empty turn": 2,  # prompts, which end in "AI: "
        "no turns": 2,  # "AI:" without a space is no answer there either; one has no question
        "image tag before the first line of Human:": 1,  # spelt out by the official code
    }
    for record in records:
        assert len(record.images) == "".join(turn.question for turn in record.turns).count("<|im")


SMALL = {
    "alpaca": ask("q"),
    "baize": talk("q", "a"),
    "owl1": {"text": "Human: q\nAI: a"},
}


@pytest.mark.parametrize("kind", SMALL)
def test_files_are_read_as_editors_save_them(tmp_path, kind):
    line = json.dumps(SMALL[kind])
    for number, data in enumerate(
        (
            codecs.BOM_UTF8 + f"[{line}, {line}]".encode(),
            f"[{line}, {line}]".encode("utf-16"),
            f"{line}\r\n\r\n{line}\r\n".encode(),
        )
    ):
        path = tmp_path / f"{number}.json"
        path.write_bytes(data)
        records, skipped = collect(kind, path, samples_per_split=1)
        assert [r.turns for r in records] == [(Turn("q", "a"),)] * 2 and not skipped
    path.write_text(json.dumps({"data": [SMALL[kind]]}))
    assert "must hold a list of conversations; it holds one object (data)" in refused(kind, path)


@pytest.mark.parametrize("kind", SMALL)
def test_long_texts_stay_whole(tmp_path, kind):
    """Ten million characters, of which nothing is a mark."""
    long = "AI Human [|" * 1_000_000
    entry = json.loads(json.dumps(SMALL[kind]).replace('a"', f'{long}"'))
    if kind == "baize":
        entry = talk("q", long)
    records, _ = collect(kind, write(tmp_path / "t.json", [entry, SMALL[kind]]))
    assert records[0].turns == (Turn("q", long),) and len(records) == 2


def test_images_must_be_said_where_they_are(tmp_path):
    path = write(tmp_path / "t.jsonl", [owl1("Human: <image>", "AI: a", image=["1.jpg"])])
    assert "names images; say where they are with --images DIR" in refused("owl1", path)
    (split,) = FORMATS["owl1"].plan(path, ReadOptions(images=tmp_path)).splits
    (lost,) = FORMATS["owl1"].read(split.payload)
    assert lost.detail == f"t.jsonl, line 1, id None: {tmp_path}/1.jpg"  # pyright: ignore
