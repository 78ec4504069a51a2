"""MMMU (Yue et al. 2024), validation: college questions with images between their words.

Most are multiple choice, the others want a word or a number.
"""

import ast
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from megatron_owl2.data.shards.records import IMAGE_PLACEHOLDER
from megatron_owl2.errors import TaskError
from megatron_owl2.evaluation import choices
from megatron_owl2.evaluation.benchmark import SHORT_ANSWER, Benchmark, Gold, Question, files_of
from megatron_owl2.evaluation.image_files import encoded_image
from megatron_owl2.evaluation.rows import (
    Misfit,
    Optional,
    list_of,
    one_of,
    place_of,
    read_rows,
    rows_by_id,
    text,
    words,
)
from megatron_owl2.evaluation.scoring import check_ids, grouped_table

FILES = "*/validation-*.parquet"
_IMAGES = tuple(f"image_{n}" for n in range(1, 8))
_DOMAINS = {
    "Art and Design": "Art Art_Theory Design Music",
    "Business": "Accounting Economics Finance Manage Marketing",
    "Science": "Biology Chemistry Geography Math Physics",
    "Health and Medicine": "Basic_Medical_Science Clinical_Medicine "
    "Diagnostics_and_Laboratory_Medicine Pharmacy Public_Health",
    "Humanities and Social Science": "History Literature Sociology Psychology",
    "Tech and Engineering": "Agriculture Architecture_and_Engineering Computer_Science Electronics "
    "Energy_and_Power Materials Mechanical_Engineering",
}
_DOMAIN_OF = {subject: name for name, subjects in _DOMAINS.items() for subject in subjects.split()}
_UNPUBLISHED = "?"  # the answers of the test split


def _literal_list(value: Any, name: str) -> list[str]:
    """A list of texts, or the text of one as Python or JSON writes it."""
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            raise Misfit(name, "is not the text of a list") from None
    return list_of(text, at_least=0)(value, name)


_GOLD = {
    "id": words,
    "question": words,
    "options": _literal_list,
    "answer": Optional(words),
    "question_type": one_of("multiple-choice", "open"),
}


def read_questions(path: Path, gold: Gold) -> list[Question]:
    """The questions with their images where the text names them."""
    fields = {"id": words} | dict.fromkeys(_IMAGES, Optional(encoded_image))
    rows = [(file, row) for file in files_of(path, FILES) for row in read_rows(file, fields)]
    return [_question(file, row, gold[row["id"]]) for file, row in rows if row["id"] in gold]


def _question(file: Path, row: Mapping, gold: Mapping) -> Question:
    """One question as mPLUG-Owl2's script asks it: an image stands wherever it is named, each time,
    in the options as well."""
    if gold["options"]:
        lines = [gold["question"], *choices.lettered(gold["options"])]
        asked = "\n".join(lines) + choices.ANSWER_WITH_LETTER
    else:
        asked = f"{gold['question']}\n{SHORT_ANSWER.strip()}"
    named = [f"image_{number}" for number in re.findall(r"<image (\d+)>", asked)]
    if absent := [name for name in named if not row.get(name)]:
        raise TaskError(
            f"{file}: question {row['id']!r} names {absent[0]}, which it does not have"
            f"{place_of(row)}"
        )
    images = named or [name for name in _IMAGES if row[name]]
    return Question(
        id=row["id"],
        text=re.sub(r"<image \d+>", IMAGE_PLACEHOLDER, asked),
        images=tuple(row[name] for name in images),
        skill=gold["skill"],
        gold=" or ".join(gold["answers"]) if gold["answer"] else None,
        placed=bool(named),
    )


def read_gold(path: Path) -> Gold:
    """The rows of all files by id; `options` are none for an open question.

    Raises TaskError for an answer that is none of the options.
    """
    rows = [(file, row) for file in files_of(path, FILES) for row in read_rows(file, _GOLD)]
    rows_by_id(path, [row for _, row in rows], "id")
    return {row["id"]: _gold(file, row) for file, row in rows}


