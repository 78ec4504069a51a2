"""Evaluation of a model on a benchmark: predictions, scores and pages, written to a directory."""

import hashlib
import json
import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from tqdm import tqdm

from megatron_owl2.errors import TaskError
from megatron_owl2.evaluation import answering, results
from megatron_owl2.evaluation.asking import (
    batches_of,
    image_reader,
    images_of,
    naming,
    place_of_image,
    share_of,
)
from megatron_owl2.evaluation.benchmark import (
    PREDICTIONS,
    SCORES,
    SUBMISSION,
    Benchmark,
    Gold,
    check_variant,
    has_answers,
)
from megatron_owl2.evaluation.benchmark import score as score_predictions
from megatron_owl2.evaluation.fingerprint import mark_of_gold, mark_of_images, mark_of_questions
from megatron_owl2.evaluation.journal import Batch, journal_of, read_journals, remove_journals
from megatron_owl2.evaluation.mistakes import MISTAKES, write_mistakes
from megatron_owl2.evaluation.prompts import PROMPTS, settings_of
from megatron_owl2.evaluation.question import Question, alone, frames_shown, joining
from megatron_owl2.evaluation.ranks import from_first, together
from megatron_owl2.evaluation.registry import find_benchmarks
from megatron_owl2.evaluation.rows import Id
from megatron_owl2.inference.engine import Generator
from megatron_owl2.inference.loading import LoadedModel
from megatron_owl2.utils.files import replaced_atomically, write_atomically
from megatron_owl2.utils.json_text import parse_json

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """Options of an evaluation; None takes the benchmark's own value.

    `blind` replaces every image by a black one (uint8 zeros, before normalisation): what the
    model scores without looking. `prompt` is a name of `prompts.PROMPTS`; `suffix` follows every
    question as it stands, with its own leading space. `frames` are shown of a video. `restart`
    forgets the answers that an evaluation left in the directory.
    """

    blind: bool = False
    batch_size: int = 64
    limit: int | None = None
    prompt: str = PROMPTS[0]
    suffix: str | None = None
    max_new_tokens: int | None = None
    min_new_tokens: int | None = None
    variant: str | None = None
    frames: int | None = None
    restart: bool = False


def evaluate(
    loaded: LoadedModel,
    name: str,
    questions: list[Question],
    gold: Gold,
    output: str | Path,
    settings: Settings,
    about: dict,
) -> dict:
    """The scores of the model's answers to `questions` of the benchmark `name`.

    Writes predictions.jsonl, scores.json, results.*, mistakes.html and, if every question was
    asked, the file for the benchmark's server to `output`. `questions` and `gold` come from
    `benchmark.read`; without gold there are no scores. `about` (what model and data are called, and
    a mark of the model's content) is kept with the scores.

    Every process calls this. The questions are shared among the data-parallel groups, whose answers
    are kept in journals; so an evaluation that was killed goes on, and one that is finished is not
    begun again. `output` lies on a disk that all processes share. An error of one group is raised
    by all when the others have answered their share. Raises TaskError, ScoreError and
    InferenceError.
    """
    benchmark = find_benchmarks()[name]
    check_variant(benchmark, settings.variant)
    if settings.variant is not None and benchmark.is_judged(settings.variant):
        raise TaskError(
            f"{settings.variant} scores a judge's replies, not answers: evaluate without --variant,"
            " then use 'evaluate requests', 'evaluate judge' and 'evaluate score --replies'"
        )
    suffix = benchmark.suffix_of(settings.prompt, settings.suffix, settings.variant)
    if suffix and questions[0].candidates and not questions[0].candidates.in_template:
        raise TaskError("this variant compares whole texts, after which no prompt suffix can stand")
    template = loaded.config.conversation
    if loaded.config.vision.temporal:
        questions = joining(questions)
    if settings.prompt == "official":  # published code asks no question after another
        questions = alone(questions)
    described = {
        **about,
        "task": name,
        "blind": settings.blind,
        "limit": settings.limit,
        "frames": frames_shown(questions),
        "prompt": settings.prompt,
        "prompt_suffix": suffix,
        **settings_of(template),
        **_limits(benchmark, settings),
        "variant": settings.variant or next(iter(benchmark.variants), None),
    }
    run = _Run(
        benchmark,
        questions,
        gold,
        [benchmark.prompts_of(q, settings.prompt, suffix, template) for q in questions],
        batches_of(questions, settings.batch_size),
        Path(output),
        settings,
        described,
    )
    identity = from_first(run.identity)
    earlier, finished = from_first(lambda: run.earlier(identity))
    if earlier is not None:
        return earlier
    started = time.perf_counter()
    with together():
        run.ask(loaded, finished, identity)
    spent = time.perf_counter() - started
    return from_first(lambda: run.conclude(identity, finished, spent))


