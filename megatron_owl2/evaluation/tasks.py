"""Evaluation tasks: the published files of a benchmark in, questions and scores out."""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_owl2.data.conversation import prompt
from megatron_owl2.data.shards.records import IMAGE_PLACEHOLDER
from megatron_owl2.errors import TaskError
from megatron_owl2.evaluation import scoring as scorers

PREDICTIONS, SCORES = "predictions.jsonl", "scores.json"  # what an evaluation leaves

SHORT_ANSWER = " Answer the question using a single word or phrase."
CAPTION_REQUEST = "Provide a one-sentence caption for the provided image."


@dataclass(frozen=True)
class Question:
    """One thing to ask: `images` are paths, `gold` is the answer to show beside the model's."""

    id: int | str
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
class Task:
    """How a benchmark is asked and scored.

    Its questions are found in a folder by the pattern `file`, its gold by `gold_file`. Result files
    name a question `id_field` and the model's text `answer_field`, as the benchmark's own do.
    `suffix` follows every question; the token limits are those of the official evaluation.
    """

    file: str
    gold_file: str
    id_field: str
    answer_field: str
    suffix: str
    max_new_tokens: int
    min_new_tokens: int
    questions: Callable[[Path, dict], list[Question]]  # from the file and its gold
    gold: Callable[[Path], dict]
    score: Callable[..., dict]
    variants: tuple[str, ...] = ()  # of the scoring rule, the default first


def read(task: Task, data: str | Path, limit: int | None = None) -> tuple[list[Question], dict]:
    """The questions, at most `limit`, and {id: gold row} of them, from a folder or question file.

    Pictures are looked for in `images/` beside the file. Raises TaskError for missing or
    ambiguous files, unreadable content, questions without gold, and pictures that are not there.
    """
    path = _find(data, task.file)
    gold = read_gold(task, path if task.gold_file == task.file else path.parent)
    questions = _read(path, lambda path: task.questions(path, gold))[:limit]
    if not questions:
        raise TaskError(f"{path} holds no question")
    lost = sorted({image for q in questions for image in q.images if not image.is_file()})
    if lost:
        raise TaskError(f"{len(lost)} pictures of {path} do not exist, such as {lost[0]}")
    return questions, {question.id: gold[question.id] for question in questions}


def read_gold(task: Task, path: str | Path) -> dict:
    """{id: row} as `task.score` takes it, from the task's folder or its gold file."""
    path = _find(path, task.gold_file)
    return _read(path, task.gold)


def read_predictions(task: Task, path: str | Path) -> dict[int | str, str]:
    """{id: text} from JSON lines or a JSON list with the fields of the benchmark's result format.

    Raises TaskError for rows without these fields and for ids that come twice.
    """
    path = Path(path)
    rows = _read(path, lambda path: _by_id(_rows(path), task.id_field))
    wrong = [i for i, row in rows.items() if not isinstance(row.get(task.answer_field), str)]
    if wrong:
        raise TaskError(f"{path}: prediction {wrong[0]!r} has no text {task.answer_field!r}")
    return {i: row[task.answer_field] for i, row in rows.items()}


def score(task: Task, predictions: dict, gold: dict, variant: str | None = None) -> dict:
    """`task.score` under one of the task's variants; None is the default. Raises TaskError."""
    if variant is None:
        return task.score(predictions, gold)
    if variant not in task.variants:
        known = ", ".join(task.variants) or "none"
        raise TaskError(f"this task has no scoring variant {variant!r}; known: {known}")
    return task.score(predictions, gold, variant)


def _vqa_questions(path: Path, gold: dict) -> list[Question]:
    rows = _json(path)["questions"]
    unanswered = [row["question_id"] for row in rows if row["question_id"] not in gold]
    if unanswered:
        raise TaskError(
            f"{len(unanswered)} questions of {path} have no annotation, such as {unanswered[0]}"
        )
    pictures = _pictures_by_number(path.parent / "images")
    questions = []
    for row in rows:
        annotation = gold[row["question_id"]]
        questions.append(
            Question(
                id=row["question_id"],
                text=row["question"],
                images=(pictures[row["image_id"]],),
                skill=annotation["question_type"],
                gold=annotation["multiple_choice_answer"],
            )
        )
    return questions


def _vqa_gold(path: Path) -> dict:
    return _by_id(_json(path)["annotations"], "question_id")


