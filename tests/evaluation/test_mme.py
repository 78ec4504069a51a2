"""MME: its 14 files of lines, the reading of answers, and its sums by hand."""

from pathlib import Path

import pytest
from PIL import Image

from megatron_owl2.errors import TaskError
from megatron_owl2.evaluation import benchmark, tables
from megatron_owl2.evaluation.benchmarks.mme import yes_or_no
from megatron_owl2.evaluation.registry import find_benchmarks

MME = find_benchmarks()["mme"]
PERCEPTION = [
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
]
COGNITION = ["commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"]


def task_file(folder: Path, task: str, *images: str, below: str = "", more: str = "") -> Path:
    lines = []
    for name in images:
        path = folder / "images" / task / below / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), "red").save(path)
        for thing, answer in (("tv", "Yes"), ('"radio"', "No")):
            question = f"Is there a {thing} in this image? Please answer yes or no."
            lines.append(f"{name}\t{question}\t{answer}{more}")
    file = folder / f"{task}.txt"
    file.write_text("\n".join(lines) + "\n")
    return file


def test_the_files_as_published(tmp_path):
    task_file(tmp_path, "existence", "0006.jpg", "0007.jpg", more="\tYes, there is.")
    task_file(tmp_path, "OCR", "0001.jpg", below="images")
    questions, gold = benchmark.read(MME, tmp_path)
    assert [q.id for q in questions] == [
        "OCR/0001.jpg/1",
        "OCR/0001.jpg/2",
        "existence/0006.jpg/1",
        "existence/0006.jpg/2",
        "existence/0007.jpg/1",
        "existence/0007.jpg/2",
    ]
    assert questions[0].images == (tmp_path / "images/OCR/images/0001.jpg",)
    assert questions[2].images == (tmp_path / "images/existence/0006.jpg",)
    assert [q.gold for q in questions[:2]] == ["yes", "no"] and list(gold) == [
        q.id for q in questions
    ]
    assert questions[3].prompt(MME.suffix) == (
        'USER: <|image|>Is there a "radio" in this image? \n'
        "Answer the question using a single word or phrase. ASSISTANT:"
    )
    assert len(benchmark.read(MME, tmp_path / "existence.txt")[0]) == 4


@pytest.mark.parametrize(
    ("name", "lines", "reason"),
    [
        ("other.txt", "1.jpg\ta\tYes\n", "other.txt is no task of MME; these are existence, count"),
        ("OCR.txt", "1.jpg\ta\n", "line 1 is .*, wanted image, question, answer between tabs"),
        ("OCR.txt", "1.jpg\ta\tmaybe\n", r"'answer' is 'maybe', wanted 'yes' or 'no' \(line 1\)"),
        ("OCR.txt", "\n1.jpg\t \tYes\n", r"'question' is ' ', wanted a text \(line 2\)"),
        ("OCR.txt", "1.jpg\ta\tYes\n", "OCR.txt: 1.jpg has 1 questions instead of 2"),
        ("OCR.txt", "../1.jpg\ta\tYes\n../1.jpg\tb\tNo\n", "no path in"),
    ],
)
def test_lines_that_cannot_be_asked_are_refused(tmp_path, name, lines, reason):
    (tmp_path / name).write_text(lines)
    with pytest.raises(TaskError, match=reason):
        benchmark.read(MME, tmp_path)


@pytest.mark.parametrize(
    ("text", "official", "lmms_eval"),
    [
        ("Yes", "yes", "yes"),
        ("NO.", "no", "no"),
        ("not so", "no", "no"),
        ("I know", "other", "other"),  # four characters are "i kn"
        ("know", "no", "no"),
        ("  yes", "other", "yes"),  # four characters are "  ye"
        ("Y", "other", "yes"),
        ("n.", "other", "no"),
        ("maybe", "other", "other"),
        ("", "other", "other"),
    ],
)
def test_answers_are_read_by_their_first_four_characters(text, official, lmms_eval):
    assert yes_or_no(text) == official
    gold = {"a": {"skill": "OCR", "image": "1", "answer": "yes"}}
    for answer in ("yes", "no"):
        gold["a"]["answer"] = answer
        right = benchmark.score(MME, {"a": text}, gold, "lmms_eval")["overall"]["accuracy"] == 100
        assert right == (lmms_eval == answer)


def rows(task: str, images: int) -> dict:
    return {
        f"{task}/{k}/{n}": {"skill": task, "image": str(k), "answer": answer}
        for k in range(images)
        for n, answer in ((1, "yes"), (2, "no"))
    }


def test_scores_by_hand():
    gold = {i: row for task in PERCEPTION for i, row in rows(task, 3).items()}
    said = dict.fromkeys(gold, "Yes")
    for i in gold:
        if i.startswith("count/0/") or i.startswith("count/1/"):
            said[i] = gold[i]["answer"]
    said["count/2/1"] = "Maybe"
    scores = benchmark.score(MME, said, gold)
    # Of count 4 of 6 answers are right, and both of two images of three.
    assert scores["skills"]["count"] == {
        "accuracy": 66.67,
        "majority": 50.0,
        "n": 6,
        "accuracy_plus": 66.67,
        "score": 133.33,
    }
    assert scores["skills"]["OCR"]["score"] == 50.0  # always yes: half of the questions, no image
    overall = scores["overall"]
    assert overall["perception"] == 583.33 and "cognition" not in overall
    assert (overall["other"], overall["n"], overall["accuracy_plus"]) == (1, 60, 6.67)
    for task in COGNITION:
        gold |= rows(task, 1)
    said |= {i: row["answer"] for i, row in gold.items() if row["skill"] in COGNITION}
    scores = benchmark.score(MME, said, gold)
    assert scores["overall"]["cognition"] == 800.0
    printed = tables.table(scores, MME.columns).splitlines()
    assert printed[0].split() == ["skill", "accuracy", "accuracy_plus", "score", "n"]
    assert printed[-2].split()[0] == "all" and printed[-2].split()[3] == "-"
    assert printed[-1] == "perception 583.33  cognition 800.00"
