"""Scores of predictions against gold answers, by the rules the benchmarks were published with.

Pure Python. Predictions are the model's texts by question id, gold the published rows by the same
ids. Every scorer returns {"overall": row, "skills": {name: row}} with rows of `accuracy` and
`majority` in percent, `n` questions, and what else the rule defines. Each raises ScoreError if the
ids of predictions and gold differ. `majority` is the accuracy of always giving the most
frequent gold answer of that skill: what can be had without looking.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

from megatron_owl2.errors import ScoreError

VQA_VARIANTS = ("owl2", "official")

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


def vqa(predictions: Mapping, gold: Mapping, variant: str = "owl2") -> dict:
    """VQA accuracy on VQAv2 annotations, overall and per `question_type`.

    A question's score is the mean over its annotators of min(1, matches among the others / 3).
    "owl2", the rule of mPLUG-Owl2's evaluation code: the prediction is always normalised, the
    gold loses its punctuation, and only where the annotators disagree. "official", GT-Vision-Lab's
    rule: both are normalised where the annotators disagree and compared as they are elsewhere.
    `unreachable` counts questions on which no annotator's answer would score: under "owl2", gold
    with capitals, articles or number words. Raises ScoreError for missing or unknown ids.
    """
    _check_ids(predictions, gold)

    def accuracy(prediction: str, row: Mapping) -> float:
        return _vqa_accuracy(prediction, [answer["answer"] for answer in row["answers"]], variant)

    table = _table(
        [(row["question_type"], row, predictions[i]) for i, row in gold.items()],
        lambda row: row["multiple_choice_answer"],
        accuracy,
    )
    for skill, rows in _by_skill((row["question_type"], row) for row in gold.values()).items():
        table["skills"][skill]["unreachable"] = sum(
            not any(accuracy(answer, row) for answer in {a["answer"] for a in row["answers"]})
            for row in rows
        )
    table["overall"]["unreachable"] = sum(s["unreachable"] for s in table["skills"].values())
    return table


def pope(predictions: Mapping, gold: Mapping) -> dict:
    """POPE on rows with a `label` "yes" or "no"; percentages with "yes" as the positive class.

    A prediction is "no" if its text before the first period has the word No, no or not, and "yes"
    otherwise. Precision, recall and F1 are 0 where they would divide by zero.
    """
    _check_ids(predictions, gold)
    said = {i: pope_answer(text) for i, text in predictions.items()}
    table = _table(
        [("existence", row, said[i]) for i, row in gold.items()],
        lambda row: row["label"],
        lambda answer, row: float(answer == row["label"]),
    )
    pairs = Counter((said[i], row["label"]) for i, row in gold.items())
    hits = pairs["yes", "yes"]
    answered_yes, are_yes = hits + pairs["yes", "no"], hits + pairs["no", "yes"]
    table["overall"] |= {
        "precision": _percent(hits, answered_yes),
        "recall": _percent(hits, are_yes),
        "f1": _percent(2 * hits, answered_yes + are_yes),
        "yes_ratio": _percent(answered_yes, len(gold)),
    }
    table["skills"]["existence"] = dict(table["overall"])
    return table


def pope_answer(text: str) -> str:
    """ "yes" or "no" as POPE's published evaluation reads an answer."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def exact_match(predictions: Mapping, gold: Mapping) -> dict:
    """Share of predictions equal to one of a row's `answers` up to white space, per `skill`.

    The first answer counts for the majority.
    """
    _check_ids(predictions, gold)
    return _table(
        [(row["skill"], row, predictions[i]) for i, row in gold.items()],
        lambda row: _squeeze(row["answers"][0]),
        lambda answer, row: float(_squeeze(answer) in map(_squeeze, row["answers"])),
    )


def normalize_answer(text: str) -> str:
    """A VQA answer without punctuation and articles, lower case, numbers as digits."""
    text = _strip_punctuation(_one_line(text))
    words = [_DIGITS.get(word, word) for word in text.lower().split()]
    return " ".join(_RESTORED.get(word, word) for word in words if word not in _ARTICLES)


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


def _vqa_accuracy(prediction: str, answers: list[str], variant: str) -> float:
    unanimous = len(set(answers)) == 1
    if variant == "owl2":
        prediction = normalize_answer(prediction)
        answers = answers if unanimous else [_strip_punctuation(answer) for answer in answers]
    elif unanimous:
        prediction = _one_line(prediction)
        answers = [_one_line(answer) for answer in answers]
    else:
        prediction = normalize_answer(prediction)
        answers = [normalize_answer(answer) for answer in answers]
    matches = answers.count(prediction)
    others = [matches - (answer == prediction) for answer in answers]
    return sum(min(1.0, other / 3) for other in others) / len(answers)


def _table(
    items: Sequence[tuple[str, Mapping, str]],
    gold_answer: Callable[[Mapping], str],
    accuracy: Callable[[str, Mapping], float],
) -> dict:
    """Rows per skill and overall from (skill, gold row, prediction); accuracy is 0 to 1."""
    skills, total, without_looking = {}, 0.0, 0.0
    for skill, pairs in sorted(_by_skill((skill, pair) for skill, *pair in items).items()):
        counts = Counter(gold_answer(row) for row, _ in pairs)
        majority = min(counts, key=lambda answer: (-counts[answer], answer))
        right = sum(accuracy(prediction, row) for row, prediction in pairs)
        blind = sum(accuracy(majority, row) for row, _ in pairs)
        skills[skill] = _row(right, blind, len(pairs))
        total, without_looking = total + right, without_looking + blind
    return {"overall": _row(total, without_looking, len(items)), "skills": skills}


def _row(right: float, majority: float, n: int) -> dict:
    return {"accuracy": _percent(right, n), "majority": _percent(majority, n), "n": n}


def _by_skill(pairs: Iterable[tuple[str, object]]) -> dict[str, list]:
    groups = defaultdict(list)
    for skill, item in pairs:
        groups[skill].append(item)
    return groups


def _percent(part: float, whole: float) -> float:
    return round(100 * part / whole, 2) if whole else 0.0


def _squeeze(text: str) -> str:
    return " ".join(text.split())


def _check_ids(predictions: Mapping, gold: Mapping) -> None:
    if not gold:
        raise ScoreError("the gold holds no question")
    missing = [i for i in gold if i not in predictions]
    if missing:
        raise ScoreError(
            f"{len(missing)} of {len(gold)} gold questions have no prediction, such as "
            f"{missing[0]!r}; score against the gold that was asked"
        )
    unknown = [i for i in predictions if i not in gold]
    if unknown:
        raise ScoreError(
            f"{len(unknown)} predictions have no gold, such as {unknown[0]!r}; is this the gold of "
            "another set?"
        )
