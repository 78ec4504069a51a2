"""HallusionBench: accuracies per question, per question over its figures, and per figure."""

import json

import pytest
from benchmark_files import TASKS, asked, draw, dump

from megatron_owl2.errors import TaskError
from megatron_owl2.evaluation import benchmark


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
        name: [row[column] for column in ("accuracy", "qAcc", "fAcc", "n", "unresolved")]
        for name, row in (table["skills"] | {"all": table["overall"]}).items()
    }
    assert shown == {
        "VD": [75.0, 50.0, 50.0, 4, 0],
        "VD chart": [75.0, 50.0, 50.0, 4, 0],
        "VS": [50.0, 0.0, 0.0, 2, 2],
        "VS chart": [50.0, 0.0, 0.0, 2, 2],
        "all": [66.67, 33.33, 33.33, 6, 2],
    }
    # Easy: q0 and q1 of VD and q0 of VS; hard: the same of figure 1, of which q0 of VD is right.
    assert (table["overall"]["easy"], table["overall"]["hard"]) == (100.0, 33.33)
    assert (table["skills"]["VD"]["easy"], table["skills"]["VD"]["hard"]) == (100.0, 50.0)
    replies = ["correct", "Correct.", "incorrect", "correct", "unclear", "correct"]
    judged = dict(zip(gold, replies, strict=True))
    overall = benchmark.score(TASKS["hallusionbench"], judged, gold, "judged")["overall"]
    assert [overall[x] for x in ("accuracy", "qAcc", "fAcc", "unresolved")] == [
        83.33,
        66.67,
        66.67,
        1,
    ]
    name, content = TASKS["hallusionbench"].submission(predictions, gold)
    assert name == "HallusionBench_result.json"
    row = hallusion_rows()[4] | {"model_prediction": "I do not know"}
    assert json.loads(content)[4] == row
    odd = {i: row | {"sample_note": "\ud800"} for i, row in gold.items()}
    _, content = TASKS["hallusionbench"].submission(predictions, odd)
    assert json.loads(content)[0]["sample_note"] == "\ud800"
    dump(file, [figure("VD", 0, 0, 2)])
    with pytest.raises(TaskError, match="'gt_answer' is 2, wanted 0 or 1"):
        asked("hallusionbench", tmp_path)
