"""Questions on short videos with a word as their answer: how they are read, asked and scored."""

import ast
import json
from collections.abc import Callable, Mapping
from pathlib import Path

from megatron_owl2.evaluation.benchmark import Gold, Question
from megatron_owl2.evaluation.judge import Judge
from megatron_owl2.evaluation.rows import Id, identifier, read_rows, rows_by_id, words
from megatron_owl2.evaluation.scoring import check_ids, group_by_skill, percent, score_table
from megatron_owl2.evaluation.video_files import Video

FRAMES = 4  # of a video, as version 1 took; mPLUG-Owl2's number is not published
VARIANTS = ("exact_match", "judged")
COLUMNS = ("accuracy", "score", "majority", "n")
_KINDS = ("what", "who", "how", "where", "when")  # the words that questions are counted by
_FIELDS = {"id": identifier, "video_id": identifier, "question": words, "answer": words}


def read_gold(path: Path) -> Gold:
    """The rows of a `test_qa.json` by their id."""
    rows = rows_by_id(path, read_rows(path, _FIELDS), "id")
    return {i: row | {"skill": kind(row["question"])} for i, row in rows.items()}


def questions_on(gold: Gold, find: Callable[[Mapping], Path]) -> list[Question]:
    """The questions, each on the video that `find` gives for its row."""
    return [
        Question(i, row["question"], (Video(find(row), FRAMES),), row["skill"], row["answer"])
        for i, row in gold.items()
    ]


def kind(question: str) -> str:
    """The word that a question begins with, of those that the sets are counted by."""
    first = question.split()[0].lower()
    return first if first in _KINDS else "other"


def score(predictions: Mapping, gold: Mapping, variant: str = "exact_match") -> dict:
    """Accuracy per first word of the questions: of answers under "exact_match", up to letter case
    and white space around them, of a judge's replies under "judged".

    A reply is a dictionary as Python writes it, {'pred': 'yes', 'score': 4.8}. `accuracy` is the
    share of "yes" among "yes" and "no", `score` the mean of scores cut to whole numbers;
    `unreadable` counts replies that are no such text, which the published evaluation asks again and
    which are left out of both. Raises ScoreError.
    """
    check_ids(predictions, gold)
    if variant == "exact_match":
        return score_table(
            [(row["skill"], row, predictions[i]) for i, row in gold.items()],
            lambda row: row["answer"],
            lambda answer, row: float(_plain(answer) == _plain(row["answer"])),
        )
    skills = group_by_skill((row["skill"], verdict(predictions[i])) for i, row in gold.items())
    return {
        "overall": _judged([verdict(predictions[i]) for i in gold]),
        "skills": {name: _judged(found) for name, found in sorted(skills.items())},
    }


def _plain(text: str) -> str:
    return text.lower().strip()


def verdict(reply: str) -> tuple[str, int] | None:
    """What a judge says, "yes", "no" or "", and its score; None for a reply that says neither."""
    try:
        said = ast.literal_eval(reply.strip())
        pred, number = said["pred"], int(said["score"])
    except (ValueError, SyntaxError, TypeError, KeyError, MemoryError, RecursionError):
        return None
    except OverflowError:  # an infinite score
        return None
    if not isinstance(pred, str):
        return None
    pred = pred.lower()
    return ("yes" if "yes" in pred else "no" if "no" in pred else ""), number


def _judged(verdicts: list[tuple[str, int] | None]) -> dict:
    read = [verdict for verdict in verdicts if verdict is not None]
    yes, no = (sum(said == word for said, _ in read) for word in ("yes", "no"))
    return {
        "accuracy": percent(yes, yes + no),
        "score": round(sum(number for _, number in read) / len(read), 3) if read else 0.0,
        "unreadable": len(verdicts) - len(read),
        "n": len(verdicts),
    }


def submission(predictions: Mapping[Id, str], gold: Gold) -> tuple[str, bytes]:
    """The rows that Video-ChatGPT's judge script takes."""
    rows = [
        {"id": i, "question": row["question"], "answer": row["answer"], "pred": predictions[i]}
        for i, row in gold.items()
    ]
    return "video_qa.json", json.dumps(rows).encode()


_PROMPT = """\
You compare answers to questions about videos with the right ones. Go by the meaning: synonyms, \
paraphrases and more general or more exact words for the same thing are right, and the answer need \
not repeat the right one. Decide whether the prediction matches.
---
Question: {question}
Correct answer: {reference}
Predicted answer: {prediction}

Reply with nothing but a Python dictionary with the keys 'pred', which is 'yes' or 'no', and \
'score', a whole number from 0, no match, to 5, a full match, such as {'pred': 'no', 'score': 1}."""


def _fields(answer: str, row: Mapping) -> dict[str, str]:
    return {"question": row["question"], "reference": row["answer"], "prediction": answer}


JUDGE = Judge(
    prompt=_PROMPT,
    fields=_fields,
    model="gpt-3.5-turbo",
    max_tokens=64,
    readable=lambda reply: verdict(reply) is not None,
    attempts=5,
    variant="judged",
)
