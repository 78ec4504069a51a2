"""VQA accuracy: an answer against those of several annotators, under the three rules in use.

Gold rows have `answers`, one text per annotator, `skill`, by which questions are grouped, and
`majority`, the answer that a model would give without looking.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from megatron_owl2.evaluation.scoring import check_ids, group_by_skill, score_table

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {"none": "0"} | {word: str(i) for i, word in enumerate(_NUMBERS)}
_ARTICLES = ("a", "an", "the")
# Written with one apostrophe missing, these get it back. Forms that the published table leaves
# alone (such as "well" or "its") are not here.
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
    haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't
    mightn't've must've mustn't needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
    shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
    someone's something'd something'd've something'll that's there'd there'd've there're there's
    they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're
    what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll
    why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've
    you'll you're you've
"""
_RESTORED = (
    {"somebody'd": "somebodyd"}
    | {  # the first is the published table's own slip
        word[:i] + word[i + 1 :]: word
        for word in _CONTRACTIONS.split()
        for i, letter in enumerate(word)
        if letter == "'"
    }
)


def score(predictions: Mapping, gold: Mapping, variant: str = "owl2") -> dict:
    """VQA accuracy overall and per `skill`, in percent.

    A question's score is the mean over its annotators of min(1, matches among the others / 3).
    "owl2", the rule of mPLUG-Owl2's evaluation code: the prediction is always normalised, the
    gold loses its punctuation, and only where the annotators disagree. "official", GT-Vision-Lab's
    rule: both are normalised where the annotators disagree and compared as they are elsewhere.
    "evalai", that of M4C and lmms-eval: both go through the processor of answers for EvalAI.
    `unreachable` counts questions on which no annotator's answer would score: under "owl2", gold
    with capitals, articles or number words. Raises ScoreError for missing or unknown ids.
    """
    check_ids(predictions, gold)
    compared = _COMPARED[variant]

    def accuracy(prediction: str, row: Mapping) -> float:
        return _accuracy(*compared(prediction, row["answers"]))

    table = score_table(
        [(row["skill"], row, predictions[i]) for i, row in gold.items()],
        lambda row: row["majority"],
        accuracy,
    )
    for skill, rows in group_by_skill((row["skill"], row) for row in gold.values()).items():
        table["skills"][skill]["unreachable"] = sum(
            not any(accuracy(answer, row) for answer in set(row["answers"])) for row in rows
        )
    table["overall"]["unreachable"] = sum(s["unreachable"] for s in table["skills"].values())
    return table


def most_common(answers: Sequence[str]) -> str:
    """The answer of most annotators; of several, the one that was given first."""
    return Counter(answers).most_common(1)[0][0]


def evalai_submission(id_field: str) -> Callable[[Mapping, Mapping], tuple[str, bytes]]:
    """The writer of a file for EvalAI: a JSON list of `id_field` and the processed answer."""

    def write(predictions: Mapping, gold: Mapping) -> tuple[str, bytes]:
        rows = [{id_field: i, "answer": evalai_answer(text)} for i, text in predictions.items()]
        return "evalai.json", json.dumps(rows).encode()

    return write


def normalize_answer(text: str) -> str:
    """A VQA answer without punctuation and articles, lower case, numbers as digits."""
    text = _strip_punctuation(_one_line(text))
    words = [_DIGITS.get(word, word) for word in text.lower().split()]
    return " ".join(_RESTORED.get(word, word) for word in words if word not in _ARTICLES)


def evalai_answer(text: str) -> str:
    """The form in which answers are uploaded to EvalAI: commas and question marks vanish and a
    possessive 's stands alone before the answer is normalised."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return normalize_answer(text.strip())


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _strip_punctuation(text: str) -> str:
    """Marks become spaces, or vanish if the text has them beside a space or a 1,000 anywhere."""
    thousands = re.search(r"\d,\d", text)
    stripped = text
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        stripped = stripped.replace(mark, "" if beside_space or thousands else " ")
    # The published code removes 32 periods at most, a flag given as a count.
    return re.sub(r"\.(?!\d)", "", stripped, count=32)


Compared = tuple[str, list[str]]  # a prediction and the annotators' answers


def _by_owl2(prediction: str, answers: list[str]) -> Compared:
    if len(set(answers)) > 1:
        answers = [_strip_punctuation(answer) for answer in answers]
    return normalize_answer(prediction), answers


def _by_official(prediction: str, answers: list[str]) -> Compared:
    change = normalize_answer if len(set(answers)) > 1 else _one_line
    return change(prediction), [change(answer) for answer in answers]


def _by_evalai(prediction: str, answers: list[str]) -> Compared:
    return evalai_answer(prediction), [evalai_answer(answer) for answer in answers]


_COMPARED: dict[str, Callable[[str, list[str]], Compared]] = {
    "owl2": _by_owl2,
    "official": _by_official,
    "evalai": _by_evalai,
}
VARIANTS = tuple(_COMPARED)


def _accuracy(prediction: str, answers: list[str]) -> float:
    matches = answers.count(prediction)
    others = [matches - (answer == prediction) for answer in answers]
    return sum(min(1.0, other / 3) for other in others) / len(answers)
