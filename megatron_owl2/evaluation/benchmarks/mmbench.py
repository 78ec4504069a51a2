"""MMBench (Liu et al. 2023): multiple choice, each question in several passes of rotated options.

The published TSV holds the passes: an index of 1,000,000 k + i is pass k of question i.
"""

from collections import defaultdict
from collections.abc import Mapping
from itertools import cycle
from pathlib import Path

from megatron_owl2.errors import TaskError
from megatron_owl2.evaluation import choices
from megatron_owl2.evaluation.benchmark import Benchmark, Gold, Question
from megatron_owl2.evaluation.image_files import encoded_image
from megatron_owl2.evaluation.rows import (
    Id,
    Misfit,
    Optional,
    one_of,
    place_of,
    read_rows,
    rows_by_id,
    whole_number,
    words,
)
from megatron_owl2.evaluation.scoring import check_ids, grouped_table
from megatron_owl2.evaluation.xlsx import spreadsheet

_COPY = 1_000_000
_ABBREVIATIONS = {
    "coarse_perception": "CP",
    "finegrained_perception (instance-level)": "FP-S",
    "finegrained_perception (cross-instance)": "FP-C",
    "attribute_reasoning": "AR",
    "logic_reasoning": "LR",
    "relation_reasoning": "RR",
}
_OPTIONS = ("A", "B", "C", "D")
_GOLD = {option: Optional(words, "") for option in _OPTIONS} | {
    "index": whole_number,
    "question": words,
    "hint": Optional(words, ""),
    "answer": Optional(one_of("a", "b", "c", "d")),
    "category": Optional(words, "no category"),
    "l2-category": Optional(words, "no l2-category"),
}
_REFERENCE = 64  # characters that no image has: the index of the row whose image is meant


def read_questions(path: Path, gold: Gold) -> list[Question]:
    """Every pass of every question, the hint before it, or "N/A" as mPLUG-Owl2's script says."""
    rows = read_rows(path, {"index": whole_number, "image": words})
    images = _images(path, {row["index"]: row["image"] for row in rows})
    return [
        Question(
            id=i,
            text="\n".join(
                [row["hint"] or "N/A", row["question"], *choices.lettered(row["options"])]
            ),
            images=(images[i],),
            skill=row["skill"],
            gold=row["answer"],
        )
        for i, row in gold.items()
    ]


def _images(path: Path, encoded: dict[int, str]) -> dict[Id, bytes]:
    """The images by index; passes of a question share theirs."""
    decoded: dict[str, bytes] = {}
    images: dict[Id, bytes] = {}
    for index, value in encoded.items():
        if len(value) <= _REFERENCE and value.strip().isdigit():
            value = encoded.get(int(value), value)
        if value not in decoded:
            try:
                decoded[value] = encoded_image(value, "image")
            except Misfit as misfit:
                raise TaskError(f"{path}: {misfit} (index {index})") from None
        images[index] = decoded[value]
    return images


def read_gold(path: Path) -> Gold:
    """The rows by index; raises TaskError for options with a gap and for an answer among none."""
    gold = {}
    for i, row in rows_by_id(path, read_rows(path, _GOLD), "index").items():
        options = [row[option] for option in _OPTIONS]
        count = sum(map(bool, options))
        if count < 2 or not all(options[:count]):
            raise TaskError(
                f"{path}: index {i} must have options from A on; it has {options}{place_of(row)}"
            )
        answer = row["answer"].upper() if row["answer"] else None
        if answer and answer not in choices.LETTERS[:count]:
            raise TaskError(
                f"{path}: index {i} has the answer {answer}, which is no option of it"
                f"{place_of(row)}"
            )
        gold[i] = {
            "question": row["question"],
            "hint": row["hint"],
            "options": options[:count],
            "answer": answer,
            "skill": _ABBREVIATIONS.get(row["l2-category"], row["l2-category"]),
            "category": row["category"],
        }
    return gold


def score(predictions: Mapping, gold: Mapping, variant: str = "exact_matching") -> dict:
    """CircularEval: a question is right if all of its passes are; per l2-category and category.

    "exact_matching" reads answers by `choices.letter_or_text` and leaves out the language model
    that MMBench lets match the rest: these are wrong. `vanilla` is the accuracy of the first passes
    alone, `unresolved` counts passes. Raises ScoreError.
    """
    check_ids(predictions, gold)
    choices.check_answers(gold)
    picked = {i: choices.letter_or_text(predictions[i], row) or "-" for i, row in gold.items()}
    passes: dict[int, list[Id]] = defaultdict(list)
    for i in gold:
        passes[i % _COPY].append(i)
    table = _table(gold, picked, passes)
    vanilla = _table(gold, picked, {i: [i] for i in passes if i in gold})
    table["overall"] |= {
        "vanilla": vanilla["overall"]["accuracy"],
        "unresolved": list(picked.values()).count("-"),
    }
    for name, row in table["skills"].items():
        row["vanilla"] = vanilla["skills"].get(name, {}).get("accuracy")
    return table


def _table(gold: Mapping, picked: Mapping[Id, str], passes: Mapping[int, list[Id]]) -> dict:
    rows = {
        question: {
            "answers": [gold[i]["answer"] for i in ids],
            "skill": gold[ids[0]]["skill"],
            "category": gold[ids[0]]["category"],
        }
        for question, ids in passes.items()
    }
    return grouped_table(
        {question: "".join(picked[i] for i in ids) for question, ids in passes.items()},
        rows,
        ("skill", "category"),
        lambda row: row["answers"][0],
        lambda letters, row: float(
            all(letter == answer for letter, answer in zip(cycle(letters), row["answers"]))
        ),
    )


def submission(predictions: Mapping, gold: Mapping) -> tuple[str, bytes]:
    """The spreadsheet that MMBench's server takes."""
    rows = [
        [i, row["question"], *(row["options"] + ["", ""])[: len(_OPTIONS)], predictions[i]]
        for i, row in gold.items()
    ]
    return "mmbench.xlsx", spreadsheet([["index", "question", *_OPTIONS, "prediction"], *rows])


BENCHMARK = Benchmark(
    about="MMBench, multiple choice, right if it is in every order of the options",
    file="[mM][mM][bB]ench*.tsv",
    gold_file="[mM][mM][bB]ench*.tsv",
    id_field="index",
    answer_field="prediction",
    suffix=choices.ANSWER_WITH_LETTER,
    max_new_tokens=10,
    min_new_tokens=1,
    read_questions=read_questions,
    read_gold=read_gold,
    score=score,
    variants=("exact_matching",),
    columns=("accuracy", "vanilla", "majority", "n"),
    submission=submission,
    unanswered_rows=True,
)
