"""Table and picture of an ablation: scores of all runs, as mean and spread over the seeds.

    python examples/ablation_table.py DIRECTORY "SEEDS"

DIRECTORY is the `ablation` folder that examples/ablation.sh makes; table.md, table.json and
table.png are written there.
"""

import json
import statistics
import sys
from pathlib import Path

from megatron_owl2.plotting.figure import canvas

SPLITS = {"on": "with modality split", "off": "without"}
DATA = {"text": "text only", "images": "multimodal only", "joint": "joint"}
TASKS = {"vqav2": "VQA", "text": "text"}


def read(folder: Path, seeds: list[str]) -> dict[str, dict[str, dict[str, list[float]]]]:
    """Accuracies in percent, one for each seed, by split, data and task."""
    return {
        split: {
            data: {
                task: [
                    json.loads(
                        (folder / f"scores/{split}-{data}-{seed}-{task}/scores.json").read_text()
                    )["overall"]["accuracy"]
                    for seed in seeds
                ]
                for task in TASKS
            }
            for data in DATA
        }
        for split in SPLITS
    }


def table(found: dict, seeds: list[str]) -> str:
    """Markdown with mean and standard deviation over the seeds."""
    columns = [(data, task) for data in DATA for task in TASKS]
    head = [f"{DATA[data]}: {TASKS[task]}" for data, task in columns]
    lines = ["| | " + " | ".join(head) + " |", "|---" * (len(head) + 1) + "|"]
    for split, name in SPLITS.items():
        cells = [_cell(found[split][data][task]) for data, task in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    note = f"% of exact answers, mean and standard deviation over {len(seeds)} seeds"
    return "\n".join([*lines, "", note])


def _cell(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def draw(found: dict, path: Path) -> None:
    """Bars of the means and a dot for every seed."""
    with canvas(path, "Modality split x data of instruction tuning", 9, 3.6) as figure:
        axes = figure.subplots(1, len(TASKS), sharey=True)
        for axis, (task, name) in zip(axes, TASKS.items(), strict=True):
            for number, (split, label) in enumerate(SPLITS.items()):
                places = [place + 0.4 * number for place in range(len(DATA))]
                values = [found[split][data][task] for data in DATA]
                color = ("#2b6cb0", "#ed8936")[number]
                axis.bar(places, [*map(statistics.mean, values)], 0.38, color=color, label=label)
                for place, seeds in zip(places, values, strict=True):
                    axis.plot([place] * len(seeds), seeds, ".", color="#1f2933", markersize=5)
            axis.set_xticks([place + 0.2 for place in range(len(DATA))], list(DATA.values()))
            axis.set_title(name)
        axes[0].set_ylabel("% of exact answers")
        figure.legend(
            *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False
        )


def main() -> int:
    folder, seeds = Path(sys.argv[1]), sys.argv[2].split()
    found = read(folder, seeds)
    text = table(found, seeds)
    (folder / "table.json").write_text(json.dumps(found, indent=1) + "\n")
    (folder / "table.md").write_text(text + "\n")
    draw(found, folder / "table.png")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
