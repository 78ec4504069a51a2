"""Multiple choice about images: published files to prompts, answers to options and scores."""

import base64
import csv
import io
import json
import logging
import zipfile
from pathlib import Path
from xml.etree import ElementTree

import pyarrow as pa
import pyarrow.parquet as pq
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


def png(color: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (40, 40), color).save(file, "PNG")
    return file.getvalue()


def write_tsv(path: Path, rows: list[dict], delimiter: str = "\t") -> Path:
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names, delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def mmbench_rows() -> list[dict]:
    """Question 7 in two passes and question 8, of three options, in three."""
    red, blue = (base64.b64encode(png(color)).decode() for color in ("red", "blue"))
    shown = {"source": "x", "comment": "", "split": "dev"}
    seven = shown | {"question": 'is it\n"red"?', "hint": "look", "category": "color"}
    seven |= {"l2-category": "coarse_perception", "C": "", "D": ""}
    eight = shown | {"question": "which?", "hint": "", "category": "logic", "D": ""}
    eight |= {"l2-category": "logic_reasoning"}
    return [
        seven | {"index": 7, "A": "yes", "B": "no", "answer": "A", "image": red},
        eight | {"index": 8, "A": "x", "B": "y", "C": "z", "answer": "C", "image": blue},
        seven | {"index": 1000007, "A": "no", "B": "yes", "answer": "B", "image": "7"},
        eight | {"index": 1000008, "A": "y", "B": "z", "C": "x", "answer": "B", "image": blue},
        eight | {"index": 2000008, "A": "z", "B": "x", "C": "y", "answer": "A", "image": "8"},
    ]


def test_mmbench_is_right_if_every_pass_is(tmp_path):
    write_tsv(tmp_path / "mmbench_dev_20230712.tsv", mmbench_rows())
    questions, gold, prompts = asked("mmbench", tmp_path)
    assert prompts[7] == f'USER: <|image|>look\nis it\n"red"?\nA. yes\nB. no{LETTER}'
    assert prompts[1000008] == f"USER: <|image|>N/A\nwhich?\nA. y\nB. z\nC. x{LETTER}"
    assert [q.images for q in questions.values()] == [
        (png(color),) for color in ("red", "blue", "red", "blue", "blue")
    ]
    right = {7: "A", 8: "C. z", 1000007: "yes", 1000008: "(B)", 2000008: "z"}
    assert marks("mmbench", right, gold) == {
        "CP": (100.0, 1),
        "LR": (100.0, 1),
        "color": (100.0, 1),
        "logic": (100.0, 1),
        "all": (100.0, 2),
    }
    table = benchmark.score(TASKS["mmbench"], right | {2000008: "I cannot see it"}, gold)
    assert table["overall"]["accuracy"] == 50.0 and table["overall"]["unresolved"] == 1
    assert table["overall"]["vanilla"] == table["skills"]["LR"]["vanilla"] == 100.0
    assert table["skills"]["LR"]["accuracy"] == 0.0
    # One letter for all is right in the first passes only.
    assert benchmark.score(TASKS["mmbench"], dict.fromkeys(gold, "A"), gold)["overall"] == {
        "accuracy": 0.0,
        "majority": 0.0,
        "n": 2,
        "vanilla": 50.0,
        "unresolved": 0,
    }


def test_mmbench_without_answers_becomes_the_servers_spreadsheet(tmp_path):
    rows = [{k: v for k, v in row.items() if k != "answer"} for row in mmbench_rows()]
    rows[0]["question"] = "<a> & \x0bb?"
    write_tsv(tmp_path / "mmbench_test_20230712.tsv", rows)
    questions, gold, _ = asked("mmbench", tmp_path)
    assert not benchmark.has_answers(gold) and questions[7].gold is None
    name, content = TASKS["mmbench"].submission({i: f"{i}!" for i in gold}, gold)
    assert name == "mmbench.xlsx"
    sheet = zipfile.ZipFile(io.BytesIO(content)).read("xl/worksheets/sheet1.xml")
    space = "{http://schemas.openxmlformats.org/spreadsheetml/2006/main}"
    cells = [
        ["".join(cell.itertext()) for cell in row]
        for row in ElementTree.fromstring(sheet).iter(f"{space}row")
    ]
    assert cells[0] == ["index", "question", "A", "B", "C", "D", "prediction"]
    assert cells[1] == ["7", "<a> & b?", "yes", "no", "", "", "7!"]
    assert cells[2] == ["8", "which?", "x", "y", "z", "", "8!"] and len(cells) == 6


