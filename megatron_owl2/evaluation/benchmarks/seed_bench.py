"""SEED-Bench-1 (Li et al. 2023): multiple choice in nine dimensions on images and three on videos.

Questions on videos are asked if there is a folder `videos/`, with files as their data sets name
them. The middle frame is shown, as LLaVA-1.5 does, or that of the segment which the question means.
"""

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_owl2.errors import TaskError
from megatron_owl2.evaluation import choices, likelihood
from megatron_owl2.evaluation.benchmark import Benchmark, Gold, Question
from megatron_owl2.evaluation.image_files import one_of_named
from megatron_owl2.evaluation.prompts import ADAPTER_CHOICE
from megatron_owl2.evaluation.question import Image
from megatron_owl2.evaluation.rows import (
    Misfit,
    Optional,
    identifier,
    one_of,
    read_rows,
    read_value,
    rows_by_id,
    short,
    whole_number,
    words,
)
from megatron_owl2.evaluation.video_files import VIDEOS, Video, named_video

FRAMES = 1  # of a video
_logger = logging.getLogger(__name__)


def _segment(value: Any, name: str) -> list[float]:
    """Start and end, both in seconds or both as numbers of frames."""
    numbers = value if isinstance(value, list) else []
    known = len(numbers) == 2 and all(type(n) in (int, float) for n in numbers)
    if not known or not 0 <= numbers[0] < numbers[1] < math.inf:
        raise Misfit(name, f"is {short(repr(value))}, wanted a start and an end")
    return numbers


_CHOICES = ("choice_a", "choice_b", "choice_c", "choice_d")
_FIELDS = dict.fromkeys(_CHOICES, words) | {
    "question_id": identifier,
    "question": words,
    "answer": one_of("a", "b", "c", "d"),
    "data_type": one_of("image", "video"),
    "data_id": words,
    "question_type_id": whole_number,
    "segment": Optional(_segment),
}
_PICKS = {
    "first_character": choices.first_character,
    "whole_answer": choices.whole_answer,
    "likelihood": choices.whole_answer,
}


def read_questions(path: Path, gold: Gold) -> list[Question]:
    """The questions; the published files of images have no ending."""
    return [
        Question(
            id=i,
            text=choices.show(row["question"], row["options"]),
            images=(_shown(path, row),),
            skill=row["skill"],
            gold=row["answer"],
        )
        for i, row in gold.items()
    ]


def read_by_likelihood(path: Path, gold: Gold) -> list[Question]:
    """The questions as SEED-Bench's own evaluation asks them: which option is the likeliest answer
    to the question alone."""
    return [
        replace(
            question,
            candidates=likelihood.Candidates(
                tuple((row["question"], option) for option in row["options"]),
                likelihood.total,
                in_template=True,
                ends=True,
            ),
        )
        for question, row in zip(read_questions(path, gold), gold.values(), strict=True)
    ]


def _shown(path: Path, row: Mapping) -> Image:
    if row["data_type"] == "image":
        return one_of_named(path, row["data_id"], f"SEED-Bench-image/{row['data_id']}")
    video = Video(named_video(path, row["data_id"]), FRAMES)
    if not row["segment"]:
        return video
    # The published file numbers frames by whole numbers and gives seconds as fractions.
    unit = "frames" if isinstance(row["segment"][0], int) else "seconds"
    return replace(video, segment=tuple(row["segment"]), unit=unit)


def read_gold(path: Path) -> Gold:
    """Questions by id, with the name of their dimension; without a folder of videos those on them
    are left out and counted in the log. Raises TaskError for two questions of one id."""
    rows = read_rows(path, _FIELDS, "questions")
    if not (path.parent / VIDEOS).is_dir():
        on_videos = sum(row["data_type"] == "video" for row in rows)
        rows = [row for row in rows if row["data_type"] == "image"]
        if on_videos:
            _logger.warning(
                "%d questions of %s are on videos and are not asked, as there is no folder %s",
                on_videos,
                path,
                path.parent / VIDEOS,
            )
    names = _dimensions(path)
    gold = {}
    for i, row in rows_by_id(path, rows, "question_id").items():
        number = row["question_type_id"]
        gold[i] = {
            "question": row["question"],
            "options": [row[choice] for choice in _CHOICES],
            "answer": row["answer"].upper(),
            "data_id": row["data_id"],
            "data_type": row["data_type"],
            "segment": row["segment"],
            "skill": names.get(number, f"dimension {number}"),
            "kind": f"all {row['data_type']}s",
        }
    return gold


def _dimensions(path: Path) -> dict[int, str]:
    """{number: name} of the dimensions that the file lists."""
    listed = read_value(path, "question_type") or {}
    if not isinstance(listed, dict) or not all(type(n) is int for n in listed.values()):
        raise TaskError(f"{path}: 'question_type' must give a whole number for every name")
    return {number: name for name, number in listed.items()}


def score(predictions: Mapping, gold: Mapping, variant: str = "first_character") -> dict:
    """Accuracy of generated letters over all questions, per dimension, and on images and videos
    alone if there are both.

    "first_character" looks at no more of an answer, as lmms-eval does; "whole_answer" wants the
    letter alone, as LLaVA's evaluation does; "likelihood" is of the letters of the options with the
    least loss. Raises ScoreError.
    """
    both = len({row["kind"] for row in gold.values()}) > 1
    skills = ("skill", "kind") if both else ("skill",)
    return choices.score_choices(predictions, gold, _PICKS[variant], skills)


def submission(predictions: Mapping, gold: Mapping) -> tuple[str, bytes]:
    """JSON lines for SEED-Bench's leaderboard."""
    rows = [{"question_id": i, "prediction": text.strip()[:1]} for i, text in predictions.items()]
    return "seed_bench.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode()


BENCHMARK = Benchmark(
    about="SEED-Bench, multiple choice on images and, if they are there, videos",
    file="SEED-Bench*.json",
    gold_file="SEED-Bench*.json",
    id_field="question_id",
    answer_field="prediction",
    suffix=choices.ANSWER_WITH_LETTER,
    max_new_tokens=10,
    min_new_tokens=1,
    read_questions=read_questions,
    read_gold=read_gold,
    score=score,
    columns=choices.COLUMNS,
    submission=submission,
    unanswered_rows=True,
    variants=tuple(_PICKS),
    by_likelihood={"likelihood": read_by_likelihood},
    official=ADAPTER_CHOICE,
)
