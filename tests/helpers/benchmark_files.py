"""Files of benchmarks written for tests, and what the tasks make of them."""

import base64
import csv
import io
import json
from pathlib import Path

from PIL import Image

from megatron_owl2.evaluation import benchmark
from megatron_owl2.evaluation.registry import find_benchmarks

TASKS = find_benchmarks()
LETTER = "\nAnswer with the option’s letter from the given choices directly. ASSISTANT:"


def draw(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), "red").save(path, "PNG")
    return path


def dump(path: Path, content) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def asked(task: str, data: Path):
    """Questions by id, gold, and prompts by id."""
    questions, gold = benchmark.read(TASKS[task], data)
    prompts = {q.id: q.prompt(TASKS[task].suffix) for q in questions}
    return {q.id: q for q in questions}, gold, prompts


def marks(task: str, predictions: dict, gold: dict, variant: str | None = None) -> dict:
    """{skill: (accuracy, n)}, with "all" for the total."""
    table = benchmark.score(TASKS[task], predictions, gold, variant)
    rows = table["skills"] | {"all": table["overall"]}
    return {name: (row["accuracy"], row["n"]) for name, row in rows.items()}


def png(color: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (40, 40), color).save(file, "PNG")
    return file.getvalue()


def write_tsv(path: Path, rows: list[dict], delimiter: str = "\t") -> Path:
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names, delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def mmbench_rows() -> list[dict]:
    """Question 7 in two passes and question 8, of three options, in three."""
    red, blue = (base64.b64encode(png(color)).decode() for color in ("red", "blue"))
    shown = {"source": "x", "comment": "", "split": "dev"}
    seven = shown | {"question": 'is it\n"red"?', "hint": "look", "category": "color"}
    seven |= {"l2-category": "coarse_perception", "C": "", "D": ""}
    eight = shown | {"question": "which?", "hint": "", "category": "logic", "D": ""}
    eight |= {"l2-category": "logic_reasoning"}
    return [
        seven | {"index": 7, "A": "yes", "B": "no", "answer": "A", "image": red},
        eight | {"index": 8, "A": "x", "B": "y", "C": "z", "answer": "C", "image": blue},
        seven | {"index": 1000007, "A": "no", "B": "yes", "answer": "B", "image": "7"},
        eight | {"index": 1000008, "A": "y", "B": "z", "C": "x", "answer": "B", "image": blue},
        eight | {"index": 2000008, "A": "z", "B": "x", "C": "y", "answer": "A", "image": "8"},
    ]
