"""Helpers of the benchmarks' scoring rules: tables per skill, percentages, exact match.

Pure Python. Predictions are the model's texts by question id, gold the published rows by the same
ids. Every benchmark's score is {"overall": row, "skills": {name: row}} with rows of `accuracy` and
`majority` in percent, `n` questions, and what else the rule defines. `majority` is the accuracy of
always giving the most frequent gold answer of that skill: what can be had without looking.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from megatron_owl2.errors import MissingPredictionsError, ScoreError

RATINGS = ("A", "B", "C", "D")  # that people give, the best first
_LISTED = 10  # ids in a message


def exact_match(predictions: Mapping, gold: Mapping) -> dict:
    """Share of predictions equal to one of a row's `answers` up to white space, per `skill`.

    The first answer counts for the majority. Raises ScoreError for missing or unknown ids.
    """
    check_ids(predictions, gold)
    return score_table(
        [(row["skill"], row, predictions[i]) for i, row in gold.items()],
        lambda row: _squeeze(row["answers"][0]),
        lambda answer, row: float(_squeeze(answer) in map(_squeeze, row["answers"])),
    )


def score_table(
    items: Sequence[tuple[str, Mapping, str]],
    gold_answer: Callable[[Mapping], str],
    accuracy: Callable[[str, Mapping], float],
    equal_skills: bool = False,
) -> dict:
    """Rows per skill and overall from (skill, gold row, prediction); accuracy is 0 to 1.

    With `equal_skills` overall is the mean of the skills, however many questions each has, and
    `by_question` that of the questions.
    """
    skills: dict[str, dict] = {}
    total, without_looking = 0.0, 0.0
    shares: list[tuple[float, float]] = []
    for skill, pairs in sorted(group_by_skill((skill, pair) for skill, *pair in items).items()):
        counts = Counter(gold_answer(row) for row, _ in pairs)
        majority = min(counts, key=lambda answer: (-counts[answer], answer))
        right = sum(accuracy(prediction, row) for row, prediction in pairs)
        blind = sum(accuracy(majority, row) for row, _ in pairs)
        skills[skill] = _row(right, blind, len(pairs))
        total, without_looking = total + right, without_looking + blind
        shares.append((right / len(pairs), blind / len(pairs)))
    overall = _row(total, without_looking, len(items))
    if equal_skills:
        by_skill = _row(sum(r for r, _ in shares), sum(b for _, b in shares), len(shares))
        overall |= by_skill | {"n": len(items), "by_question": overall["accuracy"]}
    return {"overall": overall, "skills": skills}


def grouped_table(
    predictions: Mapping,
    gold: Mapping,
    fields: Sequence[str],
    gold_answer: Callable[[Mapping], str],
    accuracy: Callable[[str, Mapping], float],
    equal_skills: bool = False,
) -> dict:
    """`score_table` of rows that are in a group by each of several fields, all under "skills"; the
    first field's are the ones that `equal_skills` means."""
    tables = [
        score_table(
            [(row[field], row, predictions[i]) for i, row in gold.items()],
            gold_answer,
            accuracy,
            equal_skills,
        )
        for field in fields
    ]
    skills = {name: row for table in tables for name, row in table["skills"].items()}
    return {"overall": tables[0]["overall"], "skills": skills}


def _row(right: float, majority: float, n: int) -> dict:
    return {"accuracy": percent(right, n), "majority": percent(majority, n), "n": n}


def group_by_skill(pairs: Iterable[tuple[str, Any]]) -> dict[str, list]:
    """{skill: items} from (skill, item)."""
    groups: dict[str, list] = defaultdict(list)
    for skill, item in pairs:
        groups[skill].append(item)
    return groups


def count_ratings(ratings: Sequence[str]) -> dict[str, int]:
    """{rating: how often} with their number `n`."""
    counts = Counter(ratings)
    return {rating: counts[rating] for rating in RATINGS} | {"n": len(ratings)}


def percent(part: float, whole: float) -> float:
    """100 * part / whole rounded to 2 digits, 0 of nothing."""
    return round(100 * part / whole, 2) if whole else 0.0


def _squeeze(text: str) -> str:
    return " ".join(text.split())


def check_ids(predictions: Mapping, gold: Mapping) -> None:
    """Refusal of missing and unknown ids, and of no gold at all, as ScoreError."""
    if not gold:
        raise ScoreError("the gold holds no question")
    missing = [i for i in gold if i not in predictions]
    if missing:
        listed = ", ".join(map(repr, missing[:_LISTED]))
        more = ", ..." if len(missing) > _LISTED else ""
        raise MissingPredictionsError(
            f"{len(missing)} of {len(gold)} gold questions have no prediction: {listed}{more}"
        )
    unknown = [i for i in predictions if i not in gold]
    known = set(map(str, gold)) if unknown else set()
    if twice := [i for i in unknown if str(i) in known]:
        raise ScoreError(f"predictions have the id {twice[0]} twice, as a number and as a text")
    if unknown:
        raise ScoreError(
            f"{len(unknown)} predictions have no gold, such as {unknown[0]!r}; is this the gold of "
            "another set?"
        )
