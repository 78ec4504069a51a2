"""VQAv2 (Goyal et al. 2017): open questions on COCO images, ten annotators' answers to each."""

import re
from collections.abc import Mapping
from pathlib import Path

from megatron_owl2.errors import TaskError
from megatron_owl2.evaluation.benchmark import SHORT_ANSWER, Benchmark, Gold, Question
from megatron_owl2.evaluation.image_files import NumberedImages
from megatron_owl2.evaluation.rows import (
    Optional,
    identifier,
    list_of,
    object_of,
    read_rows,
    read_value,
    rows_by_id,
    text,
    whole_number,
    with_ids_of,
    words,
)
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


_QUESTION = {"question_id": identifier, "image_id": whole_number, "question": words}
_ANNOTATION = {
    "question_id": identifier,
    "image_id": Optional(whole_number),
    "question_type": words,
    "multiple_choice_answer": text,
    "answers": list_of(object_of(answer=text), at_least=2),  # each counts beside the others
}
_SPLIT = re.compile(r"(?:^|_)(train|val|test)(?:-dev)?(\d{4})(?:_|$)")


def read_questions(path: Path, gold: Gold) -> list[Question]:
    """The questions of a published file.

    Raises TaskError if some have no annotation, or one of another image.
    """
    rows = rows_by_id(path, read_rows(path, _QUESTION, "questions"), "question_id")
    rows = with_ids_of(gold, rows)
    unanswered = [i for i in rows if i not in gold]
    if unanswered:
        raise TaskError(
            f"{len(unanswered)} questions of {path} have no annotation, such as {unanswered[0]!r}"
        )
    images = NumberedImages(path, _split(path))
    questions = []
    for i, row in rows.items():
        annotation = gold[i]
        about = annotation["image_id"]
        if about not in (None, row["image_id"]):
            raise TaskError(
                f"{path}: question {i} is about image {row['image_id']}, its annotation about "
                f"{about}; the two files do not belong together"
            )
        questions.append(
            Question(
                id=i,
                text=row["question"],
                images=(images.find(row["image_id"]),),
                skill=annotation["question_type"],
                gold=annotation["multiple_choice_answer"],
            )
        )
    return questions


def _split(questions: Path) -> str | None:
    """The split of COCO that a question file says it is about, by its `data_subtype` or its name;
    test-dev2015 asks about images of test2015."""
    for name in (read_value(questions, "data_subtype"), questions.stem):
        if isinstance(name, str) and (found := _SPLIT.search(name)):
            return found[1] + found[2]
    return None


def read_gold(path: Path) -> Gold:
    """The published annotations by question id."""
    return rows_by_id(path, read_rows(path, _ANNOTATION, "annotations"), "question_id")


def score(predictions: Mapping, gold: Mapping, variant: str = "owl2") -> dict:
    """VQA accuracy on VQAv2 annotations, overall and per `question_type`.

    A question's score is the mean over its annotators of min(1, matches among the others / 3).
    "owl2", the rule of mPLUG-Owl2's evaluation code: the prediction is always normalised, the
    gold loses its punctuation, and only where the annotators disagree. "official", GT-Vision-Lab's
    rule: both are normalised where the annotators disagree and compared as they are elsewhere.
    `unreachable` counts questions on which no annotator's answer would score: under "owl2", gold
    with capitals, articles or number words. Raises ScoreError for missing or unknown ids.
    """
    check_ids(predictions, gold)

    def accuracy(prediction: str, row: Mapping) -> float:
        return _vqa_accuracy(prediction, [answer["answer"] for answer in row["answers"]], variant)

    table = score_table(
        [(row["question_type"], row, predictions[i]) for i, row in gold.items()],
        lambda row: row["multiple_choice_answer"],
        accuracy,
    )
    for skill, rows in group_by_skill((row["question_type"], row) for row in gold.values()).items():
        table["skills"][skill]["unreachable"] = sum(
            not any(accuracy(answer, row) for answer in {a["answer"] for a in row["answers"]})
            for row in rows
        )
    table["overall"]["unreachable"] = sum(s["unreachable"] for s in table["skills"].values())
    return table


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


BENCHMARK = Benchmark(
    about="VQAv2, open questions on images, scored per question type",
    file="*questions.json",
    gold_file="*annotations.json",
    id_field="question_id",
    answer_field="answer",
    suffix=SHORT_ANSWER,
    max_new_tokens=10,
    min_new_tokens=1,
    read_questions=read_questions,
    read_gold=read_gold,
    score=score,
    variants=("owl2", "official"),
)
