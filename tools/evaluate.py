"""Ask a model the questions of a benchmark and score its answers, or score answers given before:

python tools/evaluate.py --checkpoint CKPT_OR_HF_DIR --task NAME --data PATH --output DIR
python tools/evaluate.py score --task NAME --predictions FILE --gold FILE
"""

import argparse
import json
import os
import sys

from megatron_owl2.errors import ScoreError, TaskError
from megatron_owl2.evaluation import benchmark, registry


def main() -> int:
    arguments = sys.argv[1:]
    if arguments[:1] == ["score"]:
        return score(arguments[1:])
    return evaluate(arguments)


def evaluate(arguments: list[str]) -> int:
    parser = _parser("tools/evaluate.py")
    parser.add_argument("--checkpoint", required=True, help="run directory, iter_* or HF export")
    parser.add_argument(
        "--data", required=True, help="folder with the published files and images/, or its file"
    )
    parser.add_argument("--output", required=True, help="for predictions.jsonl and scores.json")
    parser.add_argument("--blind", action="store_true", help="show black images only")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--limit", type=int, help="ask the first N questions only")
    parser.add_argument(
        "--prompt-suffix",
        help="after every question, with its own leading space, instead of the task's",
    )
    parser.add_argument("--max-new-tokens", type=int, help="instead of the task's")
    parser.add_argument("--min-new-tokens", type=int, help="instead of the task's")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    options = parser.parse_args(arguments)
    for name in ("batch_size", "limit", "max_new_tokens"):
        if (value := getattr(options, name)) is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")

    from megatron_owl2.errors import CheckpointError, ConfigError, ConversionError, InferenceError
    from megatron_owl2.evaluation import runner
    from megatron_owl2.inference.engine import load_model

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
    try:
        questions, gold = benchmark.read(task, options.data, options.limit)
        loaded = load_model(options.checkpoint, options.precision)
        result = runner.evaluate(
            loaded, options.task, questions, gold, options.output, settings, about
        )
    except (
        *(TaskError, ScoreError, InferenceError, CheckpointError, ConversionError, ConfigError),
        OSError,  # a disk that is full, an output that is a file
    ) as error:
        return _refuse(error)
    if os.environ.get("RANK", "0") == "0":
        print(runner.table(result))
    return 0


def score(arguments: list[str]) -> int:
    parser = _parser("tools/evaluate.py score")
    parser.add_argument("--predictions", required=True, help="JSON lines or a JSON list")
    parser.add_argument("--gold", required=True, help="the published answers")
    options = parser.parse_args(arguments)
    task = registry.find_benchmarks()[options.task]
    try:
        predictions = benchmark.read_predictions(task, options.predictions)
        gold = benchmark.read_gold(task, options.gold)
        result = benchmark.score(task, predictions, gold, options.variant)
    except (TaskError, ScoreError) as error:
        return _refuse(error)
    print(json.dumps(result, indent=1))
    return 0


def _parser(name: str) -> argparse.ArgumentParser:
    benchmarks = registry.find_benchmarks()
    tasks = "\n".join(registry.describe(*item) for item in benchmarks.items())
    parser = argparse.ArgumentParser(
        prog=name,
        description=__doc__,
        epilog=f"tasks:\n{tasks}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--task", required=True, choices=benchmarks, help="one of those below")
    parser.add_argument("--variant", help="of the task's scoring rule, where it has several")
    return parser


def _refuse(error: Exception) -> int:
    print(f"error: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
