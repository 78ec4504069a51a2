"""A benchmark: how its published files become questions, how it is asked and how it is scored.

Each module of `evaluation.benchmarks` defines one `BENCHMARK`; the functions here read the files of
any of them.
"""

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_owl2.config.templates import Template
from megatron_owl2.data.shards.records import IMAGE_PLACEHOLDER
from megatron_owl2.errors import TaskError
from megatron_owl2.evaluation.judge import Judge
from megatron_owl2.evaluation.prompts import PROMPTS, OfficialPrompt
from megatron_owl2.evaluation.question import Question, file_of, showing
from megatron_owl2.evaluation.raters import Raters
from megatron_owl2.evaluation.rows import (
    Id,
    identifier,
    read_rows,
    rows_by_id,
    text,
    with_ids_of,
)
from megatron_owl2.utils.files import is_hidden

PREDICTIONS, SCORES = "predictions.jsonl", "scores.json"  # what an evaluation leaves
SUBMISSION = "submission_"  # and what a file for the benchmark's server is called, before its name

SHORT_ANSWER = " Answer the question using a single word or phrase."

_SPLIT = re.compile(
    r"(?i)(?:^|[^a-z])(test-?dev|test|train|val|dev|random|popular|adversarial)(?![a-z])"
)
_WRONG = ("", "no", "yes")  # one of which no rule takes for right

Gold = dict[Id, dict[str, Any]]  # rows of gold answers by question id


@dataclass(frozen=True)
class Benchmark:
    """The entry of a benchmark: its files, its way of asking, and its scoring rule.

    Its questions are found in a folder by the pattern `file`, its gold by `gold_file`; a benchmark
    of `many_files` takes all that match, and its readers get the folder, or the file that was
    named, and list them by `files_of`. Result files name a question `id_field` and the model's text
    `answer_field`, as the benchmark's own do. `suffix` follows every question, `official` says what
    does in the prompt of that name; the token limits are those of the official evaluation. `split`
    is the one that is asked where the name of the file does not tell it.

    `read_questions(file, gold)` gives the questions, `read_gold(gold_file)` the gold rows by id,
    and `score(predictions, gold)`, with a third argument if there are `variants`, the tables that
    `scoring` describes. The readers check every field that the questions and the score need (`rows`
    helps) and raise TaskError naming the file.

    `submission(predictions, gold)` gives name and content of the file that the benchmark's server
    or published scorer takes. Only then questions may be asked without gold, which is {} there; or,
    if the benchmark has `unanswered_rows`, the rows with None as their `answer`, as they also are
    where it is not published; `read_unanswered` reads them where gold is of some questions only.
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
    # Of the tables that `score` gives, as they are printed. Where "accuracy" is none of them, a
    # question has no score of its own.
    columns: tuple[str, ...] = ("accuracy", "majority", "n")
    submission: Callable[[dict[Id, str], Gold], tuple[str, bytes]] | None = None
    many_files: bool = False
    unanswered_rows: bool = False
    read_unanswered: Callable[[Path], Gold] | None = None
    # Variants that ask otherwise: they read questions with `candidates`, whose letters are scored.
    by_likelihood: Mapping[str, Callable[[Path, Gold], list[Question]]] = field(
        default_factory=dict
    )
    judge: Judge | None = None  # where answers are, or can be, judged by a language model
    raters: Raters | None = None  # where people rate them
    official: OfficialPrompt = OfficialPrompt()
    split: str | None = None

    def suffix_of(self, prompt: str, suffix: str | None = None, variant: str | None = None) -> str:
        """What follows a question in the prompt of this name, unless another suffix is given:
        nothing in variants by likelihood."""
        if prompt not in PROMPTS:
            raise TaskError(f"there is no prompt {prompt!r}; known: {', '.join(PROMPTS)}")
        if variant in self.by_likelihood:
            return suffix or ""
        if suffix is None and prompt == "official":
            suffix = self.official.suffix
        return self.suffix if suffix is None else suffix

    def is_judged(self, variant: str | None) -> bool:
        """Whether a variant of several, or None for the only one, scores a judge's replies."""
        return self.judge is not None and variant == self.judge.variant

    def prompts_of(
        self, question: Question, prompt: str, suffix: str, template: Template
    ) -> list[str]:
        """The prompt of a question, or those before each of its candidates in the template."""
        candidates = question.candidates
        if prompt == "official" and candidates and candidates.official:
            return candidates.official(question.placeholders, suffix)
        asked = question.for_candidates() if question.candidates else [question]
        return [self.prompt_text(one, prompt, suffix, template) for one in asked]

    def prompt_text(self, question: Question, prompt: str, suffix: str, template: Template) -> str:
        """The whole prompt of a question under the name `prompt`."""
        if prompt == "official":
            return question.official_prompt(suffix, self.official.assistant)
        return question.prompt(suffix, template)


