"""MME (Fu et al. 2023): two yes-or-no questions on each image in 14 tasks.

The files are those of its eval_tool/Your_Results, one per task: lines of image, question and answer
between tabs; what follows is another model's response and is left. Images of a task are looked for
in images/<task>/ and images/<task>/images/, as the release has them.
"""

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from megatron_owl2.errors import TaskError
from megatron_owl2.evaluation.benchmark import SHORT_ANSWER, Benchmark, Gold, Question, files_of
from megatron_owl2.evaluation.image_files import one_of_named
from megatron_owl2.evaluation.rows import Misfit, Row, one_of, place_of, short, words
from megatron_owl2.evaluation.scoring import check_ids, group_by_skill, percent, score_table
from megatron_owl2.evaluation.table_files import line_not_utf8

_PERCEPTION = (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
)
_COGNITION = (
    "commonsense_reasoning",
    "numerical_calculation",
    "text_translation",
    "code_reasoning",
)
_TASKS = (*_PERCEPTION, *_COGNITION)
_PATTERN = "*.txt"
_PER_IMAGE = 2
_ASKED_FOR = "Please answer yes or no."  # mPLUG-Owl2 takes it out, and leaves the space before it
_COLUMNS = {"image": words, "question": words, "answer": one_of("yes", "no")}


def read_questions(path: Path, gold: Gold) -> list[Question]:
    """The questions of all tasks, an image's after each other."""
    return [
        Question(
            id=i,
            text=row["question"].replace(_ASKED_FOR, ""),
            images=(
                one_of_named(
                    row["file"],
                    f"{row['skill']}/{row['image']}",
                    f"{row['skill']}/images/{row['image']}",
                ),
            ),
            skill=row["skill"],
            gold=row["answer"],
        )
        for i, row in gold.items()
    ]


def read_gold(path: Path) -> Gold:
    """Rows by "<task>/<image>/<1 or 2>", from a task's file or all of a folder.

    Raises TaskError for a file that is no task's, lines of other columns, and an image without two
    questions.
    """
    gold: Gold = {}
    for file in files_of(path, _PATTERN):
        if file.stem not in _TASKS:
            raise TaskError(f"{file} is no task of MME; these are {', '.join(_TASKS)}")
        images = group_by_skill((row["image"], row) for row in _read_lines(file))
        for image, rows in images.items():
            if len(rows) != _PER_IMAGE:
                raise TaskError(
                    f"{file}: {image} has {len(rows)} questions instead of 2{place_of(rows[-1])}"
                )
            for number, row in enumerate(rows, start=1):
                gold[f"{file.stem}/{image}/{number}"] = row | {"skill": file.stem, "file": file}
    return gold


def _read_lines(path: Path) -> list[dict]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise TaskError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise TaskError(
            f"{path} cannot be read: it is not UTF-8 (line {line_not_utf8(path)})"
        ) from None
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        fields = line.split("\t")
        if len(fields) < len(_COLUMNS):
            raise TaskError(
                f"{path}: line {number} is {short(repr(line))}, wanted {', '.join(_COLUMNS)} "
                "between tabs"
            )
        try:
            columns = zip(_COLUMNS.items(), fields, strict=False)
            row = {name: read(field, name) for (name, read), field in columns}
            rows.append(Row(row, f"line {number}"))
        except Misfit as misfit:
            raise TaskError(f"{path}: {misfit} (line {number})") from None
    return rows


def score(predictions: Mapping, gold: Mapping, variant: str = "official") -> dict:
    """MME's scores per task, of 200, and their sums, perception of 2000 and cognition of 800.

    A task's score is its `accuracy` plus its `accuracy_plus`, the share of images on which every
    question that was asked is answered rightly. A sum is given if all of its tasks were asked;
    `other` counts answers that are neither yes nor no. "official" reads answers as MME's own
    calculation does, "lmms_eval" as lmms-eval. Raises ScoreError for missing or unknown ids.
    """
    check_ids(predictions, gold)
    read = {"official": yes_or_no, "lmms_eval": _lmms_eval_yes_or_no}[variant]
    said = {i: read(text) for i, text in predictions.items()}
    table = score_table(
        [(row["skill"], row, said[i]) for i, row in gold.items()],
        lambda row: row["answer"],
        lambda answer, row: float(answer == row["answer"]),
    )
    hits: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for i, row in gold.items():
        hits[row["skill"]][row["image"]].append(said[i] == row["answer"])
    exact = {}
    for task, images in hits.items():
        both = [all(right) for right in images.values()]
        every = [right for image in images.values() for right in image]
        exact[task] = 100 * (sum(every) / len(every) + sum(both) / len(both))
        table["skills"][task] |= {
            "accuracy_plus": percent(sum(both), len(both)),
            "score": round(exact[task], 2),
        }
    overall = table["overall"]
    both = [all(right) for images in hits.values() for right in images.values()]
    overall["accuracy_plus"] = percent(sum(both), len(both))
    for name, tasks in (("perception", _PERCEPTION), ("cognition", _COGNITION)):
        if exact.keys() >= set(tasks):
            overall[name] = round(sum(exact[task] for task in tasks), 2)
    overall["other"] = list(said.values()).count("other")
    return table


def yes_or_no(text: str) -> str:
    """ "yes", "no" or "other": the word itself, else what the first four characters hold, so that
    "not" and "know" are no. White space is not taken off."""
    text = text.lower()
    for word in ("yes", "no"):
        if word in text[:4]:
            return word
    return "other"


def _lmms_eval_yes_or_no(text: str) -> str:
    text = text.lower().strip().replace(".", "")
    return {"y": "yes", "n": "no"}.get(text) or yes_or_no(text)


BENCHMARK = Benchmark(
    about="MME, yes or no: perception and cognition in 14 tasks",
    file=_PATTERN,
    gold_file=_PATTERN,
    id_field="id",
    answer_field="answer",
    suffix=SHORT_ANSWER.replace(" ", "\n", 1),
    max_new_tokens=10,
    min_new_tokens=1,
    read_questions=read_questions,
    read_gold=read_gold,
    score=score,
    variants=("official", "lmms_eval"),
    columns=("accuracy", "accuracy_plus", "score", "n"),
    many_files=True,
)
