"""ARC (Clark et al. 2018): school science, multiple choice, from AI2's JSON lines or Parquet.

The file that is named says which set and split are asked; OpenCompass asks dev, lm-eval test.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_owl2.errors import TaskError
from megatron_owl2.evaluation import choices, likelihood
from megatron_owl2.evaluation.benchmark import Benchmark, Gold, Question
from megatron_owl2.evaluation.rows import (
    Optional,
    list_of,
    object_of,
    place_of,
    read_rows,
    rows_by_id,
    text,
    words,
)

_OPTIONS = object_of(text=list_of(text), label=list_of(words))
_STEM = object_of(stem=words, choices=list_of(object_of(text=text, label=words)))


def _question(value: Any, name: str) -> Any:
    """AI2's object with the options inside it, or the text that Hugging Face's table has."""
    return _STEM(value, name) if isinstance(value, dict) else words(value, name)


_FIELDS = {
    "id": words,
    "question": _question,
    "choices": Optional(_OPTIONS),
    "answerKey": words,
}


def read_questions(path: Path, gold: Gold) -> list[Question]:
    """The questions as OpenCompass's generation task words them, whatever the options' labels."""
    return [
        Question(
            id=i,
            text="\n".join([f"Question: {row['question']}", *choices.lettered(row["options"])]),
            images=(),
            skill=row["skill"],
            gold=row["answer"],
        )
        for i, row in gold.items()
    ]


def read_as_opencompass(path: Path, gold: Gold) -> list[Question]:
    """The questions as OpenCompass compares perplexities: of a whole text per option."""
    return _by_likelihood(
        path,
        gold,
        lambda question, option: ("", f"Question: {question}\nAnswer: {option}"),
        likelihood.per_position,
    )


def read_as_lm_eval(path: Path, gold: Gold) -> list[Question]:
    """The questions as lm-eval's acc compares them: the options after one text."""
    return _by_likelihood(path, gold, _lm_eval_pair, likelihood.total)


def read_as_lm_eval_norm(path: Path, gold: Gold) -> list[Question]:
    """The same for acc_norm, in which a character of each option counts alike."""
    return _by_likelihood(path, gold, _lm_eval_pair, likelihood.per_character)


def _lm_eval_pair(question: str, option: str) -> tuple[str, str]:
    return f"Question: {question}\nAnswer:", f" {option}"


def _by_likelihood(
    path: Path,
    gold: Gold,
    pair: Callable[[str, str], tuple[str, str]],
    measure: likelihood.Measure,
) -> list[Question]:
    def candidates(row: Mapping) -> likelihood.Candidates:
        pairs = (pair(row["question"], option) for option in row["options"])
        return likelihood.Candidates(tuple(pairs), measure)

    return [
        replace(question, candidates=candidates(gold[question.id]))
        for question in read_questions(path, gold)
    ]


def read_gold(path: Path) -> Gold:
    """The rows by id; the options labelled A to E or 1 to 5 are lettered in their order.

    Raises TaskError for an answer that is the label of none.
    """
    nearest = [path.name, *(folder.name for folder in path.resolve().parents)]
    name = next(filter(None, (re.search("ARC-(?:Challenge|Easy)", n) for n in nearest)), None)
    gold = {}
    for i, row in rows_by_id(path, read_rows(path, _FIELDS), "id").items():
        question, labels, options = _parts(row)
        if row["answerKey"] not in labels or len(labels) != len(options):
            raise TaskError(
                f"{path}: the answer of question {i!r} is {row['answerKey']!r}, its options are "
                f"labelled {', '.join(labels) or 'nothing'}{place_of(row)}"
            )
        choices.check_count(options, f"{path}: question {i!r}{place_of(row)}")
        gold[i] = {
            "question": question,
            "options": options,
            "answer": choices.LETTERS[labels.index(row["answerKey"])],
            "skill": name[0] if name else "ARC",
        }
    return gold


def _parts(row: Mapping) -> tuple[str, list[str], list[str]]:
    """Question, labels and options."""
    if isinstance(row["question"], dict):
        listed = row["question"]["choices"]
        labels, options = [c["label"] for c in listed], [c["text"] for c in listed]
        return row["question"]["stem"], labels, options
    listed = row["choices"] or {"label": [], "text": []}
    return row["question"], listed["label"], listed["text"]


def score(predictions: Mapping, gold: Mapping, variant: str = "generation") -> dict:
    """Accuracy of the letters that the model says under "generation", else of those of the most
    likely options: "opencompass", and lm-eval's acc and acc_norm. Raises ScoreError."""
    pick = choices.stated_letter if variant == "generation" else choices.whole_answer
    return choices.score_choices(predictions, gold, pick)


BENCHMARK = Benchmark(
    about="ARC, multiple choice in school science",
    file="ARC-*.jsonl",
    gold_file="ARC-*.jsonl",
    id_field="id",
    answer_field="answer",
    suffix="\nAnswer:",
    max_new_tokens=10,
    min_new_tokens=1,
    read_questions=read_questions,
    read_gold=read_gold,
    score=score,
    variants=("generation", "opencompass", "lm_eval", "lm_eval_norm"),
    by_likelihood={
        "opencompass": read_as_opencompass,
        "lm_eval": read_as_lm_eval,
        "lm_eval_norm": read_as_lm_eval_norm,
    },
    columns=choices.COLUMNS,
)