@pytest.mark.parametrize(
    ("row", "change", "message"),
    [
        (0, {"answer": "C"}, "index 7 has the answer C, which is no option"),
        (1, {"B": ""}, "index 8 must have options from A on"),
        (2, {"image": "6"}, r"'image' holds no image, .* \(index 1000007\)"),
        (4, {"index": 8}, "repeat a index, such as 8"),
        (0, {"question": ""}, r"'question' is None, wanted a text \(row 1\)"),
    ],
)
def test_mmbench_names_what_is_wrong(tmp_path, row, change, message):
    rows = mmbench_rows()
    rows[row] |= change
    write_tsv(tmp_path / "MMBench_DEV_EN.tsv", rows)
    with pytest.raises(TaskError, match=message):
        asked("mmbench", tmp_path)


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


def figure(category: str, number: int, question: int, answer: int, **changes) -> dict:
    row = {"category": category, "subcategory": "chart", "set_id": "3", "figure_id": str(number)}
    row |= {"question_id": str(question), "question": f"q{question}?", "gt_answer": str(answer)}
    row |= {"visual_input": "1", "gt_answer_details": "so", "sample_note": "note"}
    row |= {"filename": f"./hallusion_bench/{category}/chart/3_{number}.png"}
    return row | changes


def hallusion_rows() -> list[dict]:
    return [
        figure("VD", 0, 0, 1),
        figure("VD", 0, 1, 0),
        figure("VD", 1, 0, 0),
        figure("VD", 1, 1, 1),
        figure("VS", 0, 0, 1, visual_input="0", filename=None),
        figure("VS", 1, 0, 0),
    ]


def test_hallusionbench_counts_questions_over_figures_and_figures_over_questions(tmp_path):
    file = dump(tmp_path / "HallusionBench.json", hallusion_rows())
    below = draw(tmp_path / "images/hallusion_bench/VD/chart/3_0.png")
    flat = [draw(tmp_path / f"images/{x}/chart/3_1.png") for x in ("VD", "VS")]
    questions, gold, prompts = asked("hallusionbench", tmp_path)
    assert [q.images for q in questions.values()] == [
        (below,), (below,), (flat[0],), (flat[0],), (), (flat[1],)
    ]  # fmt: skip
    assert prompts["VD_chart_3_1_0"] == "USER: <|image|>q0? ASSISTANT:"
    assert prompts["VS_chart_3_0_0"] == "USER: q0? ASSISTANT:"
    # The last of VD is wrong, and the question without a figure is not answered, which is right.
    said = ["Yes.", "no", "No, it is not", "no", "I do not know", "yes and no"]
    predictions = dict(zip(gold, said, strict=True))
    table = benchmark.score(TASKS["hallusionbench"], predictions, gold)
    shown = {
        name: [row[column] for column in ("accuracy", "qAcc", "fAcc", "n", "unclear")]
        for name, row in (table["skills"] | {"all": table["overall"]}).items()
    }
    assert shown == {
        "VD": [75.0, 50.0, 50.0, 4, 0],
        "VD chart": [75.0, 50.0, 50.0, 4, 0],
        "VS": [50.0, 0.0, 0.0, 2, 2],
        "VS chart": [50.0, 0.0, 0.0, 2, 2],
        "all": [66.67, 33.33, 33.33, 6, 2],
    }
    replies = ["correct", "Correct.", "incorrect", "correct", "unclear", "correct"]
    judged = dict(zip(gold, replies, strict=True))
    overall = benchmark.score(TASKS["hallusionbench"], judged, gold, "judged")["overall"]
    assert [overall[x] for x in ("accuracy", "qAcc", "fAcc", "unclear")] == [83.33, 66.67, 66.67, 1]
    name, content = TASKS["hallusionbench"].submission(predictions, gold)
    assert name == "HallusionBench_result.json"
    row = hallusion_rows()[4] | {"model_prediction": "I do not know"}
    assert json.loads(content)[4] == row
    dump(file, [figure("VD", 0, 0, 2)])
    with pytest.raises(TaskError, match="'gt_answer' is 2, wanted 0 or 1"):
        asked("hallusionbench", tmp_path)


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
        "egoschema.json",
        b'{"u3": 1, "u1": -1}',
    )
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
