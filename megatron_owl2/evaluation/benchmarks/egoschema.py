"""EgoSchema (Mangalam et al. 2023): a choice of five about three minutes of egocentric video.

What is shown are the image files in `images/<q_uid>/`, in the order of their names, or where there
is no such folder frames of `videos/<q_uid>.mp4`.

The variant "yes" is mPLUG-Owl's protocol of egoschema/EgoSchema (benchmarking/mPLUG-Owl): of every
option it is asked whether it is right. There an answer is sampled, an option's confidence is the
logit of "Yes" where this appears, or 0, and one of the best is drawn. Here it is the likelihood of
"Yes" as the first word, and of equals the first option is taken: nothing is left to chance.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from megatron_owl2.data.shards.records import IMAGE_PLACEHOLDER
from megatron_owl2.errors import TaskError
from megatron_owl2.evaluation import choices, likelihood
from megatron_owl2.evaluation.benchmark import Benchmark, Gold, Question
from megatron_owl2.evaluation.image_files import images_in, named_image
from megatron_owl2.evaluation.prompts import ADAPTER_CHOICE
from megatron_owl2.evaluation.question import Image, spread_to_ends
from megatron_owl2.evaluation.rows import (
    read_object,
    read_rows,
    rows_by_id,
    whole_number,
    words,
)
from megatron_owl2.evaluation.video_files import VIDEOS, Video, VideoFolder

FRAMES = 5  # of a video, with which version 1 did best
ANSWERS = "subset_answers.json"
_YES_OR_NO = (
    "Given question '{}', is answer '{}' correct?\nDo you think that the answer to the given "
    "question is correct. Please answer yes or no."
)
# What the published code asks: the quotation mark before the question is not closed, and the lines
# of its template are indented, but for those of the images after the first.
_INDENT = 12 * " "
_RELEASED = (
    "The following is a conversation between a curious human and AI assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions.",
    "{images}",
    "Human: Given question '{question}, is answer '{option}' correct?",
    "Human: Do you think that the answer to the given question is correct. Please answer yes or "
    "no.{suffix}",
    "AI:",
)
_OPTIONS = tuple(f"option {n}" for n in range(5))
_FIELDS = dict.fromkeys(_OPTIONS, words) | {"q_uid": words, "question": words}


def read_questions(path: Path, gold: Gold) -> list[Question]:
    """The questions, each about all frames in its folder, or about its video."""
    shown = _Shown(path)
    return [
        Question(
            id=i,
            text=choices.show(row["question"], row["options"]),
            images=shown.of(str(i)),
            skill=row["skill"],
            gold=row["answer"],
        )
        for i, row in gold.items()
    ]


def read_by_likelihood(path: Path, gold: Gold) -> list[Question]:
    """The questions as version 1 was evaluated: of every option whether it is right, and how likely
    "Yes" is then. The first and the last frame of a video are among those that are shown."""
    questions = spread_to_ends(read_questions(path, gold))
    return [
        replace(
            question,
            candidates=likelihood.Candidates(
                tuple((_YES_OR_NO.format(row["question"], o), "Yes") for o in row["options"]),
                likelihood.total,
                in_template=True,
                official=partial(_released_prompts, row),
            ),
        )
        for question, row in zip(questions, gold.values(), strict=True)
    ]


def _released_prompts(row: Mapping, images: int, suffix: str) -> list[str]:
    """The published prompts, one for every option, whatever the template of the model."""
    lines = f"Human: {IMAGE_PLACEHOLDER}\n" * images
    return [
        f"\n{_INDENT}".join(_RELEASED).format(
            images=lines, question=row["question"], option=option, suffix=suffix
        )
        for option in row["options"]
    ]


class _Shown:
    """What is shown for a question; frames that were taken before come first."""

    def __init__(self, path: Path):
        self._path = path
        self._videos = VideoFolder(path) if (path.parent / VIDEOS).is_dir() else None

    def of(self, uid: str) -> tuple[Image, ...]:
        if self._videos is None or named_image(self._path, uid).is_dir():
            return images_in(self._path, uid)
        return (Video(self._videos.find(uid), FRAMES),)


def read_gold(path: Path) -> Gold:
    """The questions whose answers were published, in subset_answers.json beside the file; without
    it all questions, unanswered, as the validation server wants them.

    Raises TaskError for answers to questions that are not there, or above 4.
    """
    questions, published = read_unanswered(path), path.parent / ANSWERS
    if not published.is_file():
        return questions
    gold = {}
    for i, answer in read_object(published, whole_number).items():
        if i not in questions or answer >= len(_OPTIONS):
            fault = f"is {answer}, not 0 to 4" if i in questions else f"has no question in {path}"
            raise TaskError(f"{published}: the answer to {i!r} {fault}")
        gold[i] = questions[i] | {"answer": choices.LETTERS[answer]}
    return gold


def read_unanswered(path: Path) -> Gold:
    """All questions by q_uid, unanswered."""
    return {
        str(i): {
            "question": row["question"],
            "options": [row[option] for option in _OPTIONS],
            "answer": None,
            "skill": "egoschema",
        }
        for i, row in rows_by_id(path, read_rows(path, _FIELDS), "q_uid").items()
    }


def score(predictions: Mapping, gold: Mapping, variant: str = "generation") -> dict:
    """Accuracy of answers, by a letter or the text of one option; raises ScoreError.

    Under "generation" the model says them; under "yes" they are the options with the likeliest
    "Yes".
    """
    return choices.score_choices(predictions, gold, choices.letter_or_text)


def submission(predictions: Mapping, gold: Mapping) -> tuple[str, bytes]:
    """{q_uid: option} for the validation server, from 0; -1 is an answer that chose none.

    The server takes all questions: those with published answers make a file of another name.
    """
    picked = {i: choices.letter_or_text(predictions[i], row) for i, row in gold.items()}
    chosen = {i: choices.LETTERS.index(x) if x else -1 for i, x in picked.items()}
    subset = any(row["answer"] is not None for row in gold.values())
    return "egoschema_subset.json" if subset else "egoschema.json", json.dumps(chosen).encode()


BENCHMARK = Benchmark(
    about="EgoSchema, multiple choice about frames of a video",
    file="questions.json",
    gold_file="questions.json",
    id_field="q_uid",
    answer_field="answer",
    suffix=choices.ANSWER_WITH_LETTER,
    max_new_tokens=10,
    min_new_tokens=1,
    read_questions=read_questions,
    read_gold=read_gold,
    score=score,
    variants=("generation", "yes"),
    by_likelihood={"yes": read_by_likelihood},
    columns=choices.COLUMNS,
    submission=submission,
    unanswered_rows=True,
    read_unanswered=read_unanswered,
    official=ADAPTER_CHOICE,
)
