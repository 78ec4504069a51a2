"""Multiple choice about images: published files to prompts, answers to options and scores."""

import json
import logging
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from benchmark_files import LETTER, TASKS, asked, draw, dump, marks, png

from megatron_owl2.errors import ScoreError, TaskError
from megatron_owl2.evaluation import benchmark, choices

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


def qbench(**changes) -> dict:
    row = {"img_path": "00001.jpg", "question": "Is it clear?", "candidates": ["Yes", "No"]}
    return row | {"correct_ans": "No", "type": 0, "concern": 0} | changes


def test_q_bench_in_both_forms(tmp_path):
    rows = [
        qbench(),
        qbench(candidates=["Dark", "Bright", "Fine"], correct_ans="Dark", type=2, concern=3),
        qbench(type=1, concern=0, candidates=["Blur", "No"]),
    ]
    dump(tmp_path / "llvisionqa_dev.json", rows)
    image = draw(tmp_path / "images/00001.jpg")
    questions, gold, prompts = asked("q_bench", tmp_path)
    assert prompts[0] == f"USER: <|image|>Is it clear?\nA. Yes\nB. No{LETTER}"
    assert {q.images for q in questions.values()} == {(image,)}
    expected = {
        "yes-or-no": (100.0, 1),
        "what": (0.0, 1),
        "how": (100.0, 1),
        "distortion": (50.0, 2),
        "in-context other": (100.0, 1),
        "all": (66.67, 3),
    }
    said = {0: "B.", 1: "It is dark", 2: "A"}
    assert marks("q_bench", said, gold) == expected
    name, content = TASKS["q_bench"].submission(said, gold)
    assert json.loads(content)[0] == {
        key: value for key, value in qbench(response="B.").items() if key != "correct_ans"
    }
    assert name == "q_bench.json"

    table = [
        {"id": i, "question": row["question"], "image": {"bytes": png("red"), "path": "x.jpg"}}
        | {f"option{n}": o for n, o in enumerate([*row["candidates"], "N/A", "N/A"][:4])}
        | {"question_type": row["type"], "question_concern": row["concern"]}
        | {"correct_choice": "BAB"[i]}
        for i, row in enumerate(rows)
    ]
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "dev.parquet")
    questions, gold, prompts_of_table = asked("q_bench", tmp_path / "dev.parquet")
    assert prompts_of_table == prompts and questions[2].images == (png("red"),)
    assert marks("q_bench", said, gold) == expected

    hidden = [{k: v for k, v in row.items() if k != "correct_ans"} for row in rows]
    dump(tmp_path / "llvisionqa_dev.json", hidden)
    assert not benchmark.has_answers(asked("q_bench", tmp_path)[1])
    dump(tmp_path / "llvisionqa_dev.json", [qbench(correct_ans="Maybe")])
    with pytest.raises(TaskError, match=r"row 0 \(from 0\), 'Maybe', is none of"):
        asked("q_bench", tmp_path)
    dump(tmp_path / "llvisionqa_dev.json", [qbench(concern=4)])
    with pytest.raises(TaskError, match="concern of row 0 .* is 4, not 0 to 3"):
        asked("q_bench", tmp_path)


def schema(uid: str) -> dict:
    options = {f"option {n}": text for n, text in enumerate(["cooks", "runs", "reads", "x", "y"])}
    return {"q_uid": uid, "question": "what?", "google_drive_id": "g", **options}


def test_egoschema_shows_the_frames_of_a_folder(tmp_path):
    file = dump(tmp_path / "questions.json", [schema("u1"), schema("u2"), schema("u3")])
    answers = dump(tmp_path / "subset_answers.json", {"u3": 2, "u1": 0})
    frames = [draw(tmp_path / f"images/u1/frame_{n}.png") for n in (9, 10)]
    draw(tmp_path / "images/u3/1.png")
    (tmp_path / "images/u1/notes.txt").write_text("no frame")
    questions, gold, prompts = asked("egoschema", tmp_path)
    assert list(questions) == ["u3", "u1"] and questions["u1"].images == tuple(frames)
    assert prompts["u1"] == (
        f"USER: <|image|><|image|>what?\nA. cooks\nB. runs\nC. reads\nD. x\nE. y{LETTER}"
    )
    said = {"u1": "A", "u3": "the person runs"}
    assert marks("egoschema", said, gold)["all"] == (50.0, 2)
    assert TASKS["egoschema"].submission(said | {"u1": "?"}, gold) == (
        "egoschema_subset.json",
        b'{"u3": 1, "u1": -1}',
    )
    draw(tmp_path / "images/u2/1.png")
    questions, gold = benchmark.read(TASKS["egoschema"], tmp_path, with_gold=False)
    assert [question.id for question in questions] == ["u1", "u2", "u3"]
    assert not benchmark.has_answers(gold)
    name, content = TASKS["egoschema"].submission(dict.fromkeys(gold, "B"), gold)
    assert (name, json.loads(content)) == ("egoschema.json", {"u1": 1, "u2": 1, "u3": 1})
    shutil.rmtree(tmp_path / "images/u2")
    for content, message in (
        ({"u9": 0}, f"'u9' has no question in {file}"),
        ({"u1": 5}, "'u1' is 5, not 0 to 4"),
        ({"u1": "a"}, r"a row is 'a', wanted a whole number \(entry 'u1'\)"),
    ):
        dump(answers, content)
        with pytest.raises(TaskError, match=message):
            asked("egoschema", tmp_path)
    answers.unlink()
    with pytest.raises(TaskError, match="images/u2 has no images; the frames of 'u2' go there"):
        asked("egoschema", tmp_path)
    draw(tmp_path / "images/u2/1.png")
    _, gold, _ = asked("egoschema", tmp_path)
    assert list(gold) == ["u1", "u2", "u3"] and not benchmark.has_answers(gold)
