"""A damaged line in each format of benchmark files, told with the file and the line."""

import json

import pytest
import tool
from benchmark_files import TASKS, dump, mmbench_rows, write_tsv

from megatron_owl2.errors import TaskError
from megatron_owl2.evaluation import benchmark

POPE = {"question_id": 1, "image": "1.jpg", "text": "is it?", "label": "yes"}
CSV = 'what?,a,b,c,d,A\n"two\nlines?",a,b,c,d,B\n'
MME = "1.jpg\tis it?\tYes\n1.jpg\tis it?\tNo\n"


def lines(*rows: dict) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize(
    ("task", "name", "data", "told"),
    [
        ("pope", "pope_x.json", lines(POPE) + '{"question_id": 2\n', r"line 2: Expecting"),
        ("pope", "pope_x.json", lines(POPE, {**POPE, "label": 3}), r"'label' is 3.*\(line 2\)"),
        ("pope", "pope_x.json", lines(POPE, POPE), r"such as 1 \(line 1 and line 2\)"),
        ("pope", "pope_x.json", json.dumps([POPE, POPE]), r"such as 1 \(entry 1 and entry 2\)"),
        ("pope", "pope_x.json", b'[\n{"label": "caf\xe9"}]', r"not text in UTF-8 \(line 2\)"),
        ("pope", "pope_x.json", b'{}\n{"label": "caf\xe9"}', r"line 2: it is not text in UTF-8"),
        ("pope", "pope_x.json", '[\n{"a": 1},\n{"a" 2}]', r"line 3 column 6"),
        ("vqav2", "annotations.json", '{"annotations": [{}]}', r"entry 1 of 'annotations'"),
        ("gqa", "questions.json", '{"7": {"answer": ""}}', r"'answer' is ''.*\(entry '7'\)"),
        ("mme", "count.txt", MME + "1.jpg\tis it?\tMaybe\n", r"'answer' is 'Maybe'.*\(line 3\)"),
        ("mme", "count.txt", MME + "2.jpg\tis it?\tYes\n", r"2.jpg has 1 questions .*\(line 3\)"),
        ("mme", "count.txt", MME + "x\n", r"line 3 is 'x', wanted image, question, answer"),
        ("mme", "count.txt", MME.encode() + b"\xe9\n", r"it is not UTF-8 \(line 3\)"),
        ("mmlu", "a_test.csv", CSV + "what?,a,b,c,d,E\n", r"line 4 must be a question"),
        ("mmlu", "a_test.csv", CSV + "what?,a,b,c,A\n", r"line 4 must be a question"),
        ("mmlu", "a_test.csv", CSV + '"open,a,b,c,d,A\n', r"as a table: .* \(line 4\)"),
        ("mmlu", "a_test.csv", CSV.encode() + b"caf\xe9,", r"it is not UTF-8 \(line 4\)"),
        ("arc", "ARC-x.jsonl", lines({"id": "1"}), r"'question' is missing.*\(line 1\)"),
        (
            "arc",
            "ARC-x.jsonl",
            lines({"id": "1", "question": "q?", "answerKey": "C", "choices": None}),
            r"the answer of question '1' is 'C', .* \(line 1\)",
        ),
    ],
)
def test_a_damaged_line_is_named(tmp_path, task, name, data, told):
    file = tmp_path / name
    file.write_bytes(data.encode() if isinstance(data, str) else data)
    with pytest.raises(TaskError, match=told) as error:
        benchmark.read_gold(TASKS[task], file)
    assert str(file) in str(error.value)


def test_rows_of_a_table_are_named_by_the_line_where_they_begin(tmp_path):
    rows = mmbench_rows()  # the first has a line end in its question
    assert rows[1]["index"] == 8
    for change, told in (
        ({"answer": "X"}, r"'answer' is 'X'.* \(line 4\)"),
        ({"answer": "D"}, r"index 8 has the answer D, which is no option of it \(line 4\)"),
        ({"A": ""}, r"index 8 must have options from A on; .* \(line 4\)"),
        ({"index": 7}, r"rows repeat a index, such as 7 \(line 2 and line 4\)"),
    ):
        file = write_tsv(tmp_path / "mmbench.tsv", [rows[0], rows[1] | change])
        with pytest.raises(TaskError, match=told):
            benchmark.read_gold(TASKS["mmbench"], file)
    cut = file.read_bytes().rsplit(b"\t", 1)[0]
    file.write_bytes(cut + b"\n")
    with pytest.raises(TaskError, match=r"mmbench.tsv: line 4 has \d+ fields of \d+"):
        benchmark.read_gold(TASKS["mmbench"], file)


def test_predictions_that_come_twice_are_named_with_their_lines(tmp_path):
    file = tmp_path / "said.jsonl"
    rows = [{"question_id": n, "answer": "yes"} for n in (1, 2, 1, 3)]
    file.write_text(lines(*rows))
    with pytest.raises(TaskError, match=r"said.jsonl: .* such as 1 \(line 1 and line 3\)"):
        benchmark.read_predictions(TASKS["pope"], file)


def test_missing_predictions_can_count_as_wrong(tmp_path):
    gold = [POPE | {"question_id": n, "label": ("yes", "no")[n % 2]} for n in range(4)]
    gold = dump(tmp_path / "coco_pope_x.json", gold)
    said = dump(tmp_path / "said.json", [{"question_id": 0, "answer": "yes"}])
    command = ("evaluate", "score", "--task", "pope", "--predictions", said, "--gold", gold)
    done = tool.run(*command)
    assert (
        done.returncode == 2
        and "3 of 4 gold questions have no prediction: 1, 2, 3; " in done.stderr
    )
    done = tool.run(*command, "--missing", "wrong")
    written = json.loads(done.stdout)
    assert written["missing"] == 3
    overall = written["overall"]
    # An empty answer is a yes by POPE's rule; what is missing is wrong all the same.
    assert (overall["accuracy"], overall["n"]) == (25.0, 4)
    assert (overall["recall"], overall["yes_ratio"]) == (50.0, 75.0)


@pytest.mark.parametrize(
    "task", ["vqav2", "gqa", "caption", "mmvet", "mmhal_bench", "coco_caption"]
)
def test_missing_predictions_are_empty_answers(task):
    rows = {
        "vqav2": {"answers": ["red"] * 10, "skill": "s", "majority": "red"},
        "gqa": {"answer": "red", "types": {"structural": "s"}},
        "caption": {"answers": ["red"], "skill": "s"},
        "mmvet": {"answer": None, "reference": "x", "capability": ["ocr"]},
        "mmhal_bench": {"answer": None, "question_type": "other"},
        "coco_caption": {"answers": ["a red cat"], "skill": "s"},
    }
    gold = {1: rows[task], 2: rows[task]}
    said, count = benchmark.with_missing_wrong(TASKS[task], {"1": "red"}, gold)
    assert said == {1: "red", 2: ""} and count == 1
    assert benchmark.score(TASKS[task], said, gold)["overall"]["n"] == 2
