"""Results beside published ones: results.md for the eye and results.json with the same rows."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_owl2.evaluation.benchmark import Benchmark
from megatron_owl2.evaluation.paper import FIGURES, NOTES, Figure
from megatron_owl2.evaluation.registry import find_benchmarks
from megatron_owl2.utils.files import write_atomically

FILES = ("results.md", "results.json")


@dataclass(frozen=True)
class Row:
    """One value: what was measured here and, if it was published, there; `paper_model` is whose
    value that is."""

    task: str
    metric: str
    ours: float | None
    paper: float | None
    n: int
    prompt: str
    variant: str | None
    split: str | None
    data: str | None = None  # name of the question file, or of the folder of many
    table: int | None = None
    paper_split: str | None = None
    paper_model: str | None = None
    notes: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()


def rows_of(result: Mapping[str, Any]) -> list[Row]:
    """The rows of a task's scores.json: a row for each figure of the paper, or one for its most
    important value if the paper has none."""
    benchmark = find_benchmarks()[result["task"]]
    figures = [figure for figure in FIGURES if _is_counterpart(benchmark, figure, result)]
    if figures:
        return [_row(benchmark, result, figure) for figure in figures]
    metric = benchmark.columns[0]
    own = Figure(None, result["task"], metric, ("overall", metric), None, "")
    return [_row(benchmark, result, own)]


def write(
    folder: Path,
    results: Sequence[Mapping[str, Any]],
    without_data: Sequence[str] = (),
    failed: Mapping[str, str] | None = None,
) -> None:
    """Both files in `folder`, from what was written to scores.json; `failed` are messages by the
    name of what failed."""
    rows = [row for result in results for row in rows_of(result)]
    used = [key for key in NOTES if any(key in row.notes for row in rows)]
    tree = {
        "models": _models(results),
        "rows": [asdict(row) for row in rows],
        "notes": {key: NOTES[key] for key in used},
        "without_data": list(without_data),
        "failed": dict(failed or {}),
    }
    write_atomically(folder / "results.json", (json.dumps(tree, indent=1) + "\n").encode())
    page = _markdown(results, rows, used, without_data, failed or {})
    write_atomically(folder / "results.md", page.encode(errors="backslashreplace"))


def _models(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the results are of: names of models, their adapters, and precisions."""
    names = []
    for result in results:
        parts = [result.get("model"), result.get("adapter"), result.get("precision")]
        names.append(", ".join(str(part) for part in parts if part is not None))
    return list(dict.fromkeys(names))


def _is_counterpart(benchmark: Benchmark, figure: Figure, result: Mapping[str, Any]) -> bool:
    if figure.task != result["task"] or (figure.own_split and figure.split != result.get("split")):
        return False
    file = result.get("questions_file")
    if file is not None and not re.search(figure.files, file, re.IGNORECASE):
        return False
    if _judged(benchmark, result) and not figure.judged:
        return False
    # A skill that was not asked, such as the other set of two, has no row.
    return "overall" not in result or _value(result, figure.path[:-1]) is not None


def _judged(benchmark: Benchmark, result: Mapping[str, Any]) -> bool:
    """Whether a judge's rule scored these answers, where there is another one as well."""
    return len(benchmark.variants) > 1 and benchmark.is_judged(result["variant"])


def _value(result: Mapping[str, Any], path: Sequence[str]) -> Any:
    found: Any = result
    for name in path:
        found = found.get(name) if isinstance(found, Mapping) else None
    return found


def _row(benchmark: Benchmark, result: Mapping[str, Any], figure: Figure) -> Row:
    remarks = []
    if "overall" not in result:
        remarks.append("no scores: answers not published, or a judge's")
    unjudged = figure.judged and not _judged(benchmark, result)
    if unjudged:
        remarks.append("no judge was asked")
    if result["blind"]:
        remarks.append("black images")
    if result["limit"] is not None:
        remarks.append(f"the first {result['limit']} questions only")
    if result["prompt_suffix"] != benchmark.suffix_of(result["prompt"], None, result["variant"]):
        remarks.append("another suffix of the prompt")
    for limit in ("max_new_tokens", "min_new_tokens"):
        if result.get(limit) not in (None, getattr(benchmark, limit)):
            remarks.append(f"{limit} {result[limit]}")
    return Row(
        task=figure.task,
        metric=figure.metric,
        ours=None if unjudged else _value(result, figure.path),
        paper=figure.value,
        n=_value(result, (*figure.path[:-1], "n")) or result["questions"],
        prompt=result["prompt"],
        variant=result["variant"],
        split=result.get("split"),
        data=result.get("questions_file"),
        table=figure.table,
        paper_split=figure.split or None,
        paper_model=None if figure.value is None else figure.model,
        notes=figure.notes,
        remarks=tuple(remarks),
    )


_HEADS = (
    "task",
    "metric",
    "ours",
    "paper",
    "of",
    "n",
    "prompt",
    "variant",
    "data",
    "split",
    "table",
)


def _markdown(
    results: Sequence[Mapping[str, Any]],
    rows: Sequence[Row],
    used: Sequence[str],
    without_data: Sequence[str],
    failed: Mapping[str, str],
) -> str:
    models = "; ".join(map(_line, _models(results)))
    lines = ["# Results", "", f"Model: {models}", ""] if models else ["# Results", ""]
    lines += [f"| {' | '.join([*_HEADS, 'remarks'])} |", f"|{'---|' * (len(_HEADS) + 1)}"]
    for row in rows:
        marks = "".join(f"[^{used.index(key) + 1}]" for key in row.notes)
        of_paper = f" ({row.paper_split} in the paper)" if row.paper_split else ""
        cells = [
            row.task,
            row.metric,
            _number(row.ours),
            _number(row.paper) + marks,
            _text(row.paper_model),
            str(row.n),
            row.prompt,
            _text(row.variant),
            _text(row.data),
            _text(row.split) + ("" if row.split == row.paper_split else of_paper),
            _text(row.table),
            "; ".join(row.remarks),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    if without_data:
        lines += ["", f"No data: {', '.join(without_data)}."]
    lines += [
        line for name, why in failed.items() for line in ("", f"Failed: {name}: {_line(why)}")
    ]
    lines += ["", *(f"[^{n}]: {NOTES[key]}" for n, key in enumerate(used, start=1))]
    return "\n".join(lines).rstrip() + "\n"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _text(value: object) -> str:
    return "-" if value is None else _line(str(value))


def _line(text: str) -> str:
    """A text in one line and one cell."""
    return " ".join(text.split()).replace("|", "\\|")
