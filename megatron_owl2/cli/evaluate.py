"""Evaluation of a model on benchmarks, or scores of answers given before.

owl2 evaluate --checkpoint CKPT_OR_HF_DIR --task NAME --data PATH --output DIR
owl2 evaluate --checkpoint CKPT_OR_HF_DIR --suite paper --data ROOT --output DIR
owl2 evaluate score --task NAME --predictions FILE --gold FILE
torchrun --nproc-per-node 8 --no-python owl2 evaluate --tensor-parallel 1 ...
owl2 evaluate requests and judge are for answers that a language model judges,
owl2 evaluate rating-sheet and tally for those that people rate; each has its --help.
"""

import argparse
import json
from pathlib import Path

from megatron_owl2.cli import judge, rating
from megatron_owl2.cli.command import Command, UsageError, is_first_rank
from megatron_owl2.cli.options import add_model
from megatron_owl2.errors import MissingPredictionsError, ScoreError

SUITES = ("paper",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from megatron_owl2.evaluation.prompts import PROMPTS

    asked = parser.add_mutually_exclusive_group(required=True)
    _add_task(
        parser, asked, action="append", more="; several, repeated, have a folder each in DATA"
    )
    asked.add_argument(
        "--suite", choices=SUITES, help="all tasks of the paper that have a folder in DATA"
    )
    add_model(parser)
    parser.add_argument(
        "--data",
        required=True,
        help="folder with the published files and images/, or its file; of several tasks, the "
        "folder that has one for each, of its name",
    )
    parser.add_argument(
        "--output", required=True, help="for predictions.jsonl, scores.json, results.md and pages"
    )
    parser.add_argument("--blind", action="store_true", help="show black images only")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--frames", type=int, help="of a video, instead of the task's number")
    parser.add_argument("--limit", type=int, help="ask the first N questions only")
    parser.add_argument(
        "--no-gold",
        action="store_true",
        help="the answers are not published: write predictions and the server's file, no scores",
    )
    parser.add_argument(
        "--prompt",
        choices=PROMPTS,
        default=PROMPTS[0],
        help="as the model was trained, or to the byte as published evaluation code asks",
    )
    parser.add_argument(
        "--prompt-suffix",
        help="after every question, with its own leading space, instead of the task's",
    )
    parser.add_argument("--max-new-tokens", type=int, help="instead of the task's")
    parser.add_argument("--min-new-tokens", type=int, help="instead of the task's")
    parser.add_argument(
        "--tensor-parallel",
        type=int,
        metavar="N",
        help="processes that split the model (default: all); other groups of N share the questions",
    )
    parser.add_argument(
        "--restart", action="store_true", help="ask all again, whatever is answered in OUTPUT"
    )


def run(options: argparse.Namespace) -> int:
    for name in ("batch_size", "limit", "frames", "max_new_tokens", "tensor_parallel"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 1")
    if options.variant and (options.suite or len(options.task) > 1):
        raise UsageError("--variant is of one task; score the others' predictions under theirs")
    if options.frames and (options.suite or len(options.task) > 1):
        raise UsageError("--frames is of one task")

    from megatron_owl2.mcore.setup import setup

    setup()
    from megatron_owl2.evaluation import runner

    settings = runner.Settings(
        blind=options.blind,
        batch_size=options.batch_size,
        limit=options.limit,
        prompt=options.prompt,
        suffix=options.prompt_suffix,
        max_new_tokens=options.max_new_tokens,
        min_new_tokens=options.min_new_tokens,
        variant=options.variant,
        frames=options.frames,
        restart=options.restart,
    )
    if options.suite is None and len(options.task) == 1:
        return _run_one(options, settings)
    return _run_several(options, settings)


def _run_one(options: argparse.Namespace, settings) -> int:
    from megatron_owl2.evaluation import registry, suite, tables

    (task,), directory = options.task, _directory(options)
    job = suite.Job(task, Path(options.data), Path(options.output), not options.no_gold)
    result = suite.run_job(
        job, lambda: _load(options, directory), settings, lambda: _about(options, directory)
    )
    if is_first_rank():
        if "overall" in result:
            print(tables.table(result, registry.find_benchmarks()[task].columns))
        else:
            count = result["questions"]
            print(f"{count} answers to questions without gold are in {options.output}")
    return 0


def _run_several(options: argparse.Namespace, settings) -> int:
    from megatron_owl2.evaluation import paper, registry, suite

    known, output = registry.find_benchmarks(), Path(options.output)
    tasks = options.task or [task for task in paper.PAPER_TASKS if task in known]
    jobs, without = suite.find_jobs(
        list(dict.fromkeys(tasks)), Path(options.data), output, with_gold=not options.no_gold
    )
    directory = _directory(options)
    model, about = _load(options, directory), _about(options, directory)
    outcome = suite.run_jobs(jobs, model, settings, about, output, without)
    if is_first_rank():
        print((output / "results.md").read_text())
        if outcome.failed:
            print(f"failed: {', '.join(outcome.failed)}")
    return 1 if outcome.failed else 0


def _directory(options: argparse.Namespace) -> Path:
    from megatron_owl2.evaluation.fingerprint import model_directory

    return model_directory(Path(options.checkpoint))


def _load(options: argparse.Namespace, directory: Path):
    from megatron_owl2.inference import loading

    return loading.load_model(
        directory,
        options.precision,
        adapter=options.adapter,
        tensor_parallel=options.tensor_parallel,
    )


def _about(options: argparse.Namespace, directory: Path) -> dict[str, str]:
    """The model, by name and by content; all processes together, once it is loaded."""
    from megatron_owl2.evaluation.fingerprint import mark_of_model
    from megatron_owl2.evaluation.ranks import from_first

    about = {
        "model": options.checkpoint,
        "model_content": from_first(lambda: mark_of_model(directory)),
        "precision": options.precision,
    }
    if directory != Path(options.checkpoint):  # that of a run
        about["checkpoint"] = directory.name
    if options.adapter:
        about["adapter"] = options.adapter
        about["adapter_content"] = from_first(lambda: mark_of_model(Path(options.adapter)))
    return about


def add_score_arguments(parser: argparse.ArgumentParser) -> None:
    _add_task(parser, parser, required=True)
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--predictions", help="JSON lines or a JSON list")
    given.add_argument("--replies", help="a judge's, as `judge` writes them")
    parser.add_argument("--gold", required=True, help="the published answers")
    parser.add_argument(
        "--missing",
        choices=("error", "wrong"),
        default="error",
        help="what questions without a prediction are: an error, or answered wrongly",
    )


def score(options: argparse.Namespace) -> int:
    from megatron_owl2.evaluation import benchmark, judge_files, registry

    task = registry.find_benchmarks()[options.task]
    gold = benchmark.read_gold(task, options.gold)
    if options.replies and (options.variant or options.missing != "error"):
        raise UsageError("--variant and --missing are of --predictions")
    missing = {}
    try:
        if options.replies:
            replies = judge_files.read_replies(Path(options.replies))
            scores = judge_files.score_replies(task, replies, gold)
        else:
            predictions = benchmark.read_predictions(task, options.predictions)
            if options.missing == "wrong":
                predictions, count = benchmark.with_missing_wrong(
                    task, predictions, gold, options.variant
                )
                missing = {"missing": count}
            scores = benchmark.score(task, predictions, gold, options.variant)
    except ScoreError as error:
        given = options.replies or options.predictions
        fix = ""
        if isinstance(error, MissingPredictionsError):
            fix = "; score against the gold that was asked"
            fix += "" if options.replies else ", or count these as wrong (--missing wrong)"
        raise ScoreError(f"{given} and {options.gold}: {error}{fix}") from None
    print(json.dumps({**missing, **scores}, indent=1))
    return 0


def _add_task(parser: argparse.ArgumentParser, asked, *, more: str = "", **how) -> None:
    """Options of both modes, with the benchmarks in the help; `asked` takes that of the task."""
    from megatron_owl2.evaluation import registry

    benchmarks = registry.find_benchmarks()
    width = max(map(len, benchmarks))
    tasks = "\n".join(registry.describe(*item, width) for item in benchmarks.items())
    parser.epilog = f"tasks:\n{tasks}"
    asked.add_argument("--task", choices=benchmarks, help=f"one of those below{more}", **how)
    parser.add_argument("--variant", help="of the task's scoring rule, where it has several")


_SCORE = Command(verb="evaluate", help=__doc__, add_arguments=add_score_arguments, run=score)
main = Command(
    verb="evaluate",
    help=__doc__,
    add_arguments=add_arguments,
    run=run,
    modes={"score": _SCORE} | judge.MODES | rating.MODES,
).main
