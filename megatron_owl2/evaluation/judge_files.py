"""Files of judged benchmarks: requests as OpenAI's batch interface takes them, and replies.

A request's `custom_id` is RUN.ATTEMPT.ID: the run of the whole benchmark and the attempt to get a
reply that can be read, from 1, and the question's id. A reply is a row of `custom_id` and `text`.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

from megatron_owl2.errors import ScoreError, TaskError
from megatron_owl2.evaluation.benchmark import Benchmark, Gold
from megatron_owl2.evaluation.benchmark import score as score_predictions
from megatron_owl2.evaluation.judge import Judge
from megatron_owl2.evaluation.rows import (
    Id,
    Misfit,
    list_of,
    object_of,
    read_rows,
    rows_by_id,
    text,
    whole_number,
    with_ids_of,
    words,
)
from megatron_owl2.evaluation.scoring import check_ids

_REQUEST = {"custom_id": words, "body": object_of(messages=list_of(object_of(role=words)))}
REPLY = {"custom_id": words, "text": text}


@dataclass(frozen=True)
class Replies:
    """Replies by run, question's id as a text, and attempt."""

    texts: Mapping[int, Mapping[str, Mapping[int, str]]]

    def chosen(self, judge: Judge, run: int, i: Id) -> tuple[int, str | None]:
        """The number of attempts made and the first reply that can be read, else the last."""
        attempts = self.texts.get(run, {}).get(str(i), {})
        for attempt in sorted(attempts):
            if judge.readable(attempts[attempt]):
                return attempt, attempts[attempt]
        last = max(attempts, default=0)
        return last, attempts.get(last)


def judge_of(benchmark: Benchmark) -> Judge:
    """The judge of a benchmark; raises TaskError if it has none."""
    if benchmark.judge is None:
        raise TaskError("this task has no judge; its answers are scored as they are")
    return benchmark.judge


def requests(
    benchmark: Benchmark,
    predictions: dict[Id, str],
    gold: Gold,
    replies: Replies,
    *,
    prompt: str,
    model: str,
    runs: int = 1,
) -> Iterator[dict[str, Any]]:
    """The requests that are still to be made, each of them once: of questions without a reply, or
    without one that can be read in fewer attempts than the judge makes. Raises ScoreError."""
    judge = judge_of(benchmark)
    predictions = with_ids_of(gold, predictions)
    check_ids(predictions, gold)
    for run in range(1, runs + 1):
        for i, row in gold.items():
            made, reply = replies.chosen(judge, run, i)
            if made >= judge.attempts or (reply is not None and judge.readable(reply)):
                continue
            yield {
                "custom_id": f"{run}.{made + 1}.{i}",
                "method": "POST",
                "url": "/v1/chat/completions",
                "body": judge.body(prompt, model, predictions[i], row, made + 1),
            }


def read_requests(path: Path) -> dict[str, dict[str, Any]]:
    """{custom_id: body} of a file of requests.

    Raises TaskError for rows that are none, and ids that come twice.
    """
    rows = rows_by_id(path, read_rows(path, _REQUEST), "custom_id")
    return {str(i): row["body"] for i, row in rows.items()}


def read_replies(path: Path) -> Replies:
    """The replies of a file; raises TaskError for rows that are none, and ids that come twice."""
    texts: dict[int, dict[str, dict[int, str]]] = {}
    for i, row in rows_by_id(path, read_rows(path, REPLY), "custom_id").items():
        run, attempt, question = _parts(path, str(i))
        texts.setdefault(run, {}).setdefault(question, {})[attempt] = row["text"]
    return Replies(texts)


def _parts(path: Path, custom_id: str) -> tuple[int, int, str]:
    try:
        run, attempt, question = custom_id.split(".", 2)
        return whole_number(run, "run"), whole_number(attempt, "attempt"), question
    except (ValueError, Misfit):
        raise TaskError(
            f"{path}: the custom_id {custom_id!r} is not RUN.ATTEMPT.ID as in the requests"
        ) from None


def write_requests(path: Path, rows: Iterator[dict[str, Any]]) -> int:
    """The number of requests written, one JSON line each."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")
    return len(lines)


def score_replies(benchmark: Benchmark, replies: Replies, gold: Gold) -> dict:
    """The score of a judge's replies: that of the only run, or the means of several.

    Of several runs, `score_std` is the deviation of the overall score among the runs (with their
    number as the divisor). A question that no attempt got a readable reply for counts as the
    benchmark's rule says. Raises ScoreError for questions that a run has no reply for.
    """
    judge, tables = judge_of(benchmark), []
    known = set(map(str, gold))
    for run in sorted(replies.texts):
        texts = {i: replies.chosen(judge, run, i)[1] for i in gold}
        said = {i: reply for i, reply in texts.items() if reply is not None}
        unknown = {i: "" for i in replies.texts[run] if i not in known}
        if len(said) < len(gold):
            lost = next(i for i in gold if i not in said)
            raise ScoreError(
                f"{len(gold) - len(said)} of {len(gold)} questions have no reply in run {run}, "
                f"such as {lost!r}; ask the judge for them"
            )
        tables.append(score_predictions(benchmark, said | unknown, gold, judge.variant))
    if not tables:
        raise ScoreError("there are no replies")
    return tables[0] if len(tables) == 1 else _mean_of_runs(tables)


def _mean_of_runs(tables: list[dict]) -> dict:
    overall = _mean_row([table["overall"] for table in tables])
    values = [table["overall"]["score" if "score" in overall else "accuracy"] for table in tables]
    overall |= {"score_std": round(pstdev(values), 2), "runs": len(tables)}
    names = tables[0]["skills"]
    skills = {name: _mean_row([table["skills"][name] for table in tables]) for name in names}
    return {"overall": overall, "skills": skills}


def _mean_row(rows: list[dict]) -> dict:
    """The mean of every number, a whole number where all are equal."""
    return {
        name: value
        if all(row[name] == value for row in rows)
        else round(fmean(row[name] for row in rows), 3)
        for name, value in rows[0].items()
    }
