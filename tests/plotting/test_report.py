"""The report: numbers put together rightly, and a figure that shows them."""

import json
import runpy
import sys
from pathlib import Path

import pytest
from paths import TOOLS
from PIL import Image

from megatron_owl2.errors import ReportError
from megatron_owl2.plotting import figure, report
from megatron_owl2.plotting.report import Answer, SkillScore

TOOL = TOOLS / "report.py"


def evaluation(folder: Path, skills: dict, blind=False, task="vqav2", answers=()) -> Path:
    """An output of tools/evaluate.py: skills as {name: (accuracy, majority, n)}."""
    folder.mkdir(parents=True)
    rows = {
        name: dict(zip(("accuracy", "majority", "n"), values, strict=True))
        for name, values in skills.items()
    }
    scores = {"task": task, "blind": blind, "overall": {}, "skills": rows}
    (folder / "scores.json").write_text(json.dumps(scores))
    lines = "".join(json.dumps(row) + "\n" for row in answers)
    (folder / "predictions.jsonl").write_text(lines)
    return folder


def answered(image, skill, answer, gold, score):
    return {
        "question_id": f"{image}{skill}",
        "answer": answer,
        "score": score,
        "question": f"what {skill} ?",
        "skill": skill,
        "gold": gold,
        "images": [str(image)],
    }


@pytest.fixture
def outputs(tmp_path):
    """Two stages, a seen and a held-out set with images, and a set of text."""
    images = []
    for i in range(6):
        images.append(tmp_path / f"{i}.png")
        Image.new("RGB", (56, 56), (40 * i, 0, 0)).save(images[-1])
    rows = [
        answered(image, skill, "red" if right else "blue", "red", 100.0 if right else 0.0)
        for i, image in enumerate(images)
        for skill, right in (("colour", i % 2 == 0), ("shape", True))
    ]
    text = {"scene": (70.0, 10.0, 40)}
    for name, loss in (("pretrain", 4.0), ("finetune", 2.0)):
        (tmp_path / name).mkdir()
        lines = [{"step": s, "loss": loss / s, "lr": 1e-3} for s in range(1, 40)]
        lines += [{"step": 40, "loss": None}, {"step": 41, "loss": float("nan")}]
        (tmp_path / name / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    seen = {"colour": (90.0, 20.0, 50), "shape": (95.5, 25.0, 50)}
    evaluation(tmp_path / "seen", seen, answers=rows[:2])
    evaluation(tmp_path / "seen-blind", {"colour": (14.0, 20.0, 50)}, blind=True)
    evaluation(tmp_path / "heldout", {"colour": (50.0, 21.0, 6)}, answers=rows)
    evaluation(tmp_path / "text", text, task="text", answers=[rows[0] | {"id": 1, "images": []}])
    return tmp_path


def named(folder):
    sets = ("seen", "seen-blind", "heldout", "text")
    return [(name.removesuffix("-blind"), folder / name) for name in sets]


def test_scores_of_one_set_come_together(outputs):
    scores = report.collect(named(outputs))
    assert scores == {
        "seen": {
            "colour": SkillScore(90.0, 14.0, 20.0, 50),
            "shape": SkillScore(95.5, None, 25.0, 50),
        },
        "heldout": {"colour": SkillScore(50.0, None, 21.0, 6)},
        "text": {"scene": SkillScore(70.0, None, 10.0, 40)},
    }
    assert report.table(scores).splitlines() == [
        "skill   set      accuracy  blind  majority   n",
        "----------------------------------------------",
        "colour  seen         90.0   14.0      20.0  50",
        "        heldout      50.0      -      21.0   6",
        "shape   seen         95.5      -      25.0  50",
        "scene   text         70.0      -      10.0  40",
    ]


def test_the_same_evaluation_twice_or_of_another_size_is_refused(outputs):
    with pytest.raises(ReportError, match="set 'a' has skill 'colour' twice"):
        report.collect([("a", outputs / "seen"), ("a", outputs / "heldout")])
    with pytest.raises(ReportError, match="50 questions on 'colour', but 6 .* same --limit"):
        report.collect([("a", outputs / "heldout"), ("a", outputs / "seen-blind")])
    with pytest.raises(ReportError, match="scores.json does not exist; tools/evaluate.py writes"):
        report.collect([("a", outputs / "nowhere")])
    with pytest.raises(ReportError, match="--run 'dir' must be NAME=DIR"):
        report.named("--run", ["dir"])


def test_evaluations_of_another_model_or_prompt_share_no_row(tmp_path):
    alike = {"model_content": "1", "prompt": "owl2", "prompt_suffix": " Short."}
    skills = {"colour": (50.0, 20.0, 9)}

    def change(folder: Path, **more) -> None:
        path = folder / "scores.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | more))

    seen = evaluation(tmp_path / "seen", skills)
    blind = evaluation(tmp_path / "blind", skills, blind=True)
    pairs = [("seen", seen), ("seen", blind)]
    change(seen, **alike)
    assert report.collect(pairs)["seen"]["colour"].blind == 50.0  # that says nothing of these
    change(blind, **alike)
    assert report.collect(pairs)["seen"]["colour"].blind == 50.0
    for key, value in (
        ("model_content", "2"),
        ("prompt", "official"),
        ("prompt_suffix", ""),
        ("adapter_content", "3"),
        ("task", "okvqa"),
    ):
        before = (blind / "scores.json").read_text()
        change(blind, **{key: value})
        for given in (pairs, pairs[::-1]):
            with pytest.raises(ReportError, match=f"the {key} of skill 'colour' is not that of"):
                report.collect(given)
        assert len(report.collect([("seen", seen), ("other", blind)])) == 2
        (blind / "scores.json").write_text(before)


def test_what_a_report_cannot_show_is_told(tmp_path):
    folder = evaluation(tmp_path / "captions", {}, task="coco_caption")
    scores = {"task": "coco_caption", "blind": False}
    rows = {"caption": {"cider_d": 90.0, "n": 9}}
    for content, told in (
        (scores | {"overall": {}, "skills": rows}, "which coco_caption does not have; leave it"),
        (scores, "has no scores, as its answers have no gold; leave it out"),
    ):
        (folder / "scores.json").write_text(json.dumps(content))
        with pytest.raises(ReportError, match=told):
            report.collect([("seen", folder)])


def test_curves_are_read_from_the_metrics(outputs):
    curves = report.read_loss_curves("second", outputs / "finetune")
    assert curves.name == "second" and curves.validation == {}
    assert curves.steps == list(range(1, 40))  # the last two steps have no finite loss
    assert curves.losses[:2] == [2.0, 1.0]
    with pytest.raises(ReportError, match="metrics.jsonl does not exist"):
        report.read_loss_curves("seen", outputs / "seen")


def test_answers_to_show_cover_skills_and_images(outputs):
    answers = report.read_answers(named(outputs))
    assert list(answers) == ["seen", "heldout"] and len(answers["heldout"]) == 12
    chosen = report.pick(answers["heldout"], 6)
    assert [answer.skill for answer in chosen] == ["colour", "shape"] * 3
    assert len({answer.image for answer in chosen}) == 6
    turned = [Answer(**{**vars(a), "right": not a.right}) for a in answers["heldout"]]
    assert [a.image for a in report.pick(turned, 6)] == [a.image for a in chosen]
    assert len(report.pick(answers["seen"], 6)) == 2


def test_lines_below_an_image():
    wrong = Answer(Path("x.png"), "colour", "what color ?", "", "red", right=False)
    right = Answer(Path("x.png"), "colour", "what color ? " * 9, "costs $5", "red", right=True)
    assert [(text, color) for text, color, _ in figure._lines(wrong)] == [
        ("what color ?", figure._INK),
        ("(no answer)", figure._WRONG),
        ("gold: red", figure._FAINT),
    ]
    first, second, answer = figure._lines(right)
    assert second[0].endswith("...") and len(first[0]) <= 36
    assert answer[:2] == (r"costs \$5", figure._RIGHT)


def test_smoothing_keeps_a_line_and_removes_a_zigzag():
    line = [float(i) for i in range(200)]
    assert figure.smooth(line)[5:-5] == pytest.approx(line[5:-5])
    zigzag = figure.smooth([i % 2 for i in range(200)])
    assert max(abs(v - 0.5) for v in zigzag[5:-5]) < 0.1


def run_tool(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, arguments)])
    return runpy.run_path(str(TOOL))["main"]()