def _limits(benchmark: Benchmark, settings: Settings) -> dict[str, int]:
    return {
        key: getattr(benchmark if getattr(settings, key) is None else settings, key)
        for key in ("max_new_tokens", "min_new_tokens")
    }


@dataclass(frozen=True)
class _Identity:
    """Settings of an evaluation, its batches, and a fingerprint of both."""

    settings: Mapping[str, Any]
    batches: Sequence[Batch]

    @property
    def fingerprint(self) -> str:
        whole = json.dumps(
            [self.settings, [batch.images for batch in self.batches]], sort_keys=True
        )
        return hashlib.sha256(whole.encode()).hexdigest()


@dataclass(frozen=True)
class _Run:
    """What an evaluation asks and how; `described` is kept with its scores."""

    benchmark: Benchmark
    questions: Sequence[Question]
    gold: Gold
    prompts: Sequence[list[str]]  # of each question one, or one for each of its candidates
    batches: Sequence[range]
    output: Path
    settings: Settings
    described: Mapping[str, Any]

    def identity(self) -> _Identity:
        """All that the predictions depend on; where data and model lie is no part of it."""
        settings = {
            **{k: v for k, v in self.described.items() if k not in ("data", "checkpoint")},
            "batch_size": self.settings.batch_size,
            "tensor_parallel": parallel_state.get_tensor_model_parallel_world_size(),
            "questions": mark_of_questions(self.questions, self.prompts),
            "gold": mark_of_gold(self.gold),
        }
        shown = [[self.questions[place] for place in batch] for batch in self.batches]
        return _Identity(settings, [Batch(len(asked), mark_of_images(asked)) for asked in shown])

    def earlier(self, identity: _Identity) -> tuple[dict | None, set[int]]:
        """The result that is there already, or None and the batches that are answered.

        Without a result, files of an earlier evaluation are removed. Raises TaskError for answers
        to other settings, and what the rule raises that cannot score.
        """
        self.output.mkdir(parents=True, exist_ok=True)
        result = None if self.settings.restart else _result(self.output)
        if result is not None and result.get("fingerprint") == identity.fingerprint:
            _logger.info("%s is finished; --restart asks again", self.output)
            remove_journals(self.output)  # of a process that was killed at the very end
            return result, set()
        if result is not None and "overall" in result and not has_answers(self.gold):
            raise TaskError(
                f"{self.output} holds scores, which answers without gold would replace; name "
                "another --output, or give --restart"
            )
        # A rule that cannot score is told before hours of asking; any answers will do.
        self._scores([question.gold or "" for question in self.questions])
        if self.settings.restart:
            remove_journals(self.output)
        answers = self._answers(identity)
        if answers:
            known = sum(map(len, answers.values()))
            _logger.info("%s: going on after %d answers that are there", self.output, known)
        for name in (SCORES, PREDICTIONS, MISTAKES, *results.FILES, f"{SUBMISSION}*"):
            # Of predictions that are replaced, and what a killed process was writing.
            for path in (*self.output.glob(name), *self.output.glob(f".{name}.*.tmp")):
                path.unlink(missing_ok=True)
        return None, set(answers)

    def ask(self, loaded: LoadedModel, finished: set[int], identity: _Identity) -> None:
        """The answers of this process' data-parallel group, put into its journal."""
        group = parallel_state.get_data_parallel_rank()
        groups = parallel_state.get_data_parallel_world_size()
        share = share_of(len(self.batches), finished, group, groups)
        if not share:
            return
        splitting = parallel_state.get_tensor_model_parallel_group()
        assert isinstance(splitting, torch.distributed.ProcessGroup)
        writes = splitting.rank() == 0
        read = image_reader(loaded.config, self.settings.batch_size, blind=self.settings.blind)
        generator, limits = Generator(loaded), _limits(self.benchmark, self.settings)
        suffix = self.described["prompt_suffix"]
        with ExitStack() as stack:
            with together(splitting):
                keep = (
                    stack.enter_context(
                        journal_of(self.output, group, identity.settings, identity.batches)
                    )
                    if writes
                    else None
                )
            bar = stack.enter_context(self._bar(share, shown=writes and group == 0))
            for number in share:
                batch = self.batches[number]
                asked = [self.questions[place] for place in batch]
                with together(splitting):
                    shown = [images_of(question, read) for question in asked]
                prompts = [self.prompts[place] for place in batch]
                with naming(asked):
                    answers = answering.answers(generator, asked, prompts, shown, suffix, limits)
                with together(splitting):
                    if keep is not None:
                        keep(number, answers)
                bar.update(len(asked))

    def _bar(self, share: Sequence[int], *, shown: bool) -> tqdm:
        total = sum(len(self.batches[number]) for number in share)
        return tqdm(total=total, desc=self.described["task"], unit=" questions", disable=not shown)

    def conclude(self, identity: _Identity, finished: set[int], spent: float) -> dict:
        """The result, once all files are written; the one that says it is finished comes last."""
        answers = self._answers(identity)
        if missing := [n for n in range(len(self.batches)) if n not in answers]:
            raise TaskError(
                f"{self.output} lacks the answers of {len(missing)} of {len(self.batches)} "
                "batches; it must lie on a disk that all processes share"
            )
        said = [answer for number in range(len(self.batches)) for answer in answers[number]]
        asked = sum(len(batch) for n, batch in enumerate(self.batches) if n not in finished)
        result = {
            **self.described,
            "questions": len(said),
            "seconds": round(spent, 2),
            "questions_per_second": round(asked / spent, 2),
            **self._scores(said),
            "fingerprint": identity.fingerprint,
        }
        rows = self._rows(said)
        _write_rows(self.output / PREDICTIONS, rows)
        if self.benchmark.submission and self.settings.limit is None:
            predictions = self._predictions(said)
            file_name, content = self.benchmark.submission(predictions, self.gold)
            write_atomically(self.output / f"{SUBMISSION}{file_name}", content)
        write_mistakes(self.output / MISTAKES, self.benchmark, self.questions, rows, result)
        results.write(self.output, [result])
        write_atomically(self.output / SCORES, (json.dumps(result, indent=1) + "\n").encode())
        remove_journals(self.output)
        return result

    def _answers(self, identity: _Identity) -> dict[int, list[str]]:
        return read_journals(self.output, identity.settings, identity.batches)

    def _predictions(self, said: Sequence[str]) -> dict[Id, str]:
        return {q.id: answer for q, answer in zip(self.questions, said, strict=True)}

    def _scores(self, said: Sequence[str]) -> dict:
        if not has_answers(self.gold):
            return {}
        variant = self.settings.variant
        return score_predictions(self.benchmark, self._predictions(said), self.gold, variant)

    def _rows(self, said: Sequence[str]) -> list[dict]:
        gold = self.gold if has_answers(self.gold) else {}
        return [
            _prediction(self.benchmark, question, answer, gold, self.settings.variant)
            for question, answer in zip(self.questions, said, strict=True)
        ]


def _result(output: Path) -> dict | None:
    """What an evaluation that was finished left, if it is whole."""
    if not ((output / SCORES).is_file() and (output / PREDICTIONS).is_file()):
        return None
    try:
        result = parse_json((output / SCORES).read_bytes())
    except ValueError:
        return None
    return result if isinstance(result, dict) else None


def _write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    # A path may hold bytes that are no text; escaped they are JSON as well.
    with (
        replaced_atomically(path) as partial,
        partial.open("w", encoding="utf-8", errors="backslashreplace") as file,
    ):
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _prediction(
    benchmark: Benchmark, question: Question, answer: str, gold: Gold, variant: str | None
) -> dict:
    """A row of predictions.jsonl, with the question's own score where it has one."""
    score = None
    if gold and "accuracy" in benchmark.columns:
        own = {question.id: gold[question.id]}
        alone = score_predictions(benchmark, {question.id: answer}, own, variant)
        score = alone["overall"]["accuracy"]
    return {
        benchmark.id_field: question.id,
        benchmark.answer_field: answer,
        "score": score,
        "question": question.text,
        "skill": question.skill,
        "gold": question.gold,
        "images": [place_of_image(image) for image in question.images],
    }