def _gold(file: Path, row: dict) -> dict:
    is_open = row["question_type"] == "open"
    answer = None if row["answer"] == _UNPUBLISHED else row["answer"]
    answers = [answer] if answer else []
    if is_open and answer and answer.startswith("["):
        with suppress(Misfit):  # an interval is no list, such as [0, 1)
            answers = _literal_list(answer, "answer") or answers
    gold = {
        "question": row["question"],
        "options": [] if is_open else row["options"],
        "answer": answers[0] if answers else None,
        "answers": answers,
        "skill": re.sub(r"^[a-z]+_|_\d+$", "", row["id"]),
    }
    gold["domain"] = _DOMAIN_OF.get(gold["skill"], "no domain")
    if not is_open and answer and answer not in [*choices.letters_of(gold)]:
        raise TaskError(
            f"{file}: question {row['id']!r} has the answer {answer!r}, no option of it"
            f"{place_of(row)}"
        )
    return gold


def score(predictions: Mapping, gold: Mapping, variant: str = "official") -> dict:
    """Accuracy over all questions, per domain and per subject.

    "official" is MMMU's reading of an answer, except that what cannot be read is wrong instead of
    drawn by chance; "owl2", mPLUG-Owl2's script, wants the letter and nothing else. Open questions
    are right if a text or number that the answer gives has or is one of theirs. Raises ScoreError.
    """
    check_ids(predictions, gold)
    choices.check_answers(gold)
    pick = pick_option if variant == "official" else choices.whole_answer

    def accuracy(answer: str, row: Mapping) -> float:
        if row["options"]:
            return float(pick(answer, row) == row["answer"])
        return float(_open_is_right(answer, row["answers"]))

    table = grouped_table(
        predictions, gold, ("domain", "skill"), lambda row: row["answer"], accuracy
    )
    table["overall"]["unresolved"] = sum(
        not pick(predictions[i], row) for i, row in gold.items() if row["options"]
    )
    return table


def pick_option(answer: str, row: Mapping) -> str:
    """The option whose letter comes last in the answer: in brackets, or else between spaces; in
    answers of more than five words without any, the one whose text comes last."""
    for mark in ",.!?;:'":
        answer = answer.strip(mark)
    padded = f" {answer} "
    letters = choices.letters_of(row)
    for form in ("({})", " {} "):
        places = {letter: padded.rfind(form.format(letter)) for letter in letters}
        if any(place >= 0 for place in places.values()):
            return max(places, key=lambda letter: places[letter])
    if len(answer.split()) <= 5:
        return ""
    texts = zip(letters, row["options"], strict=True)
    places = {letter: padded.lower().rfind(option.lower()) for letter, option in texts}
    last = max(places, key=lambda letter: places[letter])
    return last if places[last] >= 0 else ""


_BEFORE_ANSWERS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_NUMBERS = (
    r"-?\b\d{1,3}(?:,\d{3})+\b",
    r"-?\d+(?:\.\d+)?[eE][+-]?\d+",
    r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",
)


def _open_is_right(answer: str, wanted: list[str]) -> bool:
    """Whether a number of the answer is one that is wanted, to two decimals, or a text of it has a
    wanted text."""
    accepted = [form for text in wanted for form in _forms(text)]
    texts = [text for text in accepted if isinstance(text, str)]
    return any(
        any(text in form for text in texts) if isinstance(form, str) else form in accepted
        for given in _given(answer)
        for form in _forms(given)
    )


def _given(answer: str) -> list[str]:
    """What an answer gives: of each line what follows the last of the words before an answer, or
    all of the answer if no line has one; and the numbers therein."""
    answer = answer.strip().strip(".").lower()
    lines = answer.split("\n")
    keys = []
    for number, line in enumerate(lines, start=1):
        before = (*_BEFORE_ANSWERS, "=") if number == len(lines) else _BEFORE_ANSWERS
        tails = [line.split(mark)[-1].strip() for mark in before if mark in line]
        shortest = ""
        for tail in tails:
            if not shortest or len(tail) < len(shortest):
                shortest = tail
        if shortest and shortest not in tuple(":,.!?;'"):
            keys.append(shortest)
    keys = keys or [answer]
    return keys + [found for key in keys for form in _NUMBERS for found in re.findall(form, key)]


def _forms(text: str) -> list[str | float]:
    """A number to two decimals; else the text in lower case, a single letter only at the edge of a
    word."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


BENCHMARK = Benchmark(
    about="MMMU's validation questions, multiple choice and open",
    file=FILES,
    gold_file=FILES,
    id_field="id",
    answer_field="answer",
    suffix="",  # a question says how to answer it
    max_new_tokens=20,
    min_new_tokens=1,
    read_questions=read_questions,
    read_gold=read_gold,
    score=score,
    variants=("official", "owl2"),
    many_files=True,
    split="val",
)
