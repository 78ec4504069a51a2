"""MMBench: rows of its TSV to passes, passes to questions, predictions to the server's file."""

import base64
import io
import json
import zipfile
from xml.etree import ElementTree

import pytest
from benchmark_files import LETTER, TASKS, asked, marks, mmbench_rows, png, write_tsv

from megatron_owl2.config.schema import ModelConfig, ParallelConfig, VisionConfig
from megatron_owl2.errors import ScoreError, TaskError
from megatron_owl2.evaluation import benchmark, runner
from megatron_owl2.evaluation.runner import Settings
from megatron_owl2.mcore import setup


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
        (0, {"question": ""}, r"'question' is None, wanted a text \(line 2\)"),
    ],
)
def test_mmbench_names_what_is_wrong(tmp_path, row, change, message):
    rows = mmbench_rows()
    rows[row] |= change
    write_tsv(tmp_path / "MMBench_DEV_EN.tsv", rows)
    with pytest.raises(TaskError, match=message):
        asked("mmbench", tmp_path)


class NamesColors:
    """A generator that answers with the image's colour; `seen` are the images of its calls."""

    seen: list = []

    def __init__(self, loaded):
        pass

    def generate(self, prompts, images, max_new_tokens, min_new_tokens):
        self.seen.append([image for (image,) in images])
        return ["red" if image[0].any() else "blue" for (image,) in images]


def test_images_inside_the_file_are_shown(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "Generator", NamesColors)
    monkeypatch.setattr(NamesColors, "seen", [])
    setup.initialize(ParallelConfig())
    loaded = type("Loaded", (), {"config": ModelConfig(vision=VisionConfig(image_size=28))})

    def evaluate(rows: list[dict]) -> dict:
        write_tsv(tmp_path / "mmbench_dev.tsv", rows)
        questions, gold = benchmark.read(TASKS["mmbench"], tmp_path)
        return runner.evaluate(loaded, "mmbench", questions, gold, output, Settings(), {})

    output, rows = tmp_path / "out", mmbench_rows()
    scores = evaluate(rows)["overall"]
    assert scores["n"] == 2 and scores["unresolved"] == 5
    (images,) = NamesColors.seen
    assert images[0] is images[2] and images[1] is images[4]  # encoded once
    answers = list(map(json.loads, (output / "predictions.jsonl").read_text().splitlines()))
    assert [row["prediction"] for row in answers] == ["red", "blue", "red", "blue", "blue"]
    assert answers[0]["images"] == ["inside the question file"]
    answer = rows[1].pop("answer")
    with pytest.raises(ScoreError, match="1 of 5 questions have no .* answer, such as 8; .*--no-g"):
        evaluate(rows)
    assert len(NamesColors.seen) == 1  # told before the questions are asked
    assert json.loads((output / "scores.json").read_text())["overall"] == scores
    rows[1]["answer"] = answer
    for row in rows:
        row.pop("answer")
    output = tmp_path / "server"
    assert "overall" not in evaluate(rows) and (output / "submission_mmbench.xlsx").exists()
    rows[1]["image"] = base64.b64encode(b"no image" * 9).decode()
    with pytest.raises(TaskError, match="inside the question file: .*the image of question 8"):
        evaluate(rows)
