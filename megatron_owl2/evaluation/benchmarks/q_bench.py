"""Q-Bench A1 (Wu et al. 2024), LLVisionQA: multiple choice about how an image looks.

Read are the published JSON and the Parquet table of the same rows.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from megatron_owl2.errors import TaskError
from megatron_owl2.evaluation import choices
from megatron_owl2.evaluation.benchmark import Benchmark, Gold, Question
from megatron_owl2.evaluation.image_files import encoded_image, named_image
from megatron_owl2.evaluation.prompts import ADAPTER_CHOICE
from megatron_owl2.evaluation.rows import (
    Id,
    Optional,
    list_of,
    read_rows,
    text,
    whole_number,
    words,
)

_TYPES = ("yes-or-no", "what", "how")
_CONCERNS = ("distortion", "other", "in-context distortion", "in-context other")
_LISTED = {
    "img_path": words,
    "question": words,
    "candidates": list_of(words, at_least=2),
    "correct_ans": Optional(words),
    "type": Optional(whole_number),
    "concern": Optional(whole_number),
}
_TABLED = {f"option{n}": Optional(text, "N/A") for n in range(4)} | {
    "question": words,
    "correct_choice": Optional(words),
    "question_type": Optional(whole_number),
    "question_concern": Optional(whole_number),
}


def read_questions(path: Path, gold: Gold) -> list[Question]:
    """The questions in the file's order."""
    images: dict[Id, Path | bytes] = {}
    if _is_table(path):
        images |= enumerate(row["image"] for row in read_rows(path, {"image": encoded_image}))
    else:
        images |= {i: named_image(path, row["img_path"]) for i, row in gold.items()}
    return [
        Question(
            id=i,
            text=choices.show(row["question"], row["options"]),
            images=(images[i],),
            skill=row["skill"],
            gold=row["answer"],
        )
        for i, row in gold.items()
    ]


def read_gold(path: Path) -> Gold:
    """The rows by their place in the file, from 0; the test split has no answers.

    Raises TaskError for an answer that is none of the options.
    """
    gold = {}
    for i, row in enumerate(_rows(path)):
        gold[i] = {
            **row,
            "answer": _letter(path, i, row["answer"], row["options"]),
            "skill": _name(path, i, "type", row["type"], _TYPES),
            "about": _name(path, i, "concern", row["concern"], _CONCERNS),
        }
    return gold


def _rows(path: Path) -> list[dict]:
    """The rows of either form under the names of the JSON; `answer` is a text or a letter."""
    if not _is_table(path):
        rows = read_rows(path, _LISTED)
        return [
            {key: row[key] for key in ("img_path", "question", "type", "concern")}
            | {"options": row["candidates"], "answer": row["correct_ans"]}
            for row in rows
        ]
    return [
        {
            "question": row["question"],
            "options": [x for n in range(4) if (x := row[f"option{n}"]) != "N/A"],
            "answer": row["correct_choice"],
            "type": row["question_type"],
            "concern": row["question_concern"],
        }
        for row in read_rows(path, _TABLED)
    ]


def _is_table(path: Path) -> bool:
    return path.suffix.lower() == ".parquet"


def _letter(path: Path, i: int, answer: str | None, options: list[str]) -> str | None:
    if answer is None or (_is_table(path) and answer in [*choices.LETTERS[: len(options)]]):
        return answer
    texts = [option.strip().lower() for option in options]
    if answer.strip().lower() not in texts:
        raise TaskError(f"{path}: the answer of row {i} (from 0), {answer!r}, is none of {options}")
    return choices.LETTERS[texts.index(answer.strip().lower())]


def _name(path: Path, i: int, field: str, number: int | None, names: tuple[str, ...]) -> str:
    if number is None:
        return f"no {field}"
    if number >= len(names):
        raise TaskError(
            f"{path}: the {field} of row {i} (from 0) is {number}, not 0 to {len(names) - 1}"
        )
    return names[number]


def score(predictions: Mapping, gold: Mapping) -> dict:
    """Accuracy per type of question and per concern, by a letter or the text of one option.

    Raises ScoreError.
    """
    return choices.score_choices(predictions, gold, choices.letter_or_text, ("skill", "about"))


def submission(predictions: Mapping, gold: Mapping) -> tuple[str, bytes]:
    """The rows with the model's `response`, as Q-Bench's authors take them by e-mail."""
    kept = ("img_path", "question", "type", "concern")
    rows = [
        {key: row[key] for key in kept if key in row}
        | {"candidates": row["options"], "response": predictions[i]}
        for i, row in gold.items()
    ]
    return "q_bench.json", json.dumps(rows, indent=1).encode()


BENCHMARK = Benchmark(
    about="Q-Bench A1, multiple choice about the quality of an image",
    file="llvisionqa*.json",
    gold_file="llvisionqa*.json",
    id_field="index",
    answer_field="response",
    suffix=choices.ANSWER_WITH_LETTER,
    max_new_tokens=10,
    min_new_tokens=1,
    read_questions=read_questions,
    read_gold=read_gold,
    score=score,
    columns=choices.COLUMNS,
    submission=submission,
    unanswered_rows=True,
    official=ADAPTER_CHOICE,
)
