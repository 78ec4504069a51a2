"""Files of judged benchmarks: requests as OpenAI's batch interface takes them, and replies.

A request's `custom_id` is RUN.ATTEMPT-MARK.ID: the run of the whole benchmark and the attempt to
get a reply that can be read, from 1, a mark of the request, and the question's id. A reply is a row
of `custom_id` and `text`. By the mark it is known what it is a reply to; those of earlier versions
have none, and are taken as they are.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
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
_MARK = re.compile(r"^(\d+\.\d+)-[0-9a-f]{8}\.")


@dataclass(frozen=True)
class Replies:
    """Replies by run, question's id as a text, and attempt; `marks` of those that have one."""

    texts: Mapping[int, Mapping[str, Mapping[int, str]]]
    marks: Mapping[tuple[int, str, int], str] = field(default_factory=dict)

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
    without one that can be read in fewer attempts than the judge makes. Raises ScoreError, also for
    replies to other requests."""
    judge = judge_of(benchmark)
    predictions = with_ids_of(gold, predictions)
    check_ids(predictions, gold)
    for run in range(1, runs + 1):
        for i, row in gold.items():
            bodies = partial(judge.body, prompt, model, predictions[i], row)
            for attempt in replies.texts.get(run, {}).get(str(i), {}):
                mark = replies.marks.get((run, str(i), attempt))
                if mark not in (None, _mark(bodies(attempt))):
                    raise ScoreError(
                        f"the reply {run}.{attempt}-{mark}.{i} is to another answer, judge's model "
                        "or prompt; give another file of --replies"
                    )
            made, reply = replies.chosen(judge, run, i)
            if made >= judge.attempts or (reply is not None and judge.readable(reply)):
                continue
            body = bodies(made + 1)
            yield {
                "custom_id": f"{run}.{made + 1}-{_mark(body)}.{i}",
                "method": "POST",
                "url": "/v1/chat/completions",
                "body": body,
            }


def _mark(body: Mapping[str, Any]) -> str:
    content = json.dumps([body["model"], body["messages"]])
    return hashlib.sha256(content.encode()).hexdigest()[:8]


def unmarked(custom_id: str) -> str:
    """RUN.ATTEMPT.ID of a custom_id, which is as it was if it has no mark."""
    return _MARK.sub(r"\1.", custom_id)


def read_requests(path: Path) -> dict[str, dict[str, Any]]:
    """{custom_id: body} of a file of requests.

    Raises TaskError for rows that are none, and ids that come twice.
    """
    rows = rows_by_id(path, read_rows(path, _REQUEST), "custom_id")
    return {str(i): row["body"] for i, row in rows.items()}


def read_replies(path: Path) -> Replies:
    """The replies of a file; raises TaskError for rows that are none, and ids that come twice."""
    texts: dict[int, dict[str, dict[int, str]]] = {}
    marks: dict[tuple[int, str, int], str] = {}
    for i, row in rows_by_id(path, read_rows(path, REPLY), "custom_id").items():
        run, attempt, mark, question = _parts(path, str(i))
        of_question = texts.setdefault(run, {}).setdefault(question, {})
        if attempt in of_question:
            raise TaskError(
                f"{path} holds replies to several requests {unmarked(str(i))}, about different "
                "answers or of different judges; leave those of one"
            )
        of_question[attempt] = row["text"]
        if mark:
            marks[run, question, attempt] = mark
    return Replies(texts, marks)


def _parts(path: Path, custom_id: str) -> tuple[int, int, str, str]:
    """Run, attempt, mark ("" if it has none) and question."""
    try:
        run, attempt, question = custom_id.split(".", 2)
        attempt, _, mark = attempt.partition("-")
        return whole_number(run, "run"), whole_number(attempt, "attempt"), mark, question
    except (ValueError, Misfit):
        raise TaskError(
            f"{path}: the custom_id {custom_id!r} is not RUN.ATTEMPT-MARK.ID as in the requests"
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
