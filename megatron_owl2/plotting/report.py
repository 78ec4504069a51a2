"""Report of one model: its evaluations as one table per skill, and the curves of its training."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_owl2.errors import ReportError
from megatron_owl2.evaluation.benchmark import PREDICTIONS, SCORES
from megatron_owl2.evaluation.registry import find_benchmarks
from megatron_owl2.utils.json_text import parse_json, parse_json_lines

_MOST_STEPS = 10**12
# What evaluations in one row have in common, whatever they show to the model.
_ALIKE = ("task", "model_content", "adapter_content", "prompt", "prompt_suffix")


@dataclass
class SkillScore:
    """Percentages of one skill on one set; None where that evaluation was not given."""

    accuracy: float | None = None
    blind: float | None = None
    majority: float | None = None
    n: int = 0


Scores = dict[str, dict[str, SkillScore]]  # set -> skill -> score
Series = dict[str, tuple[list[int], list[float]]]  # label -> steps and values


@dataclass(frozen=True)
class LossCurves:
    """The training loss of a run over its steps, and its validation losses by source."""

    name: str
    steps: list[int]
    losses: list[float]
    validation: Series


@dataclass(frozen=True)
class Answer:
    """A question about an image, as it was answered."""

    image: Path
    skill: str
    question: str
    answer: str
    gold: str
    right: bool


def named(option: str, arguments: Sequence[str]) -> list[tuple[str, Path]]:
    """(name, directory) of NAME=DIR arguments; raises ReportError naming the option."""
    pairs = []
    for argument in arguments:
        name, equals, path = argument.partition("=")
        if not (name and equals and path):
            raise ReportError(f"{option} {argument!r} must be NAME=DIR")
        pairs.append((name, Path(path)))
    return pairs


def collect(evaluations: Sequence[tuple[str, Path]]) -> Scores:
    """Scores per set and skill from (set name, evaluation directory) pairs.

    A set may have several directories: one per task, and one more per task with black images.
    Raises ReportError if one is missing, two are of the same kind, or a blind evaluation was not
    asked the same number of questions, in the same way, or is of another model.
    """
    scores: Scores = {}
    beside: dict[tuple[str, str], dict] = {}
    for name, directory in evaluations:
        result = _read_scores(directory)
        result.setdefault("adapter_content", None)
        for skill, row in result["skills"].items():
            other = beside.setdefault((name, skill), result)
            for key in _ALIKE:  # evaluations of earlier versions lack some
                if other.get(key, result.get(key)) != result.get(key, other.get(key)):
                    raise ReportError(
                        f"{directory}: the {key} of skill {skill!r} is not that of the other "
                        f"evaluation of set {name!r}; give one of them another name"
                    )
            entry = scores.setdefault(name, {}).setdefault(skill, SkillScore())
            kind = "blind" if result["blind"] else "accuracy"
            if getattr(entry, kind) is not None:
                raise ReportError(
                    f"{directory}: set {name!r} has skill {skill!r} twice; give one of the "
                    "evaluations another name"
                )
            if entry.n not in (0, row["n"]):
                raise ReportError(
                    f"{directory}: {row['n']} questions on {skill!r}, but {entry.n} in the other "
                    f"evaluation of set {name!r}; evaluate both with the same --limit"
                )
            setattr(entry, kind, row["accuracy"])
            entry.majority, entry.n = row["majority"], row["n"]
    return scores


def table(scores: Scores) -> str:
    """One line per skill and set, the sets of a skill together; percent, `-` if not evaluated."""
    skills = list(dict.fromkeys(skill for rows in scores.values() for skill in rows))
    cells = [["skill", "set", "accuracy", "blind", "majority", "n"]]
    for skill in skills:
        sets = [(name, rows[skill]) for name, rows in scores.items() if skill in rows]
        for i, (name, row) in enumerate(sets):
            percents = (_percent(v) for v in (row.accuracy, row.blind, row.majority))
            cells.append(["" if i else skill, name, *percents, str(row.n)])
    widths = [max(len(row[i]) for row in cells) for i in range(6)]
    lines = [
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    ]
    rule = "-" * len(lines[0])
    return "\n".join([lines[0], rule, *lines[1:]])


def _read_scores(directory: Path) -> dict:
    """The scores of an evaluation, with every field that a report shows."""
    path = directory / SCORES
    scores = _json(path)
    _check_fields(path, scores, {"task": str, "blind": bool})
    if "skills" not in scores:
        raise ReportError(f"{path} has no scores, as its answers have no gold; leave it out")
    _check_fields(path, scores, {"skills": dict})
    if scores["task"] not in find_benchmarks():
        known = ", ".join(find_benchmarks())
        raise ReportError(f"{path}: there is no task {scores['task']!r}; known: {known}")
    for skill, row in scores["skills"].items():
        if isinstance(row, dict) and not {"accuracy", "majority"} <= row.keys():
            raise ReportError(
                f"{path}: a report shows accuracy beside that of the most common answer, which "
                f"{scores['task']} does not have; leave it out, its figures are in results.md"
            )
        numbers = {"accuracy": int | float, "majority": int | float, "n": int}
        _check_fields(f"{path}, skill {skill!r},", row, numbers)
    return scores


def read_metrics(run: Path) -> list[dict]:
    """The rows of a run directory's metrics.jsonl; raises ReportError if none has a loss."""
    path = run / "metrics.jsonl" if run.is_dir() else run
    rows = _json_lines(path)
    for where, row in rows:
        _check_fields(where, row, {"step": int})
        if not 0 <= row["step"] <= _MOST_STEPS:
            raise ReportError(f"{where} is not as it was written: its 'step' is no step")
        for nested, kind in (("validation", list), ("grad_norms", dict), ("rates", dict)):
            if nested in row:
                _check_fields(where, row, {nested: kind})
        for source in row.get("validation", ()):
            _check_fields(f"{where}, validation,", source, {"name": str})
    if not any(_is_finite(row.get("loss")) for _, row in rows):
        raise ReportError(f"{path} holds no loss")
    return [row for _, row in rows]


