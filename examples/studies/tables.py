"""The paper's ablations in small: Tables 5 to 8 as Markdown and as a picture.

    python examples/studies/tables.py DIRECTORY "SEEDS"

DIRECTORY is the folder that examples/studies/tables.sh makes; tables.md, tables.json and tables.png
are written there.
"""

import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

from megatron_owl2.plotting.figure import canvas

COLORS = ("#2b6cb0", "#ed8936", "#805ad5")
SETS = {"seen": "new images", "heldout": "held-out pairs", "text": "texts"}


@dataclass(frozen=True)
class Table:
    """Table of the paper: its runs here by the name of the row, and the paper's figure for each."""

    title: str
    paper: str  # what its figures are
    rows: dict[str, tuple[str, str]]  # name: run, figure


TABLES = (
    Table(
        "Table 5: modality split x data of instruction tuning",
        "direction",
        {
            "split, text only": ("text", "text up"),
            "split, multimodal only": ("multimodal", "images up, text down"),
            "split, joint": ("base", "best on both"),
            "no split, text only": ("no_split_text", "text up"),
            "no split, multimodal only": ("no_split_multimodal", "images up, text down"),
            "no split, joint": ("no_split", "below split, joint"),
        },
    ),
    Table(
        "Table 6: the ViT in both stages",
        "VQAv2",
        {
            "frozen": ("frozen_vit", "74.8"),
            "trainable": ("base", "76.2"),
            "with layer-wise decay": ("layer_decay", "76.8"),
        },
    ),
    Table(
        "Table 7: visual queries (the paper's are four times as many)",
        "VQAv2",
        {
            "2": ("queries_2", "58.3"),
            "4": ("queries_4", "66.2"),
            "8": ("queries_8", "72.4"),
            "16": ("base", "76.8"),
            "32": ("queries_32", "76.7"),
        },
    ),
    Table(
        "Table 8: pixels of stage 2 (the paper's are eight times as many)",
        "VQAv2",
        {
            "28": ("resolution_28", "76.8"),
            "42": ("resolution_42", "78.5"),
            "56": ("base", "79.4"),
        },
    ),
)

Found = dict[str, dict[str, list[float]]]  # run -> set -> accuracy of every seed


def read(folder: Path, seeds: list[str]) -> tuple[Found, dict[str, int]]:
    """Accuracies in percent, and the number of questions of each set."""
    found: Found = {}
    questions = {}
    for run in {run for table in TABLES for run, _ in table.rows.values()}:
        for name in SETS:
            paths = [folder / f"scores/{run}-{seed}-{name}/scores.json" for seed in seeds]
            overall = [json.loads(path.read_text())["overall"] for path in paths]
            found.setdefault(run, {})[name] = [row["accuracy"] for row in overall]
            questions[name] = overall[0]["n"]
    return found, questions


def markdown(found: Found, questions: dict[str, int], seeds: list[str]) -> str:
    """All tables, with mean and standard deviation over the seeds."""
    lines = []
    heads = [f"{label} ({questions[name]:,})" for name, label in SETS.items()]
    for table in TABLES:
        lines += [f"**{table.title}**", "", f"| | {' | '.join(heads)} | paper: {table.paper} |"]
        lines.append("|---" * (len(heads) + 2) + "|")
        for row, (run, figure) in table.rows.items():
            cells = [_cell(found[run][name]) for name in SETS]
            lines.append(f"| {row} | {' | '.join(cells)} | {figure} |")
        lines.append("")
    lines.append(
        f"% of exact answers, mean and standard deviation over {len(seeds)} seeds; in brackets the "
        "questions of each seed"
    )
    return "\n".join(lines)


def _cell(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def draw(found: Found, questions: dict[str, int], seeds: list[str], path: Path) -> None:
    """A panel for each table: bars of the means and a dot for every seed."""
    asked = ", ".join(f"{questions[name]:,} on {label}" for name, label in SETS.items())
    with canvas(path, "The paper's ablations, small", 11, 8) as figure:
        axes = figure.subplots(2, 2, sharex=True)
        for axis, table in zip(axes.flat, TABLES, strict=True):
            for number, (name, label) in enumerate(SETS.items()):
                values = [found[run][name] for run, _ in table.rows.values()]
                places = [place + 0.27 * number for place in range(len(values))]
                color = COLORS[number]
                axis.barh(places, [*map(statistics.mean, values)], 0.25, color=color, label=label)
                for place, dots in zip(places, values, strict=True):
                    axis.plot(dots, [place] * len(dots), ".", color="#1f2933", markersize=4)
            axis.set_yticks([place + 0.27 for place in range(len(table.rows))], list(table.rows))
            axis.invert_yaxis()
            axis.set_xlim(0, 100)
            axis.set_title(table.title, fontsize=9)
        figure.legend(
            *axes[0, 0].get_legend_handles_labels(),
            loc="outside lower center",
            ncols=3,
            frameon=False,
            title=f"% of exact answers ({asked}; {len(seeds)} seeds)",
        )


def main() -> int:
    folder, seeds = Path(sys.argv[1]), sys.argv[2].split()
    found, questions = read(folder, seeds)
    text = markdown(found, questions, seeds)
    (folder / "tables.json").write_text(json.dumps(found, indent=1) + "\n")
    (folder / "tables.md").write_text(text + "\n")
    draw(found, questions, seeds, folder / "tables.png")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
