"""Tasks without images: few-shot and zero-shot prompts, answers to options, means over subjects."""

import json

import pytest
from benchmark_files import TASKS, asked, dump, marks

from megatron_owl2.errors import TaskError
from megatron_owl2.evaluation import benchmark, scoring
from megatron_owl2.evaluation.math_answers import is_same, stated_answer


def lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_mean_of_skills_counts_each_alike():
    items = [(skill, {"answer": "A"}, said) for skill, said in zip("xxxxy", "AABBA", strict=True)]
    table = scoring.score_table(
        items, lambda row: row["answer"], lambda answer, row: float(answer == row["answer"]), True
    )
    assert table["overall"] == {
        "accuracy": 75.0,
        "majority": 100.0,
        "n": 5,
        "by_question": 60.0,
    }


def test_mmlu_shows_five_examples_of_the_subject(tmp_path):
    for subject, questions in {"world_religions": 3, "anatomy": 1}.items():
        for split, count in (("dev", 6), ("test", questions)):
            file = tmp_path / split / f"{subject}_{split}.csv"
            file.parent.mkdir(exist_ok=True)
            rows = [f'"{split} {n}, ""so""\nor?",w,x,,z,{"ABCD"[n % 4]}\n' for n in range(count)]
            file.write_text("".join(rows))
    questions, gold, prompts = asked("mmlu", tmp_path)
    assert list(questions) == ["anatomy/0", *(f"world religions/{n}" for n in range(3))]
    ask = "There is a single choice question about world religions. "
    ask += "Answer the question by replying A, B, C or D.\nQuestion: "
    options = '"so"\nor?\nA. w\nB. x\nC. \nD. z\nAnswer:'
    examples = [f"{ask}dev {n}, {options} {'ABCD'[n % 4]}\n\n" for n in range(5)]
    assert prompts["world religions/1"] == (
        f"USER: {''.join(examples)}{ask}test 1, {options} ASSISTANT:"
    )
    said = ["A", "The answer is B.", "B", "C. because"]
    assert marks("mmlu", dict(zip(gold, said, strict=True)), gold) == {
        "anatomy": (100.0, 1),
        "world religions": (66.67, 3),
        "all": (83.33, 4),
    }
    (tmp_path / "dev/anatomy_dev.csv").write_text("q,1,2,3,4,A\n" * 4)
    with pytest.raises(TaskError, match=r"anatomy_dev.csv has 4 examples; 5 are shown"):
        asked("mmlu", tmp_path)
    (tmp_path / "test/anatomy_test.csv").write_text("q,1,2,3,4,E\n")
    with pytest.raises(TaskError, match="line 1 must be a question, four options and"):
        asked("mmlu", tmp_path)
    (tmp_path / "test/anatomy_test.csv").write_text('"q,1,2,3,4,A\n')
    with pytest.raises(TaskError, match="anatomy_test.csv cannot be read as a table"):
        asked("mmlu", tmp_path)


BBH = {
    "boolean_expressions": ["True"],
    "date_understanding": ["(A)", "(C)"],
}


def test_bbh_is_a_mean_over_its_tasks(tmp_path):
    for name, targets in BBH.items():
        examples = [{"input": f"what {n}?", "target": t} for n, t in enumerate(targets)]
        dump(tmp_path / f"{name}.json", {"canary": "x", "examples": examples})
    questions, gold, prompts = asked("bbh", tmp_path)
    assert prompts["date_understanding/1"] == (
        "USER: Question: what 1?\n You must give your final answer by starting with "
        "'So the answer is' ASSISTANT:"
    )
    said = ["So the answer is True.", "(A)", "So the answer is (C)."]
    predictions = dict(zip(gold, said, strict=True))
    expected = {"opencompass": (100.0, 100.0), "direct": (0.0, 50.0), "cot": (100.0, 100.0)}
    for variant, (free, choice) in expected.items():
        assert marks("bbh", predictions, gold, variant) == {
            "boolean_expressions": (free, 1),
            "date_understanding": (choice, 2),
            "all": ((free + choice) / 2, 3),
        }
    assert benchmark.read(TASKS["bbh"], tmp_path / "date_understanding.json")[1].keys() == {
        "date_understanding/0",
        "date_understanding/1",
    }
    dump(tmp_path / "navigate.json", {"examples": [{"input": "x"}]})
    with pytest.raises(TaskError, match=r"navigate.json .* 'target' is missing"):
        asked("bbh", tmp_path)


@pytest.mark.parametrize(
    ("answer", "free", "choice"),
    [
        ("valid", True, False),
        ("It is so. The answer is valid.", True, False),
        ("The answer is **valid** here", True, False),
        ("answer is valid\nTruly", True, False),
        ("the answer is (B", False, True),
        ("the answer is B", False, True),
        ("B because the answer is A", False, False),
        ("answer is B answer is A", False, True),  # the first one
    ],
)
def test_bbh_reads_what_opencompass_reads(answer, free, choice):
    gold = {
        "f": {"answer": "valid", "skill": "f", "is_choice": False},
        "c": {"answer": "(B)", "skill": "c", "is_choice": True},
    }
    skills = benchmark.score(TASKS["bbh"], dict.fromkeys(gold, answer), gold)["skills"]
    assert (skills["f"]["accuracy"], skills["c"]["accuracy"]) == (100.0 * free, 100.0 * choice)


