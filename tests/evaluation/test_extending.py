"""A benchmark added by one new file: the command line asks, scores and describes it."""

import json
import runpy
import sys
from pathlib import Path

import pytest
from paths import TOOLS
from PIL import Image

from megatron_owl2.config.schema import ModelConfig, ParallelConfig, VisionConfig
from megatron_owl2.evaluation import benchmarks, runner
from megatron_owl2.evaluation.registry import find_benchmarks
from megatron_owl2.inference import loading
from megatron_owl2.mcore import setup

COUNTING = '''
"""Counting questions, scored by the distance of the number."""

from megatron_owl2.evaluation.benchmark import Benchmark, Question
from megatron_owl2.evaluation.image_files import named_image
from megatron_owl2.evaluation.rows import identifier, read_rows, rows_by_id, whole_number, words
from megatron_owl2.evaluation.scoring import check_ids, score_table


FIELDS = {"qid": identifier, "image": words, "ask": words, "number": whole_number}


def read_questions(path, gold):
    return [Question(i, row["ask"], (named_image(path, row["image"]),), "count", str(row["number"]))
            for i, row in gold.items()]


def read_gold(path):
    return rows_by_id(path, read_rows(path, FIELDS), "qid")


def score(predictions, gold, variant="exact"):
    check_ids(predictions, gold)
    allowed = {"exact": 0, "near": 1}[variant]
    return score_table(
        [("count", row, predictions[i]) for i, row in gold.items()],
        lambda row: str(row["number"]),
        lambda answer, row: float(abs(int(answer) - row["number"]) <= allowed),
    )


BENCHMARK = Benchmark(
    about="how many things are there, up to 100%",
    file="counting_*.jsonl",
    gold_file="counting_*.jsonl",
    id_field="qid",
    answer_field="reply",
    suffix=" Answer with a number.",
    max_new_tokens=3,
    min_new_tokens=2,
    read_questions=read_questions,
    read_gold=read_gold,
    score=score,
    variants=("exact", "near"),
)
'''
ROWS = [
    {"qid": "a", "image": "a.png", "ask": "how many owls ?", "number": 2},
    {"qid": "b", "image": "a.png", "ask": "how many trees ?", "number": 5},
    {"qid": "c", "image": "a.png", "ask": "how many feet ?", "number": 2},
]
REPLIES = {"a": "2", "b": "4", "c": "8"}


def run_tool(monkeypatch, *arguments) -> int:
    path = TOOLS / "evaluate.py"
    monkeypatch.setattr(sys, "argv", [str(path), *map(str, arguments)])
    return runpy.run_path(str(path))["main"]()


@pytest.fixture
def counting(tmp_path, monkeypatch) -> Path:
    """The data of a benchmark whose one module has been added to the package of benchmarks."""
    folder = tmp_path / "added"
    folder.mkdir()
    (folder / "counting.py").write_text(COUNTING)
    monkeypatch.setattr(benchmarks, "__path__", [*benchmarks.__path__, str(folder)])
    data = tmp_path / "data"
    (data / "images").mkdir(parents=True)
    Image.new("RGB", (30, 30), "red").save(data / "images" / "a.png")
    (data / "counting_owls.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    yield data
    name = f"{benchmarks.__name__}.counting"
    sys.modules.pop(name, None)
    vars(benchmarks).pop("counting", None)


def test_the_score_command_takes_a_new_benchmark(counting, tmp_path, monkeypatch, capsys):
    assert "counting" in find_benchmarks()
    said = tmp_path / "said.jsonl"
    said.write_text("".join(json.dumps({"qid": i, "reply": t}) + "\n" for i, t in REPLIES.items()))
    options = ["score", "--task", "counting", "--predictions", said, "--gold", counting]
    for variant, accuracy in (((), 33.33), (("--variant", "near"), 66.67)):
        assert run_tool(monkeypatch, *options, *variant) == 0
        row = {"accuracy": accuracy, "majority": 66.67, "n": 3}
        assert json.loads(capsys.readouterr().out) == {"overall": row, "skills": {"count": row}}
    assert run_tool(monkeypatch, *options, "--variant", "loose") == 2
    said_wrong = capsys.readouterr().err
    assert said_wrong == "error: this task has no scoring variant 'loose'; known: exact, near\n"
    said.write_text(json.dumps({"qid": "a", "reply": 2}))
    assert run_tool(monkeypatch, *options) == 2
    assert "'reply' is 2, wanted a text (line 1)" in capsys.readouterr().err


@pytest.mark.parametrize("command", [[], ["score"]])
def test_the_help_describes_a_new_benchmark(counting, command, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        run_tool(monkeypatch, *command, "--help")
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert f"--task {{{','.join(find_benchmarks())}}}" in " ".join(said.split())
    section = said[said.index("\ncounting ") :].splitlines()[1:6]
    assert [" ".join(line.split()) for line in section] == [
        "counting how many things are there, up to 100%",
        "files: counting_*.jsonl",
        "asked with: Answer with a number.",
        "new tokens: 2 to 3",
        "variants: exact (default), near",
    ]


def test_the_evaluation_asks_a_new_benchmark(counting, tmp_path, monkeypatch, capsys):
    asked = []

    class Replies:
        def __init__(self, loaded):
            pass

        def generate(self, prompts, images, max_new_tokens, min_new_tokens):
            asked.append((prompts, [[*image.shape] for (image,) in images]))
            asked.append((max_new_tokens, min_new_tokens))
            return list(REPLIES.values())

    config = ModelConfig(vision=VisionConfig(image_size=28))
    monkeypatch.setattr(runner, "Generator", Replies)
    monkeypatch.setattr(
        loading, "load_model", lambda *_, **__: type("Loaded", (), {"config": config})
    )
    setup.initialize(ParallelConfig())
    (tmp_path / "model").mkdir()
    options = ["--checkpoint", tmp_path / "model", "--data", counting, "--output", tmp_path / "out"]
    assert run_tool(monkeypatch, "--task", "counting", *options) == 0
    assert capsys.readouterr().out.splitlines()[1].split() == ["count", "33.33", "66.67", "3"]
    (prompts, shapes), limits = asked
    assert prompts[0] == "USER: <|image|>how many owls ? Answer with a number. ASSISTANT:"
    assert shapes == [[3, 28, 28]] * 3 and limits == (3, 2)
    rows = (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()
    assert [(row["qid"], row["reply"], row["score"]) for row in map(json.loads, rows)] == [
        ("a", "2", 100.0),
        ("b", "4", 0.0),
        ("c", "8", 0.0),
    ]
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert scores["task"] == "counting" and scores["variant"] == "exact"


def test_a_module_without_an_entry_is_named(counting, tmp_path):
    (tmp_path / "added" / "counting.py").write_text("questions = []\n")
    with pytest.raises(TypeError, match="benchmarks.counting must define BENCHMARK"):
        find_benchmarks()
