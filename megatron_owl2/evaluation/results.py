"""Results beside the paper's: results.md for the eye and results.json with the same rows."""

import json
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
    """One value: what was measured here and, if the paper has it, there."""

    task: str
    metric: str
    ours: float | None
    paper: float | None
    n: int
    prompt: str
    variant: str | None
    split: str | None
    table: int | None = None
    paper_split: str | None = None
    notes: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()


def rows_of(result: Mapping[str, Any]) -> list[Row]:
    """The rows of a task's scores.json: a row for each figure of the paper, or one for its most
    important value if the paper has none."""
    benchmark = find_benchmarks()[result["task"]]
    figures = [figure for figure in FIGURES if _is_counterpart(figure, result)]
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
        "rows": [asdict(row) for row in rows],
        "notes": {key: NOTES[key] for key in used},
        "without_data": list(without_data),
        "failed": dict(failed or {}),
    }
    write_atomically(folder / "results.json", (json.dumps(tree, indent=1) + "\n").encode())
    page = _markdown(results, rows, used, without_data, failed or {})
    write_atomically(folder / "results.md", page.encode(errors="backslashreplace"))


def _is_counterpart(figure: Figure, result: Mapping[str, Any]) -> bool:
    if figure.task != result["task"] or (figure.own_split and figure.split != result.get("split")):
        return False
    # A skill that was not asked, such as the other set of two, has no row.
    return "overall" not in result or _value(result, figure.path[:-1]) is not None


def _value(result: Mapping[str, Any], path: Sequence[str]) -> Any:
    found: Any = result
    for name in path:
        found = found.get(name) if isinstance(found, Mapping) else None
    return found


def _row(benchmark: Benchmark, result: Mapping[str, Any], figure: Figure) -> Row:
    remarks = []
    if "overall" not in result:
        remarks.append("no scores: answers not published, or a judge's")
    if result["blind"]:
        remarks.append("black images")
    if result["limit"] is not None:
        remarks.append(f"the first {result['limit']} questions only")
    if result["prompt_suffix"] != benchmark.suffix_of(result["prompt"], None, result["variant"]):
        remarks.append("another suffix of the prompt")
    return Row(
        task=figure.task,
        metric=figure.metric,
        ours=_value(result, figure.path),
        paper=figure.value,
        n=_value(result, (*figure.path[:-1], "n")) or result["questions"],
        prompt=result["prompt"],
        variant=result["variant"],
        split=result.get("split"),
        table=figure.table,
        paper_split=figure.split or None,
        notes=figure.notes,
        remarks=tuple(remarks),
    )


_HEADS = ("task", "metric", "ours", "paper", "n", "prompt", "variant", "split", "table")


def _markdown(
    results: Sequence[Mapping[str, Any]],
    rows: Sequence[Row],
    used: Sequence[str],
    without_data: Sequence[str],
    failed: Mapping[str, str],
) -> str:
    models = dict.fromkeys(_text(result.get("model")) for result in results)
    lines = ["# Results", "", f"Model: {', '.join(models)}", ""] if models else ["# Results", ""]
    lines += [f"| {' | '.join([*_HEADS, 'remarks'])} |", f"|{'---|' * (len(_HEADS) + 1)}"]
    for row in rows:
        marks = "".join(f"[^{used.index(key) + 1}]" for key in row.notes)
        of_paper = f" ({row.paper_split} in the paper)" if row.paper_split else ""
        cells = [
            row.task,
            row.metric,
            _number(row.ours),
            _number(row.paper) + marks,
            str(row.n),
            row.prompt,
            _text(row.variant),
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
