"""A benchmark: how its published files become questions, how it is asked and how it is scored.

Each module of `evaluation.benchmarks` defines one `BENCHMARK`; the functions here read the files of
any of them.
"""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from megatron_owl2.data.conversation import prompt
from megatron_owl2.data.shards.records import IMAGE_PLACEHOLDER
from megatron_owl2.errors import TaskError

PREDICTIONS, SCORES = "predictions.jsonl", "scores.json"  # what an evaluation leaves

SHORT_ANSWER = " Answer the question using a single word or phrase."

Id = int | str
Gold = dict[Id, dict[str, Any]]  # rows of gold answers by question id
T = TypeVar("T")


@dataclass(frozen=True)
class Question:
    """One thing to ask: `images` are paths, `gold` is the answer to show beside the model's."""

    id: Id
    text: str
    images: tuple[Path, ...]
    skill: str
    gold: str

    def prompt(self, suffix: str) -> str:
        """The official inference prompt, images first. It ends at `ASSISTANT:`: the official
        evaluation scripts append a space, but models learn the answer's first token, which
        carries its own leading space, directly after the colon."""
        return prompt(IMAGE_PLACEHOLDER * len(self.images) + self.text + suffix)


@dataclass(frozen=True)
class Benchmark:
    """The entry of a benchmark: its files, its way of asking, and its scoring rule.

    Its questions are found in a folder by the pattern `file`, its gold by `gold_file`. Result files
    name a question `id_field` and the model's text `answer_field`, as the benchmark's own do.
    `suffix` follows every question; the token limits are those of the official evaluation.

    `read_questions(file, gold)` gives the questions, `read_gold(gold_file)` the gold rows by id,
    and `score(predictions, gold)`, with a third argument if there are `variants`, the tables that
    `scoring` describes. A reader may raise KeyError, TypeError or ValueError for a file in another
    format; `read` adds the name of the file.
    """

    about: str  # one line for the help of tools/evaluate.py
    file: str
    gold_file: str
    id_field: str
    answer_field: str
    suffix: str
    max_new_tokens: int
    min_new_tokens: int
    read_questions: Callable[[Path, Gold], list[Question]]
    read_gold: Callable[[Path], Gold]
    score: Callable[..., dict]
    variants: tuple[str, ...] = ()  # of the scoring rule, the default first


def read(
    benchmark: Benchmark, data: str | Path, limit: int | None = None
) -> tuple[list[Question], Gold]:
    """The questions, at most `limit`, and {id: gold row} of them, from a folder or question file.

    Images are looked for in `images/` beside the file. Raises TaskError for missing or
    ambiguous files, unreadable content, questions without gold, and images that are not there.
    """
    path = _find(data, benchmark.file)
    gold = read_gold(benchmark, path if benchmark.gold_file == benchmark.file else path.parent)
    questions = _read(path, lambda path: benchmark.read_questions(path, gold))[:limit]
    if not questions:
        raise TaskError(f"{path} holds no question")
    lost = sorted({image for q in questions for image in q.images if not image.is_file()})
    if lost:
        raise TaskError(f"{len(lost)} images of {path} do not exist, such as {lost[0]}")
    return questions, {question.id: gold[question.id] for question in questions}


def read_gold(benchmark: Benchmark, path: str | Path) -> Gold:
    """{id: row} as `benchmark.score` takes it, from the benchmark's folder or its gold file.

    Raises TaskError for missing or ambiguous files and unreadable content.
    """
    return _read(_find(path, benchmark.gold_file), benchmark.read_gold)


def read_predictions(benchmark: Benchmark, path: str | Path) -> dict[Id, str]:
    """{id: text} from JSON lines or a JSON list with the fields of the benchmark's result format.

    Raises TaskError for rows without these fields and for ids that come twice.
    """
    path = Path(path)
    rows = _read(path, lambda path: rows_by_id(read_rows(path), benchmark.id_field))
    field = benchmark.answer_field
    wrong = [i for i, row in rows.items() if not isinstance(row.get(field), str)]
    if wrong:
        raise TaskError(f"{path}: prediction {wrong[0]!r} has no text {field!r}")
    return {i: row[field] for i, row in rows.items()}


def score(
    benchmark: Benchmark, predictions: dict[Id, str], gold: Gold, variant: str | None = None
) -> dict:
    """`benchmark.score` under one of its variants, None being the default.

    Raises TaskError for a variant that the benchmark does not have, and ScoreError.
    """
    if variant is None:
        return benchmark.score(predictions, gold)
    if variant not in benchmark.variants:
        known = ", ".join(benchmark.variants) or "none"
        raise TaskError(f"this task has no scoring variant {variant!r}; known: {known}")
    return benchmark.score(predictions, gold, variant)


def read_json(path: Path) -> Any:
    """The content of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def read_rows(path: Path) -> list[dict]:
    """The rows of a JSON list, or of a file with one JSON object per line."""
    text = path.read_text(encoding="utf-8")
    if text.lstrip().startswith("["):
        return json.loads(text)
    return [json.loads(line) for line in text.splitlines() if line.strip()]


def rows_by_id(rows: list[dict], field: str) -> dict[Id, dict]:
    """{row[field]: row}; raises TaskError for an id that comes twice."""
    table = {row[field]: row for row in rows}
    if len(table) < len(rows):
        repeated = next(i for i, n in Counter(row[field] for row in rows).items() if n > 1)
        raise TaskError(f"{len(rows) - len(table)} rows repeat a {field}, such as {repeated!r}")
    return table


def _find(data: str | Path, pattern: str) -> Path:
    """`data` if it is a file, else the only file in it that matches."""
    data = Path(data)
    if data.is_file():
        return data
    if not data.is_dir():
        raise TaskError(f"{data} does not exist")
    found = sorted(path for path in data.glob(pattern) if path.is_file())
    if not found:
        raise TaskError(f"{data} holds no file {pattern}")
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise TaskError(f"{data} holds several files {pattern}: {names}; name one of them")
    return found[0]


def _read(path: Path, reader: Callable[[Path], T]) -> T:
    """The result of `reader` for a file; its failures as TaskError with the file's name."""
    try:
        return reader(path)
    except TaskError:
        raise
    except (KeyError, TypeError, AttributeError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise TaskError(f"{path} is not in the format that the task reads: {reason}") from None
    except (OSError, ValueError) as error:
        raise TaskError(f"{path} cannot be read: {error}") from None
