"""Evaluation of a model on a benchmark: predictions and scores, written to a directory."""

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from tqdm import tqdm

from megatron_owl2.config.schema import ModelConfig
from megatron_owl2.config.templates import TEMPLATES
from megatron_owl2.data import images
from megatron_owl2.errors import BadSampleError, TaskError
from megatron_owl2.evaluation.benchmark import (
    PREDICTIONS,
    SCORES,
    SUBMISSION,
    Benchmark,
    Gold,
    Question,
    has_answers,
)
from megatron_owl2.evaluation.benchmark import score as score_predictions
from megatron_owl2.evaluation.registry import find_benchmarks
from megatron_owl2.inference.engine import Generator
from megatron_owl2.inference.loading import LoadedModel


@dataclass(frozen=True)
class Settings:
    """Options of an evaluation; None takes the benchmark's own value.

    `blind` replaces every image by a black one (uint8 zeros, before normalisation): what the
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
    name: str,
    questions: list[Question],
    gold: Gold,
    output: str | Path,
    settings: Settings,
    about: dict,
) -> dict:
    """The scores of the model's answers to `questions` of the benchmark `name`.

    Writes predictions.jsonl, scores.json and, if every question was asked, the file for the
    benchmark's server to `output`. `questions` and `gold` come from `benchmark.read`; without gold
    there are no scores. `about` (names of model and data) is kept with the scores. Every process of
    a tensor-parallel group calls this and the first one writes. Raises TaskError, ScoreError and
    InferenceError.
    """
    benchmark = find_benchmarks()[name]
    suffix = benchmark.suffix if settings.suffix is None else settings.suffix
    limits = {
        key: getattr(benchmark if getattr(settings, key) is None else settings, key)
        for key in ("max_new_tokens", "min_new_tokens")
    }
    main = torch.distributed.get_rank() == 0
    if main:
        Path(output).mkdir(parents=True, exist_ok=True)
        for old in (Path(output) / SCORES, *Path(output).glob(f"{SUBMISSION}*")):
            old.unlink(missing_ok=True)  # of the predictions that are replaced
    read_image = _image_reader(loaded.config, settings)
    generator = Generator(loaded)
    template = TEMPLATES[loaded.config.template]
    predictions: dict[int | str, str] = {}
    scored = has_answers(gold)
    started = time.perf_counter()
    with (
        # A path may hold bytes that are no text; escaped they are JSON as well.
        open(
            Path(output) / PREDICTIONS if main else os.devnull,
            "w",
            encoding="utf-8",
            errors="backslashreplace",
        ) as file,
        tqdm(total=len(questions), desc=name, unit=" questions", disable=not main) as bar,
    ):
        for first in range(0, len(questions), settings.batch_size):
            batch = questions[first : first + settings.batch_size]
            answers = generator.generate(
                [question.prompt(suffix, template) for question in batch],
                [_images_of(question, read_image) for question in batch],
                **limits,
            )
            for question, answer in zip(batch, answers, strict=True):
                predictions[question.id] = answer
                row = _prediction(
                    benchmark, question, answer, gold if scored else {}, settings.variant
                )
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            bar.update(len(batch))
    seconds = time.perf_counter() - started
    result = {
        **about,
        "task": name,
        "blind": settings.blind,
        "limit": settings.limit,
        "prompt_suffix": suffix,
        "template": template.name,
        **limits,
        "variant": settings.variant or next(iter(benchmark.variants), None),
        "seconds": round(seconds, 2),
        "questions_per_second": round(len(questions) / seconds, 2),
        **(score_predictions(benchmark, predictions, gold, settings.variant) if scored else {}),
    }
    if main:
        if benchmark.submission and settings.limit is None:
            file_name, content = benchmark.submission(predictions, gold)
            (Path(output) / f"{SUBMISSION}{file_name}").write_bytes(content)
        (Path(output) / SCORES).write_text(json.dumps(result, indent=1) + "\n")
    return result


def table(scores: dict, columns: Sequence[str] = ("accuracy", "majority", "n")) -> str:
    """A text table of a benchmark's score, in percent: a row per skill and one for all."""
    rows = scores["skills"] | {"all": scores["overall"]}
    width = max(map(len, rows))
    heads = [f"{name:>{5 if name == 'n' else 8}}" for name in columns]
    lines = ["  ".join([f"{'skill':<{width}}", *heads])]
    for name, row in rows.items():
        values = [
            _cell(row.get(column)).rjust(len(head))
            for column, head in zip(columns, heads, strict=True)
        ]
        lines.append("  ".join([f"{name:<{width}}", *values]))
    named = ("precision", "recall", "f1", "perception", "cognition")
    more = {k: v for k, v in scores["overall"].items() if k in named}
    if more:
        lines.append("  ".join(f"{name} {value:.2f}" for name, value in more.items()))
    if unreachable := scores["overall"].get("unreachable"):
        lines.append(
            f"{unreachable} questions cannot be answered under this rule, because it changes "
            "every answer but not their gold (capitals, articles, number words); see --variant"
        )
    if unclear := scores["overall"].get("unclear"):
        lines.append(f'{unclear} answers have no "yes" and count as "yes", as the rule has it')
    if note := scores["overall"].get("note"):
        lines.append(note)
    return "\n".join(lines)


def _cell(value: float | None) -> str:
    """A number of the table; a count has no decimals, and what a row lacks is a dash."""
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.2f}"


def _images_of(
    question: Question, read: Callable[[Path | bytes], torch.Tensor]
) -> list[torch.Tensor]:
    shown = []
    for image in question.images:
        try:
            shown.append(read(image))
        except (OSError, BadSampleError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise TaskError(
                f"{_place(image)}: {reason} (the image of question {question.id!r})"
            ) from None
    return shown


def _place(image: Path | bytes) -> str:
    return str(image.resolve()) if isinstance(image, Path) else "inside the question file"


def _image_reader(model: ModelConfig, settings: Settings) -> Callable[[Path | bytes], torch.Tensor]:
    """A reader of images [3, size, size] in uint8, cached: questions about one image that follow
    each other get the same tensor object, which the generator encodes once."""
    size, to_square = model.vision.image_size, images.square_resize(model)
    black = torch.zeros(3, size, size, dtype=torch.uint8)

    @lru_cache(maxsize=settings.batch_size)
    def read(image: Path | bytes) -> torch.Tensor:
        if settings.blind:
            return black
        data = image.read_bytes() if isinstance(image, Path) else image
        return images.load_square(data, size, to_square=to_square)

    return read


def _prediction(
    benchmark: Benchmark, question: Question, answer: str, gold: Gold, variant: str | None
) -> dict:
    """A row of predictions.jsonl, with the question's own score where it has one."""
    score = None
    if gold and "accuracy" in benchmark.columns:
        own = {question.id: gold[question.id]}
        alone = score_predictions(benchmark, {question.id: answer}, own, variant)
        score = alone["overall"]["accuracy"]
    return {
        benchmark.id_field: question.id,
        benchmark.answer_field: answer,
        "score": score,
        "question": question.text,
        "skill": question.skill,
        "gold": question.gold,
        "images": [_place(image) for image in question.images],
    }