def read(
    benchmark: Benchmark,
    data: str | Path,
    limit: int | None = None,
    *,
    with_gold: bool = True,
    frames: int | None = None,
    variant: str | None = None,
) -> tuple[list[Question], Gold]:
    """The questions, at most `limit`, and {id: gold row} of them, from a folder or question file.

    Images are looked for in `images/` beside the file, videos in `videos/`. `with_gold` False reads
    a set whose answers are not published; its gold is {} or has no answers. `frames` of a video are
    shown instead of the benchmark's number. A `variant` of the score may ask by the likelihood of
    candidates. Raises TaskError for missing or ambiguous files,
    unreadable content, questions without gold, images that are not there, and `frames` without
    videos.
    """
    if not with_gold and benchmark.submission is None:
        raise TaskError("this task has no file for a server; its questions need their gold")
    path = _find(data, benchmark.file, benchmark.many_files)
    gold = _gold_of(benchmark, path) if with_gold else _unanswered(benchmark, path)
    reader = benchmark.by_likelihood.get(variant or "", benchmark.read_questions)
    questions = reader(path, gold)[:limit]
    if not questions:
        raise TaskError(f"{path} holds no question")
    _check_tags(path, questions)
    if frames is not None:
        questions = showing(questions, frames)
    files = {file for q in questions for image in q.images if (file := file_of(image))}
    # os.path, as no name is too long or too odd for it
    if lost := sorted(file for file in files if not os.path.isfile(file)):
        raise TaskError(f"{len(lost)} images of {path} do not exist, such as {lost[0]}")
    return questions, {question.id: gold[question.id] for question in questions if gold}


def question_file(benchmark: Benchmark, data: str | Path) -> Path:
    """The file with the questions, or the folder of a task of many; raises TaskError as `read`."""
    return _find(data, benchmark.file, benchmark.many_files)


def split_of(benchmark: Benchmark, path: Path) -> str | None:
    """The split of a question file: by its name, else the only one that the benchmark asks."""
    found = None if path.is_dir() else _SPLIT.search(path.stem)
    return found[1].lower().replace("test-dev", "testdev") if found else benchmark.split


def has_answers(gold: Gold) -> bool:
    """Whether predictions can be scored: there is gold, and not all of it unanswered."""
    return any(row.get("answer", "") is not None for row in gold.values())


def _gold_of(benchmark: Benchmark, questions: Path) -> Gold:
    if benchmark.gold_file == benchmark.file:
        return read_gold(benchmark, questions)
    return read_gold(benchmark, _gold_beside(questions, benchmark.gold_file))


def _unanswered(benchmark: Benchmark, questions: Path) -> Gold:
    """What is known of questions without gold."""
    if benchmark.read_unanswered:
        return benchmark.read_unanswered(questions)
    rows = _gold_of(benchmark, questions) if benchmark.unanswered_rows else {}
    return {i: row | {"answer": None} for i, row in rows.items()}


def _check_tags(path: Path, questions: list[Question]) -> None:
    """Refusal of texts with another number of placeholders than the images placed in them."""
    for tag in (IMAGE_PLACEHOLDER, "<image>"):  # ours and LLaVA's
        for question in questions:
            ours = question.placed and tag == IMAGE_PLACEHOLDER
            if question.text.count(tag) != (len(question.images) if ours else 0):
                raise TaskError(
                    f"{path}: the text of question {question.id!r} holds {tag}, which stands for "
                    "images only; take it out"
                )


def read_gold(benchmark: Benchmark, path: str | Path) -> Gold:
    """{id: row} as `benchmark.score` takes it, from the benchmark's folder or its gold file.

    Raises TaskError for missing or ambiguous files and unreadable content.
    """
    path = _find(path, benchmark.gold_file, benchmark.many_files)
    gold = benchmark.read_gold(path)
    if not gold:
        raise TaskError(f"{path} holds no question")
    return gold


def read_predictions(benchmark: Benchmark, path: str | Path) -> dict[Id, str]:
    """{id: text} from JSON lines or a JSON list with the fields of the benchmark's result format.

    Raises TaskError for rows without these fields and for ids that come twice.
    """
    path = Path(path)
    names = (benchmark.id_field, benchmark.answer_field)
    rows = read_rows(path, dict(zip(names, (identifier, text), strict=True)))
    if not rows:
        raise TaskError(f"{path} holds no prediction")
    return {i: row[names[1]] for i, row in rows_by_id(path, rows, names[0]).items()}


