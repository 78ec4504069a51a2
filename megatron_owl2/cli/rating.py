"""Modes of `owl2 evaluate` for answers that people rate from A to D, as OwlEval's.

owl2 evaluate rating-sheet --task NAME --data PATH --predictions [NAME=]FILE ... --output DIR
owl2 evaluate tally --key DIR/key.json --sheet FILE ... [--task NAME] [--figure FILE.png]

`rating-sheet` writes the answers of several models in a random order: sheet.csv to fill in,
sheet.html to read with it, and key.json, which says whose they are and is for nobody who rates.
"""

import argparse
import json
from collections import Counter
from pathlib import Path

from megatron_owl2.cli.command import Command, UsageError
from megatron_owl2.cli.options import count
from megatron_owl2.errors import ScoreError


def add_sheet_arguments(parser: argparse.ArgumentParser) -> None:
    from megatron_owl2.evaluation import registry

    parser.add_argument("--task", required=True, choices=registry.find_benchmarks())
    parser.add_argument("--data", required=True, help="folder with the published files")
    parser.add_argument(
        "--predictions",
        required=True,
        nargs="+",
        help="answers of each model; it is called NAME, or as the file or its folder",
    )
    parser.add_argument(
        "--output", required=True, help="folder for the sheet, the page and the key"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the order")
    parser.add_argument("--limit", type=count, metavar="N", help="the first N questions only")


def write_sheet(options: argparse.Namespace) -> int:
    from megatron_owl2.evaluation import benchmark, rating, registry

    task = registry.find_benchmarks()[options.task]
    questions, _ = benchmark.read(task, options.data, options.limit)
    predictions = {}
    for name, path in map(_named, options.predictions):
        if name in predictions:
            raise UsageError(f"two models are called {name}; give NAME=FILE")
        predictions[name] = benchmark.read_predictions(task, path)
    if options.limit is not None:  # of predictions for more
        asked = {question.id for question in questions}
        predictions = {
            name: {i: text for i, text in benchmark.with_ids_of(asked, texts).items() if i in asked}
            for name, texts in predictions.items()
        }
    known = {"is_lost": task.raters.is_lost} if task.raters else {}
    items = rating.shuffled_items(questions, predictions, options.seed, **known)
    rating.write_sheet(Path(options.output), items)
    lost = Counter(item.model for item in items if item.lost)
    print(
        f"{len(items) - lost.total()} answers are in {options.output}/{rating.SHEET}; keep "
        f"{rating.KEY} away"
    )
    for model, number in lost.items():
        print(f"{number} answers of {model} were not kept by those who published it: left out")
    return 0


def _named(text: str) -> tuple[str, Path]:
    """Name and file of a model's answers."""
    name, equals, path = text.partition("=")
    if equals and not Path(text).exists():
        return name, Path(path)
    path = Path(text)
    return (path.resolve().parent.name if path.name == "predictions.jsonl" else path.stem), path


def add_tally_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--key", required=True, help="key.json of the sheet")
    parser.add_argument("--sheet", required=True, nargs="+", help="sheets that people filled in")
    parser.add_argument(
        "--task",
        choices=_rated_tasks(),
        help="of the answers: adds the published counts of other models' ratings",
    )
    parser.add_argument("--figure", type=Path, help="the tally as stacked bars, a PNG to write")


def tally(options: argparse.Namespace) -> int:
    from megatron_owl2.evaluation import rating

    raters = _rated_tasks()[options.task].raters if options.task else None
    table = rating.tally(Path(options.key), [*map(Path, options.sheet)], raters)
    if options.figure:
        from megatron_owl2.plotting import ratings

        try:
            ratings.draw(options.figure, table, raters.skills if raters else {})
        except OSError as error:
            raise ScoreError(f"--figure {options.figure}: {error.strerror}") from None
    print(json.dumps(table, indent=1))
    return 0


def _rated_tasks() -> dict:
    """The benchmarks that people rate, by their names."""
    from megatron_owl2.evaluation import registry

    return {name: task for name, task in registry.find_benchmarks().items() if task.raters}


MODES = {
    "rating-sheet": Command(
        verb="evaluate", help=__doc__, add_arguments=add_sheet_arguments, run=write_sheet
    ),
    "tally": Command(verb="evaluate", help=__doc__, add_arguments=add_tally_arguments, run=tally),
}
