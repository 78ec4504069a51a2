"""MM-Vet and MMHal-Bench: files as published, files for their judges, and scores of replies."""

import json
from pathlib import Path

import pytest
from PIL import Image

from megatron_owl2.errors import ScoreError
from megatron_owl2.evaluation import benchmark
from megatron_owl2.evaluation.benchmarks.mmhal_bench import rating
from megatron_owl2.evaluation.benchmarks.mmvet import grade
from megatron_owl2.evaluation.registry import find_benchmarks

VET, HAL = (find_benchmarks()[name] for name in ("mmvet", "mmhal_bench"))


def image(folder: Path, name: str) -> Path:
    (folder / "images").mkdir(exist_ok=True)
    Image.new("RGB", (8, 8), "red").save(folder / "images" / name)
    return folder / "images" / name


def test_mmvet(tmp_path):
    rows = {
        f"v1_{k}": {
            "imagename": "v1_0.png",
            "question": "What is x in the equation?",
            "answer": "-1<AND>-5",
            "imagesource": "https://example.com",
            "capability": needed,
        }
        for k, needed in enumerate((["ocr", "math"], ["ocr"], ["rec"]))
    }
    (tmp_path / "mm-vet.json").write_text(json.dumps(rows))
    path = image(tmp_path, "v1_0.png")
    questions, gold = benchmark.read(VET, tmp_path)
    first = questions[0]
    assert (first.id, first.images, first.skill) == ("v1_0", (path,), "ocr, math")
    assert first.gold == "-1<AND>-5" and not benchmark.has_answers(gold)
    assert first.prompt(VET.suffix).endswith("equation?\nAnswer the question directly. ASSISTANT:")
    answers = {"v1_0": "x = -1", "v1_1": "é", "v1_2": ""}
    name, content = VET.submission(answers, gold)
    assert name == "mm-vet.json" and json.loads(content) == answers
    replies = {"v1_0": "0.5", "v1_1": "1.0 as it is right", "v1_2": "I cannot say"}
    scores = benchmark.score(VET, replies, gold)
    assert scores["overall"] == {"score": 50.0, "unreadable": 1, "n": 3}
    assert scores["skills"] == {
        "math": {"score": 50.0, "unreadable": 0, "n": 1},
        "ocr": {"score": 75.0, "unreadable": 0, "n": 2},
        "rec": {"score": 0.0, "unreadable": 1, "n": 1},
    }
    with pytest.raises(ScoreError, match="2 of 3 gold questions have no prediction"):
        benchmark.score(VET, {"v1_0": "1"}, gold)


@pytest.mark.parametrize(
    ("reply", "value"),
    [("0.0", 0), (" 1\n", 1), (".3", 0.3), ("1.5", None), ("-0.5", None), ("5/10", None)],
)
def test_a_grade_is_from_0_to_1(reply, value):
    assert grade(reply) == value


def test_mmhal_bench(tmp_path):
    rows = [
        {
            "question_type": kind,
            "question_topic": "indoor",
            "image_id": f"id{k}",
            "image_src": f"https://c1.staticflickr.com/6/{k}_o.jpg",
            "image_content": ["chair"],
            "question": "What colour is the hydrant?",
            "gt_answer": "There is none.",
            "model_answer": "",
        }
        for k, kind in enumerate(("attribute", "adversarial", "attribute"))
    ]
    (tmp_path / "response_template.json").write_text(json.dumps(rows))
    paths = [image(tmp_path, name) for name in ("0_o.jpg", "id1.jpg", "2_o.jpg")]
    questions, gold = benchmark.read(HAL, tmp_path)
    assert [q.images for q in questions] == [(path,) for path in paths]
    assert questions[0].prompt(HAL.suffix).endswith("hydrant? ASSISTANT:")
    assert not benchmark.has_answers(gold)
    _, content = HAL.submission({0: "red", 1: "none", 2: "a"}, gold)
    assert json.loads(content) == [
        row | {"model_answer": answer}
        for row, answer in zip(rows, ("red", "none", "a"), strict=True)
    ]
    replies = {
        0: "It is wrong.\nRating: 1",
        1: "Good. RATING: 6, very",
        2: "Rating: 2 or rating: 3",
    }
    scores = benchmark.score(HAL, replies, gold)
    assert scores["overall"] == {"score": 2.333, "hallucinations": 66.67, "unreadable": 1, "n": 3}
    assert scores["skills"]["attribute"] == {
        "score": 0.5,
        "hallucinations": 100.0,
        "unreadable": 1,
        "n": 2,
    }
    assert scores["skills"]["adversarial"]["hallucinations"] == 0.0


@pytest.mark.parametrize(
    ("reply", "value"), [("rating: 0", 0), ("Rating:3", None), ("Rating: 7", None), ("", None)]
)
def test_a_rating_is_said_once(reply, value):
    assert rating(reply) == value