def exam(**changes) -> dict:
    row = {"passage": None, "question": "q?", "options": ["(A)x", "(B)y", "(C)z"], "label": "B"}
    return row | {"answer": None, "other": None} | changes


def test_agieval_asks_and_reads_each_kind_of_set(tmp_path):
    rows = {
        "sat-en": exam(passage="p. "),
        "logiqa-zh": exam(options=["(A)x (B)y"], label="A"),
        "jec-qa-kd": exam(label=["C", "A"]),
        "math": exam(options=None, label=None, answer="\\frac{1}{2}"),
        "gaokao-mathcloze": exam(options=None, label=None, answer="-3"),
    }
    for name, row in rows.items():
        lines(tmp_path / f"{name}.jsonl", [row])
    questions, gold, _ = asked("agieval", tmp_path)
    assert {q.skill: q.text for q in questions.values()} == {
        "sat-en": "p. Q: q? Answer Choices: (A)x (B)y (C)z\nA: Among A through C, the answer is",
        "logiqa-zh": "问题：q? 选项：(A)x (B)y\n答案：从A到D, 我们应选择",
        "jec-qa-kd": "问题：q? 选项：(A)x (B)y (C)z\n答案：从A到C, 我们应选择",
        "math": "Q: q?\nA: The answer is",
        "gaokao-mathcloze": "问题：q?\n答案：",
    }
    said = {
        "sat-en/0": "(B), as said by C",
        "logiqa-zh/0": "BA",
        "jec-qa-kd/0": "(A)(C)",
        "math/0": "we get $x = 1/2$.",
        "gaokao-mathcloze/0": "答案是 3",
    }
    scored = marks("agieval", said, gold)
    assert [scored[name][0] for name in rows] == [100.0, 0.0, 100.0, 100.0, 0.0]
    assert scored["all"] == (60.0, 5)
    lines(tmp_path / "sat-en.jsonl", [exam(label=None)])
    with pytest.raises(TaskError, match=r"sat-en.jsonl: a row has no answer .*\(line 1\)"):
        asked("agieval", tmp_path)
    lines(tmp_path / "other.jsonl", [exam()])
    with pytest.raises(TaskError, match="other.jsonl is none of AGIEval's sets"):
        asked("agieval", tmp_path)


@pytest.mark.parametrize(
    ("text", "stated"),
    [
        ("so \\boxed{x = \\frac{1}{2}} or", "\\frac{1}{2}"),
        ("\\boxed{1} and \\boxed{2}", "2"),
        ("\\boxed{1", ""),
        ("$a$\nthen $y = 3$", "3"),
        ("x = 2, thus y = 4.", "4"),
        ("about 3 or 4.5 m", "4.5"),
        ("The answer is therefore 7 of 8", "8"),
        ("nothing", ""),
    ],
)
def test_an_answer_is_found_in_a_text(text, stated):
    assert stated_answer(text) == stated


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("1/2", "\\frac{1}{2}", True),
        ("0.5", "\\frac12", True),
        (".5", "\\dfrac{1}{2}", True),
        ("\\frac1{72}", "\\frac{1}{72}", True),
        ("\\sqrt3", "\\sqrt{3}", True),
        ("k = 4", "4", True),
        ("\\left( 1, 2 \\right)", "(1,2)", True),
        ("90^\\circ", "90", True),
        ("5\\text{ cm}", "5", True),
        ("50\\%", "50", True),
        ("abc = 4", "4", False),
        ("2/4", "1/2", False),  # nothing is calculated
        ("1.0", "1", False),
        ("", "0", False),
    ],
)
def test_answers_have_one_normal_form(one, other, same):
    assert is_same(one, other) is same


def test_arc_in_both_forms(tmp_path):
    options = [{"text": t, "label": x} for t, x in zip(["a", "b", "c"], "123", strict=True)]
    stem = {"stem": "why?", "choices": options}
    rows = [{"id": "M_1", "question": stem, "answerKey": "2"}]
    file = lines(tmp_path / "ARC-Challenge-Test.jsonl", rows)
    questions, gold, prompts = asked("arc", tmp_path)
    assert prompts == {"M_1": "USER: Question: why?\nA. a\nB. b\nC. c\nAnswer: ASSISTANT:"}
    assert marks("arc", {"M_1": "B. b"}, gold) == {"ARC-Challenge": (100.0, 1), "all": (100.0, 1)}
    flat = {"text": ["a", "b", "c"], "label": ["1", "2", "3"]}
    lines(file, [{"id": "M_1", "question": "why?", "choices": flat, "answerKey": "2"}])
    assert asked("arc", tmp_path)[1:] == (gold, prompts)
    lines(file, [{"id": "M_1", "question": "why?", "choices": flat, "answerKey": "B"}])
    with pytest.raises(TaskError, match="'M_1' is 'B', its options are labelled 1, 2, 3"):
        asked("arc", tmp_path)
    lines(file, [{"id": "M_1", "question": {"stem": "why?"}, "answerKey": "B"}])
    with pytest.raises(TaskError, match=r"'question.choices' is missing"):
        asked("arc", tmp_path)
