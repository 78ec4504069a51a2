"""OwlEval: the conversations of its questions, answers that were not kept, and published counts."""

import json
from pathlib import Path

import pytest
from benchmark_files import TASKS, draw
from PIL import Image

from megatron_owl2.cli.evaluate import main
from megatron_owl2.config.schema import DecoderConfig, ModelConfig, ParallelConfig, VisionConfig
from megatron_owl2.evaluation import benchmark, runner
from megatron_owl2.evaluation.asking import batches_of
from megatron_owl2.evaluation.benchmarks.owleval import RATERS
from megatron_owl2.evaluation.runner import Settings
from megatron_owl2.mcore import setup

# Abilities of the questions on each of the 50 images, from OwlEval/questions.jsonl of
# X-PLUG/mPLUG-Owl. A first question is "single_turn", and "multi_turn" as well where others follow.
ABILITIES = """
abe abe abe ac,abcef ab,ab,abef abc,ac ac ace ace,acef ace,ac,ac,ac,ace,abc,abc,abcef ac,ac ac,acef
ac,ace,ace,acef abcde abcde abd abc,abcef ab ab abce ab,abef ab,abef abce abde abde abd abd abd abd
abd abd abd ab,abef ab,abef abd abd abe abde abd abe,abef ab,abef abe,abef abd,abdef abd,abdf ab,abf
abd ab,ab,abf,abf,abf abd abde abd
"""


def write_questions(folder: Path) -> Path:
    rows = []
    for image, of_image in enumerate(ABILITIES.split(), start=1):
        abilities = of_image.split(",")
        draw(folder / f"cases/{image}.jpg")
        for turn, letters in enumerate(abilities):
            category = ["multi_turn"] if turn else ["single_turn", "multi_turn"][: len(abilities)]
            if image == 2:
                category = ["]single_turn"]  # as published
            row = {"image": f"{image}.jpg", "question_id": len(rows) + 1}
            row |= {"question": f"q{len(rows) + 1}?", "ability": ",".join(letters)}
            rows.append(row | {"category": category})
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def write_answers(folder: Path, name: str, texts: list[str]) -> Path:
    """Answers in the published form: images under other names, and a model_id."""
    rows = [
        {"image": "1.png", "question_id": i, "question": "Q", "answer": text, "model_id": name}
        for i, text in enumerate(texts, start=1)
    ]
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / f"{name}.jsonl"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_questions(tmp_path_factory.mktemp("owleval"))


def test_abilities_and_categories_are_counted_as_the_authors_do(data):
    questions, gold = benchmark.read(TASKS["owleval"], data)
    table = benchmark.score(TASKS["owleval"], dict.fromkeys(gold, "B"), gold)
    assert {name: row["n"] for name, row in table["skills"].items()} == {
        "a": 82, "b": 63, "c": 30, "d": 24, "e": 35, "f": 20, "single-turn": 50, "multi-turn": 52
    }  # fmt: skip
    assert table["overall"] == {"A": 0, "B": 82, "C": 0, "D": 0, "n": 82}
    assert sum(q.follows is not None for q in questions) == 32
    assert len({q.images for q in questions}) == 50
    follows = {q.id: q.follows for q in questions}
    assert follows[4] is None and follows[5] == 4 and follows[8] == 7 and follows[11] is None


def test_a_conversation_stays_in_its_batch(data):
    questions, _ = benchmark.read(TASKS["owleval"], data)
    for size in (1, 3, 16, 82, 100):
        batches = batches_of(questions, size)
        assert [place for batch in batches for place in batch] == list(range(82))
        assert all(questions[batch[0]].follows is None for batch in batches)
        assert all(len(batch) >= size for batch in batches[:-1])
    assert [len(batch) for batch in batches_of(questions, 16)] == [22, 16, 16, 17, 11]


