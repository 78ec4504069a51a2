"""Asks a model the questions of a task and leaves predictions and scores in a directory."""

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from tqdm import tqdm

from megatron_owl2.data import images
from megatron_owl2.errors import BadSampleError, TaskError
from megatron_owl2.evaluation import tasks
from megatron_owl2.evaluation.tasks import PREDICTIONS, SCORES, TASKS, Question
from megatron_owl2.inference.engine import Generator, LoadedModel


@dataclass(frozen=True)
class Settings:
    """How a task is asked; None takes the task's own value.

    `blind` replaces every picture by a black one (uint8 zeros, before normalisation): what the
    model scores without looking. `suffix` follows every question as it stands, with its own
    leading space.
    """

    blind: bool = False
    batch_size: int = 64
    limit: int | None = None
    suffix: str | None = None
    max_new_tokens: int | None = None
    min_new_tokens: int | None = None
    variant: str | None = None


def evaluate(
    loaded: LoadedModel,
    task_name: str,
    questions: list[Question],
    gold: dict,
    output: str | Path,
    settings: Settings,
    about: dict,
) -> dict:
    """Answer `questions`; writes predictions.jsonl and scores.json to `output`, returns the latter.

    `questions` and `gold` come from `tasks.read`; `about` (names of model and data) is kept with
    the scores. Every process of a tensor-parallel group calls this and the first one writes.
    Raises TaskError, ScoreError and InferenceError.
    """
    task = TASKS[task_name]
    suffix = _first(settings.suffix, task.suffix)
    limits = {
        "max_new_tokens": _first(settings.max_new_tokens, task.max_new_tokens),
        "min_new_tokens": _first(settings.min_new_tokens, task.min_new_tokens),
    }
    main = torch.distributed.get_rank() == 0
    if main:
        Path(output).mkdir(parents=True, exist_ok=True)
    picture = _picture_reader(loaded.config.vision.image_size, settings)
    generator = Generator(loaded)
    predictions: dict[int | str, str] = {}
    started = time.perf_counter()
    with (
        open(Path(output) / PREDICTIONS if main else os.devnull, "w", encoding="utf-8") as file,
        tqdm(total=len(questions), desc=task_name, unit=" questions", disable=not main) as bar,
    ):
        for first in range(0, len(questions), settings.batch_size):
            batch = questions[first : first + settings.batch_size]
            answers = generator.generate(
                [question.prompt(suffix) for question in batch],
                [[picture(path) for path in question.images] for question in batch],
                **limits,
            )
            for question, answer in zip(batch, answers, strict=True):
                predictions[question.id] = answer
                alone = tasks.score(
                    task, {question.id: answer}, {question.id: gold[question.id]}, settings.variant
                )
                row = {task.id_field: question.id, task.answer_field: answer}
                row |= {"score": alone["overall"]["accuracy"]} | _shown(question)
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            bar.update(len(batch))
    seconds = time.perf_counter() - started
    result = {
        **about,
        "task": task_name,
        "blind": settings.blind,
        "limit": settings.limit,
        "prompt_suffix": suffix,
        **limits,
        "variant": _first(settings.variant, next(iter(task.variants), None)),
        "seconds": round(seconds, 2),
        "questions_per_second": round(len(questions) / seconds, 2),
        **tasks.score(task, predictions, gold, settings.variant),
    }
    if main:
        (Path(output) / SCORES).write_text(json.dumps(result, indent=1) + "\n")
    return result


def table(scores: dict) -> str:
    """The rows of a scorer's result as text, in percent."""
    rows = scores["skills"] | {"all": scores["overall"]}
    width = max(map(len, rows))
    lines = [f"{'skill':<{width}}  accuracy  majority      n"]
    lines += [
        f"{name:<{width}}  {row['accuracy']:8.2f}  {row['majority']:8.2f}  {row['n']:5d}"
        for name, row in rows.items()
    ]
    more = {k: v for k, v in scores["overall"].items() if k in ("precision", "recall", "f1")}
    if more:
        lines.append("  ".join(f"{name} {value:.2f}" for name, value in more.items()))
    if unreachable := scores["overall"].get("unreachable"):
        lines.append(
            f"{unreachable} questions cannot be answered under this rule, because it changes "
            "every answer but not their gold (capitals, articles, number words); see --variant"
        )
    return "\n".join(lines)


def _picture_reader(size: int, settings: Settings) -> Callable[[Path], torch.Tensor]:
    """Pictures as the same tensor object while questions about them follow each other, which is
    how the generator knows to encode them once."""
    black = torch.zeros(3, size, size, dtype=torch.uint8)

    @lru_cache(maxsize=settings.batch_size)
    def read(path: Path) -> torch.Tensor:
        if settings.blind:
            return black
        try:
            return images.resize_square(images.decode(path.read_bytes()), size)
        except (OSError, BadSampleError) as error:
            raise TaskError(f"{path}: {error}") from None

    return read


def _shown(question: Question) -> dict:
    return {
        "question": question.text,
        "skill": question.skill,
        "gold": question.gold,
        "images": [str(path.resolve()) for path in question.images],
    }


def _first(*values):
    return next((value for value in values if value is not None), None)
