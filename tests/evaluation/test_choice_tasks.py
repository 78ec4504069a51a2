"""Multiple choice about images: published files to prompts, answers to options and scores."""

import json
import logging
from pathlib import Path

import pytest
from PIL import Image

from megatron_owl2.errors import ScoreError, TaskError
from megatron_owl2.evaluation import benchmark, choices
from megatron_owl2.evaluation.registry import find_benchmarks

TASKS = find_benchmarks()
LETTER = "\nAnswer with the option’s letter from the given choices directly. ASSISTANT:"


def draw(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), "red").save(path, "PNG")
    return path


def dump(path: Path, content) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def asked(task: str, data: Path):
    """Questions by id, gold, and prompts by id."""
    questions, gold = benchmark.read(TASKS[task], data)
    prompts = {q.id: q.prompt(TASKS[task].suffix) for q in questions}
    return {q.id: q for q in questions}, gold, prompts


def marks(task: str, predictions: dict, gold: dict, variant: str | None = None) -> dict:
    """{skill: (accuracy, n)}, with "all" for the total."""
    table = benchmark.score(TASKS[task], predictions, gold, variant)
    rows = table["skills"] | {"all": table["overall"]}
    return {name: (row["accuracy"], row["n"]) for name, row in rows.items()}


ABCD = {"options": ["a red owl", "an owl", "no bird", "a bird"]}


@pytest.mark.parametrize(
    ("answer", "first", "whole", "letter_or_text", "stated"),
    [
        ("B", "B", "B", "B", "B"),
        (" B", "B", "", "B", "B"),
        ("B.", "B", "", "B", "B"),
        ("B. an owl", "B", "", "B", "B"),
        ("(B)", "", "", "B", "B"),
        ("b", "", "", "", ""),
        ("E", "", "", "", ""),
        ("B or C", "B", "", "", ""),
        ("no bird", "", "", "C", ""),
        ("There is no bird here", "", "", "C", ""),
        ("A red owl", "A", "", "A", ""),  # the second has the word A, the fourth an article
        ("The answer is D, not A", "", "", "", "D"),
        ("Dogs", "D", "", "", ""),
        ("", "", "", "", ""),
        ("An owl", "A", "", "B", ""),
        ("an owl " * 9, "", "", "", ""),  # longer than twice the options
    ],
)
def test_an_answer_is_read_as_an_option_or_as_none(answer, first, whole, letter_or_text, stated):
    assert choices.first_character(answer, ABCD) == first
    assert choices.whole_answer(answer, ABCD) == whole
    assert choices.letter_or_text(answer, ABCD) == letter_or_text
    assert choices.stated_letter(answer, ABCD) == stated


def test_more_options_than_letters_are_refused():
    with pytest.raises(TaskError, match="11 options; at most 10"):
        choices.show("which?", ["x"] * 11)


def science(**changes) -> dict:
    row = {"question": "which?", "choices": ["red", "blue", "green"], "answer": 1, "hint": "look"}
    row |= {"image": "image.png", "subject": "natural science", "split": "test", "grade": "grade4"}
    return row | changes