class Talks:
    """A generator that answers with its place among all answers; `asked` are the prompts."""

    bos_id, eos_id = 1, 2

    def __init__(self, loaded):
        self.config, self.tokenizer = loaded.config, self

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]

    def generate(self, prompts, images, max_new_tokens, min_new_tokens):
        marks = {1: "", 2: "</s>", -200: "<|image|>"}
        spelled = [
            p if isinstance(p, str) else "".join(marks.get(i) or chr(i) for i in p if i != 1)
            for p in prompts
        ]
        assert [len(row) for row in images] == [1] * len(prompts)
        assert all(text.count("<|image|>") == 1 for text in spelled)
        answers = [f"#{len(self.asked) + n}" for n in range(len(prompts))]
        self.asked.extend(spelled)
        return answers


def ask(data: Path, output: Path, monkeypatch, positions: int = 2048, **settings) -> list[str]:
    monkeypatch.setattr(Talks, "asked", [], raising=False)
    monkeypatch.setattr(runner, "Generator", Talks)
    setup.initialize(ParallelConfig())
    decoder = DecoderConfig(max_positions=positions)
    config = ModelConfig(vision=VisionConfig(image_size=28), decoder=decoder)
    questions, gold = benchmark.read(TASKS["owleval"], data, settings.get("limit"), with_gold=False)
    loaded = type("Loaded", (), {"config": config})
    runner.evaluate(loaded, "owleval", questions, gold, output, Settings(**settings), {})
    rows = map(json.loads, (output / "predictions.jsonl").read_text().splitlines())
    said = {row["question_id"]: row["answer"] for row in rows}
    return [Talks.asked[int(said[i][1:])] for i in said]  # the prompts in the questions' order


def test_questions_are_asked_after_the_ones_that_they_follow(data, tmp_path, monkeypatch):
    asked = ask(data, tmp_path, monkeypatch, batch_size=4, limit=9)
    # A batch of four would end inside of the conversation on image 4, and so has five questions.
    assert asked == [
        "USER: <|image|>q1? ASSISTANT:",
        "USER: <|image|>q2? ASSISTANT:",
        "USER: <|image|>q3? ASSISTANT:",
        "USER: <|image|>q4? ASSISTANT:",
        "USER: <|image|>q4? ASSISTANT:#3</s>USER: q5? ASSISTANT:",
        "USER: <|image|>q6? ASSISTANT:",
        "USER: <|image|>q6? ASSISTANT:#5</s>USER: q7? ASSISTANT:",
        "USER: <|image|>q6? ASSISTANT:#5</s>USER: q7? ASSISTANT:#7</s>USER: q8? ASSISTANT:",
        "USER: <|image|>q9? ASSISTANT:",
    ]
    alone = ask(data, tmp_path / "alone", monkeypatch, prompt="official", limit=9)
    assert alone == [f"USER: <|image|>q{n}? ASSISTANT: " for n in range(1, 10)]


def test_the_oldest_turns_are_left_out_where_there_is_no_room(data, tmp_path, monkeypatch, caplog):
    # An image has 65 positions, a first question 21 or 22 ids, a later one with the answer before
    # it 25 to 27; so behind three exchanges 16 new tokens still have room, and no fourth one.
    asked = ask(data, tmp_path, monkeypatch, 65 + 22 + 3 * 27 + 15, max_new_tokens=16, limit=22)
    turns = [text.count("USER:") for text in asked[14:22]]
    assert turns == [1, 2, 3, 4, 4, 4, 4, 4]
    assert asked[18].startswith("USER: <|image|>q16? ASSISTANT:#")
    assert asked[18].endswith("</s>USER: q19? ASSISTANT:")
    warned = [r.getMessage() for r in caplog.records]
    assert len(warned) == 4 and warned[0].startswith(
        "question 19 is asked without the first 1 of the 4 before it"
    )


LOST = "\u65e0\u6cd5\u56de\u6eaf"