def test_command_line(outputs, monkeypatch, capsys):
    options = [f"--run={name}={outputs / name}" for name in ("pretrain", "finetune")]
    options += [f"--evaluation={name}={path}" for name, path in named(outputs)]
    assert run_tool(monkeypatch, *options, "--output", outputs / "report") == 0
    assert "colour  seen         90.0   14.0" in capsys.readouterr().out
    scores = json.loads((outputs / "report" / "scores.json").read_text())
    assert scores["seen"]["colour"] == {"accuracy": 90.0, "blind": 14.0, "majority": 20.0, "n": 50}
    with Image.open(outputs / "report" / "report.png") as image:
        width, height = image.size
        colors = {color for _, color in image.convert("RGB").getcolors(1 << 24)}
    assert width == 1430 and height > width
    assert {(40 * i, 0, 0) for i in range(6)} <= colors  # every held-out image is there


def test_command_line_names_mistakes(outputs, monkeypatch, capsys):
    options = ["--evaluation", f"seen={outputs / 'seen'}", "--output", outputs / "report"]
    assert run_tool(monkeypatch, *options, "--pictures", "unseen") == 2
    assert "--pictures unseen: no such set" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run_tool(monkeypatch, *options) == 2
    assert "pip install 'megatron-owl2[report]'" in capsys.readouterr().err


def test_the_report_shows_what_the_model_sees(tmp_path):
    """Sixteen bits keep the upper ones, transparency is white, damaged metadata no damage."""
    path = tmp_path / "a.png"
    for image, shown in (
        (Image.new("I;16", (8, 8), 128 << 8), (128, 128, 128)),
        (Image.new("RGBA", (8, 8), (0, 0, 0, 128)), (127, 127, 127)),
    ):
        image.save(path)
        chunk = (1).to_bytes(4, "big") + b"gAMA\0" + bytes(4)  # short, with a wrong checksum
        data = path.read_bytes()
        path.write_bytes(data[:33] + chunk + data[33:])
        assert figure._enlarged(path).getpixel((9, 9)) == shown
    path.write_bytes(b"<html>")
    with pytest.raises(ReportError, match="a.png cannot be shown: .* an HTML page"):
        figure._enlarged(path)
    with (
        pytest.raises(ReportError, match="x.foo must end in .png"),
        figure.canvas(tmp_path / "x.foo", "title", 1, 1),
    ):
        pass


@pytest.mark.parametrize("row", [{"step": 10**400, "loss": 1.0}, {"step": 1, "loss": 10**400}])
def test_numbers_beyond_all_measure_are_no_curve(tmp_path, row):
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ReportError, match="metrics.jsonl"):
        report.read_metrics(tmp_path)