def _pope_questions(path: Path, gold: dict) -> list[Question]:
    return [
        Question(
            i, row["text"], (path.parent / "images" / row["image"],), "existence", row["label"]
        )
        for i, row in gold.items()
    ]


def _pope_gold(path: Path) -> dict:
    return _by_id(_rows(path), "question_id")


def _caption_questions(path: Path, gold: dict) -> list[Question]:
    names = {row["id"]: row["file_name"] for row in _json(path)["images"]}
    return [
        Question(
            id=i,
            text=CAPTION_REQUEST,
            images=(path.parent / "images" / names[i],),
            skill=row["skill"],
            gold=row["answers"][0],
        )
        for i, row in gold.items()
    ]


def _caption_gold(path: Path) -> dict:
    captions = defaultdict(list)
    for row in _json(path)["annotations"]:
        captions[row["image_id"]].append(row["caption"])
    return {i: {"answers": texts, "skill": "caption"} for i, texts in captions.items()}


def _text_questions(path: Path, gold: dict) -> list[Question]:
    return [
        Question(i, row["question"], (), row["skill"], row["answers"][0]) for i, row in gold.items()
    ]


def _text_gold(path: Path) -> dict:
    gold = {}
    for i, row in _by_id(_json(path), "id").items():
        messages = row["conversations"]
        if [message["from"] for message in messages] != ["human", "gpt"]:
            raise TaskError(
                f"{path}: dialogue {i!r} must be one question and its answer (human, gpt)"
            )
        question, answer = (message["value"] for message in messages)
        gold[i] = {"question": question, "answers": [answer], "skill": row.get("skill", "text")}
    return gold


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


def _read(path: Path, reader: Callable[[Path], list | dict]) -> list | dict:
    try:
        return reader(path)
    except TaskError:
        raise
    except (KeyError, TypeError, AttributeError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise TaskError(f"{path} is not in the format that the task reads: {reason}") from None
    except (OSError, ValueError) as error:
        raise TaskError(f"{path} cannot be read: {error}") from None


def _json(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


def _rows(path: Path) -> list[dict]:
    """The rows of a JSON list, or of a file with one JSON object per line."""
    text = path.read_text(encoding="utf-8")
    if text.lstrip().startswith("["):
        return json.loads(text)
    return [json.loads(line) for line in text.splitlines() if line.strip()]


def _by_id(rows: list[dict], field: str) -> dict:
    table = {row[field]: row for row in rows}
    if len(table) < len(rows):
        repeated = next(i for i, n in Counter(row[field] for row in rows).items() if n > 1)
        raise TaskError(f"{len(rows) - len(table)} rows repeat a {field}, such as {repeated!r}")
    return table


def _pictures_by_number(folder: Path) -> dict[int, Path]:
    """Pictures by their names' last number, as in COCO_val2014_000000000042.jpg."""
    pictures = {}
    for path in folder.iterdir():
        if number := re.search(r"(\d+)$", path.stem):
            pictures[int(number[1])] = path
    return pictures


TASKS = {
    "vqav2": Task(
        file="*questions.json",
        gold_file="*annotations.json",
        id_field="question_id",
        answer_field="answer",
        suffix=SHORT_ANSWER,
        max_new_tokens=10,
        min_new_tokens=1,
        questions=_vqa_questions,
        gold=_vqa_gold,
        score=scorers.vqa,
        variants=scorers.VQA_VARIANTS,
    ),
    "pope": Task(
        file="*pope_*.json",
        gold_file="*pope_*.json",
        id_field="question_id",
        answer_field="answer",
        suffix=SHORT_ANSWER,
        max_new_tokens=10,
        min_new_tokens=1,
        questions=_pope_questions,
        gold=_pope_gold,
        score=scorers.pope,
    ),
    "caption": Task(
        file="captions*.json",
        gold_file="captions*.json",
        id_field="image_id",
        answer_field="caption",
        suffix="",
        max_new_tokens=60,
        min_new_tokens=8,
        questions=_caption_questions,
        gold=_caption_gold,
        score=scorers.exact_match,
    ),
    "text": Task(
        file="*.json",
        gold_file="*.json",
        id_field="id",
        answer_field="answer",
        suffix="",
        max_new_tokens=32,
        min_new_tokens=1,
        questions=_text_questions,
        gold=_text_gold,
        score=scorers.exact_match,
    ),
}