def test_answers_that_were_not_kept_are_counted_and_rated_by_nobody(data, tmp_path, capsys):
    # What MM-REACT's published file has: with white space and full stops behind the words.
    texts = [f"react {n}" for n in range(82)]
    for place, end in ((0, ""), (33, ". "), (38, " "), (40, "  "), (53, ".")):
        texts[place] = LOST + end
    texts[25], texts[31] = "Can't recognize the image", ""  # what a model says, or does not
    ours = write_answers(tmp_path, "ours", [f"owl {n}" for n in range(82)])
    out = tmp_path / "sheet"
    make = ["rating-sheet", "--task", "owleval", "--data", data, "--output", out, "--predictions"]
    make += [ours, f"MM-REACT={write_answers(tmp_path, 'mmreact', texts)}"]
    assert main([*map(str, make)]) == 0
    told = capsys.readouterr().out
    assert told.startswith("159 answers are in") and "5 answers of MM-REACT were not kept" in told
    key = json.loads((out / "key.json").read_text())
    assert len(key) == 164 and sum(row.get("lost", False) for row in key.values()) == 5
    assert (out / "sheet.csv").read_text(encoding="utf-8-sig").count("\n") == 160
    page = (out / "sheet.html").read_text()
    assert LOST not in page and LOST not in (out / "sheet.csv").read_text(encoding="utf-8-sig")
    assert "Asked in a conversation, after: q6? / q7?" in page
    assert page.count("Asked in a conversation") == 32

    rated = ["item,rating"]
    rated += [f"{code},{'A' if key[code]['model'] == 'ours' else 'C'}" for code in key]
    kept = [line for line in rated if not key.get(line[:9], {}).get("lost")]
    (tmp_path / "filled.csv").write_text("\n".join(kept) + "\n")
    tally = ["tally", "--key", out / "key.json", "--sheet", tmp_path / "filled.csv"]
    tally += ["--task", "owleval", "--figure", tmp_path / "tally.png"]
    assert main([*map(str, tally)]) == 0
    table = json.loads(capsys.readouterr().out)
    react, owl = table["models"]["MM-REACT"], table["models"]["ours"]
    assert react["overall"] == {"A": 0, "B": 0, "C": 77, "D": 0, "n": 77} and react["lost"] == 5
    assert owl["overall"]["A"] == 82 and owl["lost"] == 0 and table["unrated"] == 0
    assert [owl["skills"][name]["n"] for name in ("single-turn", "multi-turn", "f")] == [50, 52, 20]
    assert react["skills"]["single-turn"]["n"] == 50 - 4  # of 1, 34, 39 and 41
    published = table["published"]["models"]["mPLUG-Owl"]["skills"]
    assert published["multi-turn"] == {"A": 31, "B": 8, "C": 13, "D": 0, "n": 52}
    assert "README of X-PLUG/mPLUG-Owl" in table["published"]["source"]
    with Image.open(tmp_path / "tally.png") as image:
        assert image.size[0] > 1500 and len(image.convert("RGB").getcolors(1 << 24)) > 50
    (tmp_path / "filled.csv").write_text("\n".join(rated) + "\n")
    assert main([*map(str, tally)]) == 2  # with ratings of what nobody has seen
    assert "there is no item" in capsys.readouterr().err


def test_published_counts_are_of_all_answers():
    for category, n in (("single-turn", 50), ("multi-turn", 52)):
        counts = RATERS.published[category]
        assert len(counts) == 5 and {sum(row.values()) for row in counts.values()} == {n}
    # The paper's text has A and B together of all 82, of which 20 are in both categories: 66 of
    # mPLUG-Owl and 54 of MiniGPT-4. So 15 of the 20 were A or B, of either.
    for model, both in (("mPLUG-Owl", 66), ("MiniGPT-4", 54)):
        good = sum(RATERS.published[c][model][x] for c in RATERS.published for x in "AB")
        assert good - both == 15