def score(
    benchmark: Benchmark, predictions: dict[Id, str], gold: Gold, variant: str | None = None
) -> dict:
    """`benchmark.score` under one of its variants, None being the default.

    Raises TaskError for a variant that the benchmark does not have, and ScoreError.
    """
    predictions = with_ids_of(gold, predictions)
    check_variant(benchmark, variant)
    if variant is None:
        return benchmark.score(predictions, gold)
    return benchmark.score(predictions, gold, variant)


def check_variant(benchmark: Benchmark, variant: str | None) -> None:
    """Refusal of a variant that the benchmark does not have, as TaskError."""
    if variant is not None and variant not in benchmark.variants:
        known = ", ".join(benchmark.variants) or "none"
        raise TaskError(f"this task has no scoring variant {variant!r}; known: {known}")


def with_missing_wrong(
    benchmark: Benchmark, predictions: dict[Id, str], gold: Gold, variant: str | None = None
) -> tuple[dict[Id, str], int]:
    """Predictions for all gold, and how many were added: an empty answer for each that is missing,
    or a no or yes where a rule takes an empty one for right."""
    if variant is not None and benchmark.is_judged(variant):
        raise TaskError(f"--missing wrong is not for {variant}: no reply of a judge is a wrong one")
    predictions = with_ids_of(gold, predictions)
    missing = {i: row for i, row in gold.items() if i not in predictions}
    added = {}
    for i, row in missing.items():
        added[i] = _WRONG[0]
        if "accuracy" in benchmark.columns:
            rights = (score(benchmark, {i: t}, {i: row}, variant)["overall"] for t in _WRONG)
            graded = zip(_WRONG, rights, strict=True)
            added[i] = next((t for t, own in graded if not own["accuracy"]), _WRONG[0])
    return predictions | added, len(added)


def files_of(path: Path, pattern: str) -> list[Path]:
    """The file itself, or all files of a folder that match, sorted, for tasks of `many_files`."""
    return [path] if path.is_file() else _matching(path, pattern)


def _find(data: str | Path, pattern: str, many: bool) -> Path:
    """`data` if it is a file, else the only file in it that matches; the folder, if `many` may."""
    data = Path(data)
    if data.is_file():
        return data
    if not data.is_dir():
        raise TaskError(f"{data} does not exist")
    found = _matching(data, pattern)
    if many:
        return data
    if len(found) > 1:
        raise TaskError(f"{_several(found, pattern)}; name one of them")
    return found[0]


def _gold_beside(questions: Path, pattern: str) -> Path:
    """The gold file in the folder of a question file: of several, the one whose name has most of
    the words of the questions' and no other, as v2_mscoco_val2014_annotations.json."""
    found = _matching(questions.parent, pattern)
    if all(_is_of_another_split(path, questions) for path in found):
        names = ", ".join(path.name for path in found)
        raise TaskError(
            f"{questions.parent} holds no {pattern} for {questions.name}, only of another split "
            f"({names}); put its own there"
        )
    if len(found) == 1:
        return found[0]
    fitting = [path for path in found if _words(path) <= _words(questions)]
    most = max((len(_words(path)) for path in fitting), default=0)
    best = [path for path in fitting if len(_words(path)) == most]
    if len(best) != 1:
        raise TaskError(
            f"{_several(found, pattern)}; leave the one that belongs to {questions.name}"
        )
    return best[0]


def has_gold_beside(benchmark: Benchmark, questions: Path) -> bool:
    """Whether a question file has its gold in its folder: a set may lie there without."""
    found = sorted(questions.parent.glob(benchmark.gold_file))
    return any(not _is_of_another_split(path, questions) for path in found)


def _is_of_another_split(gold: Path, questions: Path) -> bool:
    """Whether both names say a split, and not the same."""
    splits = [_SPLIT.search(path.stem) for path in (gold, questions)]
    return all(splits) and len({found[1].lower() for found in splits if found}) > 1


def _words(path: Path) -> set[str]:
    """Words of a file's name but the last, which says what the file holds."""
    return set(path.stem.split("_")[:-1])


def _matching(folder: Path, pattern: str) -> list[Path]:
    found = sorted(path for path in folder.glob(pattern) if path.is_file())
    found = [path for path in found if not is_hidden(path.name)]
    if not found:
        raise TaskError(f"{folder} holds no file {pattern}")
    return found


def _several(found: list[Path], pattern: str) -> str:
    names = ", ".join(path.name for path in found)
    return f"{found[0].parent} holds several files {pattern}: {names}"
