"""Training and validation losses as they are drawn: lines, values and labels of every panel."""

import json
import math
import runpy
import sys
from pathlib import Path

import matplotlib.figure
import pytest
from paths import TOOLS

from megatron_owl2.errors import ReportError
from megatron_owl2.plotting import report

STEPS = range(1, 81)


def validation(step: int) -> list[dict]:
    """What a validation after `step` writes: two sources, of which the second once has no loss."""
    sources = []
    for name, loss in (("coco", 3.0 + step), ("text", None if step == 40 else 5.0 - step / 20)):
        sources.append(
            {
                "name": name,
                "path": f"shards/{name}",
                "loss": loss,
                "image_loss": loss,
                "text_loss": None,
                "samples": 8,
                "bad": 0,
            }
        )
    return sources


@pytest.fixture
def runs(tmp_path) -> list[Path]:
    """A run with a validation every 20 steps, and one without any."""
    folders = []
    for name, every in (("pretrain", 20), ("finetune", 0)):
        rows = []
        for step in STEPS:
            row = {"step": step, "loss": 4.0 / step, "image_loss": None, "text_loss": 2.0}
            row |= {"grad_norm": 1.0, "grad_norms": {"ViT": 0.5}, "rates": {"ViT": 1e-4}}
            row |= {"tokens_per_second": 10.0, "mfu": 0.25, "data_wait_share": math.nan}
            if every and step % every == 0:
                row["validation"] = validation(step)
            rows.append(row)
        folder = tmp_path / name
        folder.mkdir()
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        folders.append(folder)
    return folders


@pytest.fixture
def axes(monkeypatch) -> dict:
    """Filled with {title: axes} of the figure that a tool saves."""
    found = {}
    save = matplotlib.figure.Figure.savefig

    def savefig(figure, *arguments, **options):
        found.update((axis.get_title(loc="left"), axis) for axis in figure.get_axes())
        return save(figure, *arguments, **options)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", savefig)
    return found


def run_tool(monkeypatch, name: str, *arguments) -> int:
    path = TOOLS / f"{name}.py"
    monkeypatch.setattr(sys, "argv", [str(path), *map(str, arguments)])
    return runpy.run_path(str(path))["main"]()


def lines(axis) -> dict[str, tuple[list[float], list[float]]]:
    """The labelled lines of a panel; faint ones below a smoothed line have no label."""
    named = [line for line in axis.get_lines() if not line.get_label().startswith("_")]
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in named}


VALIDATION = {
    "validation coco": ([20, 40, 60, 80], [23.0, 43.0, 63.0, 83.0]),
    "validation text": ([20, 60, 80], [4.0, 2.0, 1.0]),  # no loss after step 40
}


def dashed(axis) -> list[str]:
    found = [line for line in axis.get_lines() if line.get_linestyle() == "--"]
    assert all(line.get_marker() == "o" for line in found)
    return [line.get_label() for line in found]


def test_plot_run_draws_validation_losses_of_their_run_only(runs, axes, tmp_path, monkeypatch):
    output = tmp_path / "curves.png"
    assert run_tool(monkeypatch, "plot_run", *runs, "--output", output) == 0
    assert output.stat().st_size > 0
    first, second = axes["pretrain: loss"], axes["finetune: loss"]
    shown = lines(first)
    assert list(shown) == ["all", "text only", *VALIDATION]
    assert {name: shown[name] for name in VALIDATION} == VALIDATION
    assert dashed(first) == [*VALIDATION]
    assert list(lines(second)) == ["all", "text only"] and dashed(second) == []
    assert len({line.get_color() for line in first.get_lines()}) == 4
    assert [text.get_text() for text in first.get_legend().get_texts()] == list(shown)
    assert lines(first)["text only"] == (list(STEPS), [2.0] * 80)  # smoothing keeps a line
    (_, smoothed) = axes["pretrain: MFU, %"].get_lines()
    assert list(smoothed.get_ydata()) == [25.0] * 80
    assert not any("waiting" in title for title in axes)  # no finite value in any run


def test_the_report_draws_validation_losses(runs, axes, tmp_path, monkeypatch):
    evaluation = tmp_path / "seen"
    evaluation.mkdir()
    rows = {"colour": {"accuracy": 90.0, "majority": 20.0, "n": 2}}
    scores = {"task": "vqav2", "blind": False, "overall": {}, "skills": rows}
    (evaluation / "scores.json").write_text(json.dumps(scores))
    (evaluation / "predictions.jsonl").write_text("")
    options = [f"--run={run.name}={run}" for run in runs]
    options += [f"--evaluation=seen={evaluation}", "--output", tmp_path / "report"]
    assert run_tool(monkeypatch, "report", *options) == 0
    shown = lines(axes["pretrain"])
    assert list(shown) == ["training", *VALIDATION]
    assert {name: shown[name] for name in VALIDATION} == VALIDATION
    assert dashed(axes["pretrain"]) == [*VALIDATION]
    assert axes["pretrain"].get_ylim() == (0.0, pytest.approx(83.0 * 1.05))
    assert axes["pretrain"].get_legend() is not None
    assert list(lines(axes["finetune"])) == ["training"]
    assert axes["finetune"].get_legend() is None
    assert axes["finetune"].get_ylim() == (0.0, pytest.approx(4.0 * 1.05))


def test_validation_losses_are_read_by_source(runs):
    curves = report.read_loss_curves("pretrain", runs[0])
    assert {f"validation {name}": line for name, line in curves.validation.items()} == VALIDATION
    assert curves.losses == [4.0 / step for step in STEPS]


def test_a_run_without_any_loss_is_refused(tmp_path, monkeypatch, capsys):
    row = {"step": 1, "loss": None, "validation": validation(20)}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ReportError, match="holds no loss"):
        report.read_loss_curves("run", tmp_path)
    assert run_tool(monkeypatch, "plot_run", tmp_path, "--output", tmp_path / "curves.png") == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'metrics.jsonl'} holds no loss\n"