def test_scienceqa_asks_test_questions_with_an_image(tmp_path):
    problems = {
        "4": science(),
        "5": science(image=None),
        "6": science(split="train"),
        "9": science(hint="", subject="social science", choices=["no", "yes"]),
    }
    file = dump(tmp_path / "problems.json", problems)
    first = draw(tmp_path / "images/test/4/image.png")
    second = draw(tmp_path / "images/9/image.png")
    questions, gold, prompts = asked("scienceqa", tmp_path)
    assert {i: q.images for i, q in questions.items()} == {"4": (first,), "9": (second,)}
    assert prompts["4"] == (f"USER: <|image|>Hint: look\nwhich?\nA. red\nB. blue\nC. green{LETTER}")
    assert prompts["9"] == f"USER: <|image|>which?\nA. no\nB. yes{LETTER}"
    assert marks("scienceqa", {"4": "B", "9": "C"}, gold) == {
        "natural science": (100.0, 1),
        "social science": (0.0, 1),
        "all": (50.0, 2),
    }
    file.write_text(json.dumps({"4": science(answer=3)}))
    with pytest.raises(TaskError, match="problem '4' is 3, but it has 3 choices"):
        asked("scienceqa", tmp_path)
    file.write_text(json.dumps({"4": {"question": "which?"}}))
    with pytest.raises(TaskError, match=r"'choices' is missing; .* \(entry '4'\)"):
        asked("scienceqa", tmp_path)


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("B", True),
        ("B. blue", True),
        ("The answer is B.", True),
        ("So: The answer is B, blue", True),  # any character may follow the letter
        ("The answer is B", False),
        ("The answer is B. The answer is B.", False),  # not the only one
        ("b", False),
        ("(B)", False),
        ("blue", False),
        ("B ", False),
    ],
)
def test_scienceqa_reads_what_llava_reads(answer, right):
    row = {"options": ["red", "blue"], "answer": "B", "skill": "x"}
    table = benchmark.score(TASKS["scienceqa"], {"4": answer}, {"4": row})
    assert table["overall"]["accuracy"] == 100.0 * right
    assert table["overall"]["unresolved"] == int(not right)


def seed(number: int, kind: int, answer: str, **changes) -> dict:
    texts = dict(zip(["choice_a", "choice_b", "choice_c", "choice_d"], "wxyz", strict=True))
    row = {"question_id": str(number), "question": "which?", "answer": answer, **texts}
    row |= {"data_type": "image", "data_id": "1454426_2591111986", "question_type_id": kind}
    return row | changes


def test_seed_bench_asks_about_images_and_counts_videos(tmp_path, caplog):
    video = seed(4, 10, "A", data_type="video", data_id="1.webm", segment=[0, 2])
    rows = [seed(1, 1, "A"), seed(2, 1, "B"), seed(3, 5, "D"), video]
    content = {"question_type": {"Scene Understanding": 1, "Instances Counting": 5}}
    file = dump(tmp_path / "SEED-Bench.json", content | {"questions": rows})
    image = draw(tmp_path / "images/1454426_2591111986")
    with caplog.at_level(logging.WARNING):
        questions, gold, prompts = asked("seed_bench", tmp_path)
    assert f"1 questions of {file} are on videos and are not asked" in caplog.text
    assert list(questions) == ["1", "2", "3"] and questions["1"].images == (image,)
    assert prompts["1"] == f"USER: <|image|>which?\nA. w\nB. x\nC. y\nD. z{LETTER}"
    said = {"1": "A. w", "2": "B", "3": "C"}
    assert marks("seed_bench", said, gold) == {
        "Instances Counting": (0.0, 1),
        "Scene Understanding": (100.0, 2),
        "all": (66.67, 3),
    }
    assert marks("seed_bench", said, gold, "whole_answer")["all"] == (33.33, 3)
    name, lines = TASKS["seed_bench"].submission(said, gold)
    assert name == "seed_bench.jsonl"
    assert json.loads(lines.splitlines()[0]) == {"question_id": "1", "prediction": "A"}
    _, hidden = benchmark.read(TASKS["seed_bench"], tmp_path, with_gold=False)
    assert not benchmark.has_answers(hidden) and hidden["1"]["options"] == list("wxyz")
    with pytest.raises(ScoreError, match="3 of 3 questions have no published answer"):
        benchmark.score(TASKS["seed_bench"], said, hidden)
    dump(file, {"questions": [seed(1, 1, "A"), seed(1, 2, "B")]})
    with pytest.raises(TaskError, match="repeat a question_id, such as '1'"):
        asked("seed_bench", tmp_path)
    dump(file, {"questions": [seed(1, 1, "E")]})
    with pytest.raises(TaskError, match="'answer' is 'E', wanted 'a' or 'b'"):
        asked("seed_bench", tmp_path)