def read_loss_curves(name: str, run: Path) -> LossCurves:
    """The curves of the run directory `run`, shown as `name`.

    Steps without a finite loss are left out. Raises ReportError if none has one.
    """
    rows = read_metrics(run)
    return LossCurves(name, *values_over_steps(rows, "loss"), validation_losses(rows))


def validation_losses(rows: Sequence[dict]) -> Series:
    """Losses of each validation source by its name, over the steps that had a validation."""
    found = [
        {"step": row["step"], "name": source["name"], "loss": source.get("loss")}
        for row in rows
        for source in row.get("validation", ())
    ]
    names = dict.fromkeys(row["name"] for row in found)
    series = {
        name: values_over_steps([row for row in found if row["name"] == name], "loss")
        for name in names
    }
    return {name: (steps, losses) for name, (steps, losses) in series.items() if steps}


def values_over_steps(
    rows: Sequence[dict], key: str, scale: float = 1
) -> tuple[list[int], list[float]]:
    """Steps and values, times `scale`, of those rows that have a finite value under `key`."""
    kept = [(row["step"], row[key] * scale) for row in rows if _is_finite(row.get(key))]
    return [step for step, _ in kept], [value for _, value in kept]


def _is_finite(value: Any) -> bool:
    try:
        return isinstance(value, int | float) and math.isfinite(value)
    except OverflowError:  # a whole number that no float can hold
        return False


def read_answers(evaluations: Sequence[tuple[str, Path]]) -> dict[str, list[Answer]]:
    """The answers about images by set; blind evaluations and sets without images are left out."""
    answers: dict[str, list[Answer]] = {}
    for name, directory in evaluations:
        result = _read_scores(directory)
        if result["blind"]:
            continue
        field = find_benchmarks()[result["task"]].answer_field
        texts = dict.fromkeys((field, "question", "skill", "gold"), str)
        for where, row in _json_lines(directory / PREDICTIONS):
            _check_fields(where, row, texts | {"images": list, "score": int | float})
            if row["images"]:
                _check_fields(where, {"images[0]": row["images"][0]}, {"images[0]": str})
                answer = Answer(
                    image=Path(row["images"][0]),
                    skill=row["skill"],
                    question=row["question"],
                    answer=row[field],
                    gold=row["gold"],
                    right=row["score"] >= 50,  # VQA accuracy has shades
                )
                answers.setdefault(name, []).append(answer)
    return answers


def pick(answers: Sequence[Answer], count: int) -> list[Answer]:
    """`count` answers for the eye: the skills in turn, spread evenly over each skill's questions.

    Right or wrong plays no role in the choice; each is about another image where there are
    enough.
    """
    skills: dict[str, list[Answer]] = {}
    for answer in answers:
        skills.setdefault(answer.skill, []).append(answer)
    chosen: list[Answer] = []
    for i in range(min(count, len(answers))):
        found = list(skills.values())[i % len(skills)]
        start = round((i + 0.5) / count * len(found))
        turn = [found[(start + k) % len(found)] for k in range(len(found))]
        used = {answer.image for answer in chosen}
        chosen.append(next((a for a in turn if a.image not in used), turn[0]))
    return chosen


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _json(path: Path) -> dict:
    """The object of a JSON file."""
    tree = _content(path, parse_json)
    if not isinstance(tree, dict):
        raise ReportError(f"{path} cannot be read: it holds no object")
    return tree


def _json_lines(path: Path) -> list[tuple[str, dict]]:
    """The place, for messages, and the object of every line."""
    rows = [(f"{path}, line {number}", row) for number, row in _content(path, parse_json_lines)]
    for where, row in rows:
        if not isinstance(row, dict):
            raise ReportError(f"{where} is no object")
    return rows


def _content(path: Path, parse: Callable[[bytes], Any]) -> Any:
    try:
        return parse(path.read_bytes())
    except FileNotFoundError:
        raise ReportError(
            f"{path} does not exist; tools/evaluate.py writes {SCORES} and {PREDICTIONS}, training "
            "metrics.jsonl"
        ) from None
    except OSError as error:
        raise ReportError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ReportError(f"{path} cannot be read: {error}") from None


def _check_fields(where: str | Path, row: Any, fields: Mapping[str, Any]) -> None:
    """Check of an object's values; raises ReportError for one that lacks or is of another type."""
    for name, kind in fields.items():
        value = row.get(name) if isinstance(row, dict) else None
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ReportError(
                f"{where} is not as it was written: its {name!r} is {value!r}; make it again"
            )
