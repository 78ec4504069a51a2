"""Report of a model: training curves and evaluations as a table and an image.

owl2 report --run pretrain=RUN_DIR --run finetune=RUN_DIR \\
    --evaluation seen=DIR --evaluation heldout=DIR --output DIR
"""

import argparse
import dataclasses
import json
from pathlib import Path

from megatron_owl2.cli.command import Command
from megatron_owl2.errors import ReportError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--run",
        action="append",
        default=[],
        metavar="NAME=RUN_DIR",
        help="a stage's metrics.jsonl; repeat for more stages, in order",
    )
    parser.add_argument(
        "--evaluation",
        action="append",
        required=True,
        metavar="NAME=DIR",
        help="output of tools/evaluate.py on the set NAME; repeat for tasks, --blind, and sets",
    )
    parser.add_argument("--output", required=True, help="for scores.json and report.png")
    parser.add_argument(
        "--pictures", metavar="NAME", help="set whose images to show; the last one by default"
    )
    parser.add_argument("--title", default="mPLUG-Owl2")


def run(options: argparse.Namespace) -> int:
    from megatron_owl2.plotting import figure, report

    evaluations = report.named("--evaluation", options.evaluation)
    runs = report.named("--run", options.run)
    scores = report.collect(evaluations)
    print(report.table(scores))
    curves = [report.read_loss_curves(name, path) for name, path in runs]
    answers = report.read_answers(evaluations)
    shown = options.pictures or next(reversed(answers), None)
    if shown is not None and shown not in answers:
        raise ReportError(
            f"--pictures {shown}: no such set has answers about images; there are "
            f"{', '.join(answers) or 'none'}"
        )
    examples = report.pick(answers[shown], count=8) if shown else []
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    tree = {
        name: {skill: dataclasses.asdict(score) for skill, score in rows.items()}
        for name, rows in scores.items()
    }
    (output / report.SCORES).write_text(json.dumps(tree, indent=1) + "\n")
    figure.draw(output / "report.png", options.title, curves, scores, examples, shown)
    print(f"\n{output / 'report.png'}")
    return 0


main = Command(verb="report", help=__doc__, add_arguments=add_arguments, run=run).main
