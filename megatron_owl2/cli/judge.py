"""Modes of `owl2 evaluate` for benchmarks whose answers a language model judges.

owl2 evaluate requests --task NAME --predictions FILE --gold FILE --output REQUESTS [--replies FILE]
owl2 evaluate judge --requests FILE --replies FILE --base-url URL [--api-key-env NAME]

`requests` writes what a judge is to be asked, `judge` asks it. Do both again until no request is
left: replies that cannot be read are asked for again. Then
owl2 evaluate score --task NAME --replies FILE --gold FILE
"""

import argparse
import os
from pathlib import Path

from megatron_owl2.cli.command import Command, UsageError
from megatron_owl2.errors import ScoreError, TaskError


def add_requests_arguments(parser: argparse.ArgumentParser) -> None:
    from megatron_owl2.evaluation import registry

    judged = [name for name, task in registry.find_benchmarks().items() if task.judge]
    parser.add_argument("--task", required=True, choices=judged)
    parser.add_argument("--predictions", required=True, help="predictions.jsonl of the evaluation")
    parser.add_argument("--gold", required=True, help="the published answers")
    parser.add_argument("--output", required=True, help="JSON lines, in OpenAI's batch format")
    parser.add_argument("--replies", help="those that there are: only the rest is asked for")
    parser.add_argument("--runs", type=int, default=1, help="MM-Vet's figures are of 5")
    parser.add_argument("--judge-model", help="instead of the published evaluation's")
    parser.add_argument(
        "--judge-prompt",
        help="text file with {question}, {reference} and {prediction}, instead of this project's "
        "own wording; figures to compare need the published one",
    )


def write_requests(options: argparse.Namespace) -> int:
    if options.runs < 1:
        raise UsageError("--runs must be at least 1")
    from megatron_owl2.evaluation import benchmark, judge_files, registry

    task = registry.find_benchmarks()[options.task]
    judge = judge_files.judge_of(task)
    predictions = benchmark.read_predictions(task, options.predictions)
    gold = benchmark.read_gold(task, options.gold)
    prompt = judge.prompt
    if options.judge_prompt:
        prompt = _read_text(options.judge_prompt)
        judge.check(prompt, options.judge_prompt, next(iter(gold.values())))
    replies = judge_files.Replies({})
    if options.replies and Path(options.replies).exists():
        replies = judge_files.read_replies(Path(options.replies))
    try:
        count = judge_files.write_requests(
            Path(options.output),
            judge_files.requests(
                task,
                predictions,
                gold,
                replies,
                prompt=prompt,
                model=options.judge_model or judge.model,
                runs=options.runs,
            ),
        )
    except ScoreError as error:
        raise ScoreError(f"{options.predictions} and {options.gold}: {error}") from None
    print(f"{count} requests are in {options.output}" if count else "no request is left")
    return 0


def add_judge_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--requests", required=True, help="file that `requests` wrote")
    parser.add_argument("--replies", required=True, help="file to append the replies to")
    parser.add_argument(
        "--base-url", required=True, help="of an OpenAI-compatible server: https://HOST/v1"
    )
    parser.add_argument("--api-key-env", help="environment variable that holds the server's key")
    parser.add_argument("--model", help="instead of the requests'")
    parser.add_argument("--concurrency", type=int, default=8, help="requests at one time")


def ask(options: argparse.Namespace) -> int:
    if options.concurrency < 1:
        raise UsageError("--concurrency must be at least 1")
    key = os.environ.get(options.api_key_env) if options.api_key_env else None
    if options.api_key_env and not (key and key.isascii() and key.isprintable()):
        fault = "is no key of a server" if key else "is not set"
        raise UsageError(f"--api-key-env: the variable {options.api_key_env} {fault}")
    from megatron_owl2.evaluation import judge_client, judge_files

    requests = judge_files.read_requests(Path(options.requests))
    if options.model:
        requests = {i: body | {"model": options.model} for i, body in requests.items()}
    server = judge_client.Server(options.base_url, key, options.concurrency)
    made = judge_client.ask_all(requests, Path(options.replies), server)
    print(f"{made} new replies are in {options.replies}")
    return 0


def _read_text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise TaskError(f"{path} is not text in UTF-8") from None


MODES = {
    "requests": Command(
        verb="evaluate", help=__doc__, add_arguments=add_requests_arguments, run=write_requests
    ),
    "judge": Command(
        verb="evaluate",
        help=__doc__,
        add_arguments=add_judge_arguments,
        run=ask,
        interrupted="interrupted; start again to go on",
    ),
}
