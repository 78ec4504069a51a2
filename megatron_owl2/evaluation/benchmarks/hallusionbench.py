"""HallusionBench (Guan et al. 2024): yes-or-no questions asked of an image and of its alterations.

VD questions need their figure. VS questions are also asked without one, as figure 0, where "I do
not know" is right.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron_owl2.evaluation.benchmark import Benchmark, Gold, Question
from megatron_owl2.evaluation.image_files import one_of_named
from megatron_owl2.evaluation.judge import Judge
from megatron_owl2.evaluation.rows import (
    Id,
    Misfit,
    Optional,
    identifier,
    one_of,
    read_rows,
    rows_by_id,
    text,
    whole_number,
    words,
)
from megatron_owl2.evaluation.scoring import check_ids, grouped_table, percent

NO, YES, UNCLEAR = "0", "1", "2"  # as the published files write them

_OWN = ("id", "answer", "skill")  # fields of gold that no file has


def _binary(value: Any, name: str) -> int:
    number = whole_number(value, name)
    if number > 1:
        raise Misfit(name, f"is {number}, wanted 0 or 1")
    return number


_FIELDS = {
    "category": one_of("vd", "vs"),
    "subcategory": words,
    "visual_input": whole_number,
    "set_id": identifier,
    "figure_id": whole_number,
    "question_id": identifier,
    "question": words,
    "gt_answer": _binary,
    "gt_answer_details": text,
    "filename": Optional(words),
}


def read_questions(path: Path, gold: Gold) -> list[Question]:
    """The questions; images lie below `images/` as in the archive, or without its outer folder."""
    return [
        Question(
            id=i,
            text=row["question"],
            images=_images(path, row) if row["visual_input"] else (),
            skill=row["skill"],
            gold={NO: "no", YES: "yes"}.get(row["answer"]),
        )
        for i, row in gold.items()
    ]


def _images(path: Path, row: Mapping) -> tuple[Path]:
    folder = f"{row['category']}/{row['subcategory']}"
    name = (row["filename"] or f"{folder}/{row['set_id']}_{row['figure_id']}.png").removeprefix(
        "./"
    )
    return (one_of_named(path, name, name.removeprefix("hallusion_bench/")),)


def read_gold(path: Path) -> Gold:
    """The rows by category, subcategory, set, figure and question, joined by "_"."""
    rows = []
    for row in read_rows(path, _FIELDS):
        row = row | {"category": row["category"].upper()}
        parts = ("category", "subcategory", "set_id", "figure_id", "question_id")
        rows.append(
            row
            | {
                "id": "_".join(str(row[part]) for part in parts),
                "answer": YES if row["gt_answer"] else NO,
                "skill": f"{row['category']} {row['subcategory']}",
            }
        )
    return rows_by_id(path, rows, "id")


def score(predictions: Mapping, gold: Mapping, variant: str = "yes_no") -> dict:
    """Accuracy per question (aAcc), qAcc and fAcc, overall, per category and per subcategory.

    qAcc is the share of questions that are right for all of their figures, fAcc that of figures
    with all of their questions right; figure 0 of VS is none. `easy` is the share of questions that
    are right for figure 0, `hard` of those that are right for all others. `unresolved` counts
    answers that are neither yes nor no. "yes_no" reads the word from an answer; with "judged" the
    predictions are the replies of a language model that was asked whether the answers are
    "correct", "incorrect" or "unclear"; its prompt here is not the published one, see
    `--judge-prompt`. Raises ScoreError.
    """
    check_ids(predictions, gold)
    said = {
        i: yes_or_no(predictions[i]) if variant == "yes_no" else _judged(predictions[i], row)
        for i, row in gold.items()
    }
    fields = ("category", "skill")
    table = grouped_table(
        said,
        gold,
        fields,
        lambda row: row["answer"],
        lambda answer, row: float(_is_right(answer, row)),
    )
    for name, row in table["skills"].items():
        inside = {i: r for i, r in gold.items() if name in (r[field] for field in fields)}
        row |= _grouped(inside, said)
    table["overall"] |= _grouped(gold, said)
    return table


def yes_or_no(answer: str) -> str:
    """YES or NO if the answer has just one of the two words, else UNCLEAR."""
    found = set(re.findall(r"[a-z]+", answer.lower())) & {"yes", "no"}
    return {"yes": YES, "no": NO}[found.pop()] if len(found) == 1 else UNCLEAR


def _judged(reply: str, row: Mapping) -> str:
    """What an answer said, by the judge's reply, in which "correct" is part of "incorrect"."""
    reply = reply.lower()
    if "incorrect" in reply:
        return NO if row["answer"] == YES else YES
    return row["answer"] if "correct" in reply else UNCLEAR


