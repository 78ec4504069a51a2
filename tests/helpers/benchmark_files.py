"""Files of benchmarks written for tests, and what the tasks make of them."""

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
