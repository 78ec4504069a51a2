"""Multiple choice: how options are shown, how an answer is read as one of them, and its table.

Rows of gold have `answer`, a letter, and `options`, the texts that the letters stand for. Whatever
a rule cannot read as an option counts as wrong and as `unresolved`; nothing is guessed.
"""

import re
from collections.abc import Callable, Mapping, Sequence

from megatron_owl2.errors import ScoreError, TaskError
from megatron_owl2.evaluation.scoring import check_ids, group_by_skill, grouped_table

LETTERS = "ABCDEFGHIJ"
# What mPLUG-Owl2's own scripts ask with; their apostrophe is the curly one.
ANSWER_WITH_LETTER = "\nAnswer with the option’s letter from the given choices directly."
COLUMNS = ("accuracy", "majority", "unresolved", "n")  # of the tables of `score_choices`

Pick = Callable[[str, Mapping], str]  # an answer and its row to a letter, "" if it is none


def show(question: str, options: Sequence[str], hint: str = "") -> str:
    """A question with lettered options below it and, as mPLUG-Owl2's authors ask it in VLMEvalKit,
    its hint before it."""
    lines = [f"Hint: {hint}"] if hint.strip() else []
    return "\n".join([*lines, question, *lettered(options)])


def check_count(options: Sequence[str], where: str) -> None:
    """Refusal of more options than there are letters, as TaskError that begins with `where`."""
    if len(options) > len(LETTERS):
        raise TaskError(f"{where} has {len(options)} options; at most {len(LETTERS)} are known")


def lettered(options: Sequence[str]) -> list[str]:
    """The lines "A. first", "B. second" and so on; raises TaskError if the letters run out."""
    check_count(options, "a question")
    return [f"{letter}. {text}" for letter, text in zip(LETTERS, options, strict=False)]


def first_character(answer: str, row: Mapping) -> str:
    """The answer's first character if it is the letter of an option."""
    return _if_option(answer.strip()[:1], row)


def whole_answer(answer: str, row: Mapping) -> str:
    """The answer if it is the letter of an option and nothing else."""
    return _if_option(answer, row)


def letter_or_text(answer: str, row: Mapping) -> str:
    """The only letter of an option that stands alone in the answer, else the only option whose text
    the answer has: MMBench's matching without a language model.

    Texts are compared in lower case, in answers up to twice as long as all options together.
    """
    alone = set(re.sub(r"[.()\[\],:;!*#{}]", " ", answer).split())
    named = [letter for letter in letters_of(row) if letter in alone]
    if len(named) == 1:
        return named[0]
    texts = [option.lower() for option in row["options"]]
    if len(answer) > 2 * sum(map(len, texts)):
        return ""
    found = [x for x, text in zip(letters_of(row), texts, strict=True) if text in answer.lower()]
    return found[0] if len(found) == 1 else ""


def stated_letter(answer: str, row: Mapping) -> str:
    """The letter that the answer says "the answer is", else that it begins with, else the only
    one that stands alone in it. An A before a word in small letters is an article."""
    options = letters_of(row)
    said = re.search(rf"[Aa]nswer is:?\s*(?:option\s*)?\(?([{options}])\b", answer)
    begun = re.match(rf"\s*\(?([{options}])(?:[.:,;)\n]|\s*$)", answer)
    for found in (said, begun):
        if found:
            return _if_option(found[1], row)
    alone = set(re.findall(rf"(?<![\w'])(?!A [a-z])([{options}])(?![\w'’])", answer))
    return alone.pop() if len(alone) == 1 else ""


def letters_of(row: Mapping) -> str:
    """The letters of a row's options, such as "ABCD"."""
    return LETTERS[: len(row["options"])]


def _if_option(letter: str, row: Mapping) -> str:
    return letter if letter in [*letters_of(row)] else ""


def score_choices(
    predictions: Mapping,
    gold: Mapping,
    pick: Pick,
    skills: Sequence[str] = ("skill",),
    equal_skills: bool = False,
) -> dict:
    """Accuracy of picked letters over all questions and within groups of them.

    `skills` are the fields that say a question's groups, of which it may be in several;
    `equal_skills` is as in `score_table`. Raises ScoreError for missing or unknown ids and for
    questions without a published answer.
    """
    check_ids(predictions, gold)
    check_answers(gold)
    picked = {i: pick(predictions[i], row) for i, row in gold.items()}
    table = grouped_table(
        picked,
        gold,
        skills,
        lambda row: row["answer"],
        lambda letter, row: float(letter == row["answer"]),
        equal_skills,
    )
    for field in skills:
        groups = group_by_skill((row[field], picked[i]) for i, row in gold.items())
        for name, letters in groups.items():
            table["skills"][name]["unresolved"] = letters.count("")
    table["overall"]["unresolved"] = list(picked.values()).count("")
    return table


def check_answers(gold: Mapping) -> None:
    """Refusal of rows whose answer is not published, as ScoreError."""
    if missing := [i for i, row in gold.items() if row["answer"] is None]:
        raise ScoreError(
            f"{len(missing)} of {len(gold)} questions have no published answer, such as "
            f"{missing[0]!r}; their benchmark's server scores them ('evaluate --no-gold')"
        )