def _is_right(answer: str, row: Mapping) -> bool:
    return answer == row["answer"] or (answer == UNCLEAR and _has_no_figure(row))


def _has_no_figure(row: Mapping) -> bool:
    return row["category"] == "VS" and row["figure_id"] == 0


def _grouped(gold: Mapping, said: Mapping[Id, str]) -> dict[str, float | int]:
    questions, figures, easy, hard = (defaultdict(list) for _ in range(4))
    for i, row in gold.items():
        right = _is_right(said[i], row)
        group = (row["category"], row["subcategory"], row["set_id"])
        question = (*group, row["question_id"])
        questions[question].append(right)
        (hard if row["figure_id"] else easy)[question].append(right)
        if not _has_no_figure(row):
            figures[*group, row["figure_id"]].append(right)
    return {
        "qAcc": _share_of_all(questions.values()),
        "fAcc": _share_of_all(figures.values()),
        "easy": _share_of_all(easy.values()),
        "hard": _share_of_all(hard.values()),
        "unresolved": sum(said[i] == UNCLEAR for i in gold),
    }


def _share_of_all(groups: Iterable[list[bool]]) -> float:
    groups = list(groups)
    return percent(sum(map(all, groups)), len(groups))


def submission(predictions: Mapping, gold: Mapping) -> tuple[str, bytes]:
    """The rows with `model_prediction`, as the published evaluation reads them for its judge."""
    rows = [
        {name: _as_published(value) for name, value in row.items() if name not in _OWN}
        | {"model_prediction": predictions[i]}
        for i, row in gold.items()
    ]
    return "HallusionBench_result.json", json.dumps(rows).encode()


def _as_published(value: Any) -> Any:
    return str(value) if isinstance(value, int) else value


_PROMPT = """\
A student answered a question about an image, with yes or no and perhaps more. You have the answer \
key. Say of the student's answer
correct - it says what the key says, though in other words, more briefly or with details beside it,
incorrect - it says something else or the opposite, or holds a statement that the key contradicts,
unclear - it does not decide, for instance because the student cannot see or know it.
Reply with one of the words correct, incorrect and unclear.

Question: {question}
Answer key: {reference}
Student's answer: {prediction}
Your word: """


def _fields(answer: str, row: Mapping) -> dict[str, str]:
    return {
        "question": row["question"],
        "reference": row["gt_answer_details"],
        "prediction": answer,
    }


BENCHMARK = Benchmark(
    about="HallusionBench, yes or no, of figures and of altered ones",
    file="HallusionBench*.json",
    gold_file="HallusionBench*.json",
    id_field="id",
    answer_field="model_prediction",
    suffix="",
    max_new_tokens=64,
    min_new_tokens=1,
    read_questions=read_questions,
    read_gold=read_gold,
    score=score,
    variants=("yes_no", "judged"),
    columns=("accuracy", "qAcc", "fAcc", "easy", "hard", "majority", "unresolved", "n"),
    submission=submission,
    unanswered_rows=True,
    judge=Judge(
        prompt=_PROMPT,
        fields=_fields,
        model="gpt-4",
        max_tokens=16,
        readable=lambda reply: True,  # what is neither correct nor incorrect is unclear
        variant="judged",
    ),
)
