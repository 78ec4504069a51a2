"""Evaluation of a model on a benchmark, or scores of answers given before.

owl2 evaluate --checkpoint CKPT_OR_HF_DIR --task NAME --data PATH --output DIR
owl2 evaluate score --task NAME --predictions FILE --gold FILE
"""

import argparse
import json

from megatron_owl2.cli.command import Command, UsageError, is_first_rank
from megatron_owl2.errors import ScoreError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    _add_task(parser)
    parser.add_argument("--checkpoint", required=True, help="run directory, iter_* or HF export")
    parser.add_argument(
        "--data", required=True, help="folder with the published files and images/, or its file"
    )
    parser.add_argument("--output", required=True, help="for predictions.jsonl and scores.json")
    parser.add_argument("--blind", action="store_true", help="show black images only")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--limit", type=int, help="ask the first N questions only")
    parser.add_argument(
        "--no-gold",
        action="store_true",
        help="the answers are not published: write predictions and the server's file, no scores",
    )
    parser.add_argument(
        "--prompt-suffix",
        help="after every question, with its own leading space, instead of the task's",
    )
    parser.add_argument("--max-new-tokens", type=int, help="instead of the task's")
    parser.add_argument("--min-new-tokens", type=int, help="instead of the task's")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")


def run(options: argparse.Namespace) -> int:
    for name in ("batch_size", "limit", "max_new_tokens"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 1")

    from megatron_owl2.mcore.setup import setup

    setup()
    from megatron_owl2.evaluation import benchmark, registry, runner
    from megatron_owl2.inference.loading import load_model

    settings = runner.Settings(
        blind=options.blind,
        batch_size=options.batch_size,
        limit=options.limit,
        suffix=options.prompt_suffix,
        max_new_tokens=options.max_new_tokens,
        min_new_tokens=options.min_new_tokens,
        variant=options.variant,
    )
    about = {"model": options.checkpoint, "data": options.data}
    task = registry.find_benchmarks()[options.task]
    questions, gold = benchmark.read(
        task, options.data, options.limit, with_gold=not options.no_gold
    )
    loaded = load_model(options.checkpoint, options.precision)
    result = runner.evaluate(loaded, options.task, questions, gold, options.output, settings, about)
    if is_first_rank():
        if benchmark.has_answers(gold):
            print(runner.table(result, task.columns))
        else:
            print(f"{len(questions)} answers to questions without gold are in {options.output}")
    return 0


def add_score_arguments(parser: argparse.ArgumentParser) -> None:
    _add_task(parser)
    parser.add_argument("--predictions", required=True, help="JSON lines or a JSON list")
    parser.add_argument("--gold", required=True, help="the published answers")


def score(options: argparse.Namespace) -> int:
    from megatron_owl2.evaluation import benchmark, registry

    task = registry.find_benchmarks()[options.task]
    predictions = benchmark.read_predictions(task, options.predictions)
    gold = benchmark.read_gold(task, options.gold)
    try:
        scores = benchmark.score(task, predictions, gold, options.variant)
    except ScoreError as error:
        raise ScoreError(f"{options.predictions} and {options.gold}: {error}") from None
    print(json.dumps(scores, indent=1))
    return 0


def _add_task(parser: argparse.ArgumentParser) -> None:
    """Options of both modes, with the benchmarks in the help."""
    from megatron_owl2.evaluation import registry

    benchmarks = registry.find_benchmarks()
    tasks = "\n".join(registry.describe(*item) for item in benchmarks.items())
    parser.epilog = f"tasks:\n{tasks}"
    parser.add_argument("--task", required=True, choices=benchmarks, help="one of those below")
    parser.add_argument("--variant", help="of the task's scoring rule, where it has several")


_SCORE = Command(verb="evaluate", help=__doc__, add_arguments=add_score_arguments, run=score)
main = Command(
    verb="evaluate", help=__doc__, add_arguments=add_arguments, run=run, modes={"score": _SCORE}
).main
