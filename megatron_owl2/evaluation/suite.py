"""Several evaluations of one model: a folder of data for each task, results of all in one table."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_owl2.errors import Owl2Error, TaskError
from megatron_owl2.evaluation import benchmark, results, runner
from megatron_owl2.evaluation.benchmark import Benchmark, Gold, Question
from megatron_owl2.evaluation.ranks import together
from megatron_owl2.evaluation.registry import find_benchmarks
from megatron_owl2.inference.loading import LoadedModel

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """One evaluation: questions of a task, and the folder for what is written."""

    task: str
    data: Path
    output: Path
    with_gold: bool = True


@dataclass
class Outcome:
    """Results of the jobs that were done, and messages of those that failed, by their output."""

    results: list[dict] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


def find_jobs(
    tasks: Sequence[str], root: Path, output: Path, *, with_gold: bool = True
) -> tuple[list[Job], list[str]]:
    """The jobs of all tasks that have data below `root`, and the tasks that have none.

    The data of a task lie in a folder of its name. Of several question files each is a job, with a
    folder of its own below `output`/<task>; one without the gold file that the task wants is asked
    for the benchmark's server. Raises TaskError if there is no data at all.
    """
    jobs: list[Job] = []
    without: list[str] = []
    for name in tasks:
        entry, folder = find_benchmarks()[name], root / name
        files = _question_files(entry, folder)
        if not files:
            without.append(name)
        for file in files:
            into = output / name if len(files) == 1 else output / name / file.stem
            jobs.append(Job(name, file, into, with_gold and _has_gold(entry, file)))
    if not jobs:
        raise TaskError(
            f"{root} has no data for any of {', '.join(tasks)}; the files of a task go into a "
            "folder of its name"
        )
    return jobs, without


def _question_files(entry: Benchmark, folder: Path) -> list[Path]:
    try:
        files = benchmark.files_of(folder, entry.file) if folder.is_dir() else []
    except TaskError:  # no file matches
        return []
    return [folder] if files and entry.many_files else files


def _has_gold(entry: Benchmark, file: Path) -> bool:
    """Whether there is gold, or there must be some: only a server's set goes without."""
    if entry.submission is None or entry.gold_file == entry.file:
        return True
    return benchmark.has_gold_beside(entry, file)


def run_job(
    job: Job,
    load: Callable[[], LoadedModel],
    settings: runner.Settings,
    about: Callable[[], Mapping[str, Any]],
) -> dict:
    """The result of one evaluation; the model is loaded, and described, once the questions are
    read."""
    questions = _read(job, settings)
    return _evaluate(job, questions, load(), settings, about())


def _read(job: Job, settings: runner.Settings) -> tuple[list[Question], Gold]:
    entry = find_benchmarks()[job.task]
    return benchmark.read(
        entry,
        job.data,
        settings.limit,
        with_gold=job.with_gold,
        frames=settings.frames,
        variant=settings.variant,
    )


def _evaluate(
    job: Job,
    questions: tuple[list[Question], Gold],
    model: LoadedModel,
    settings: runner.Settings,
    about: Mapping[str, Any],
) -> dict:
    entry = find_benchmarks()[job.task]
    file = benchmark.question_file(entry, job.data)
    split = benchmark.split_of(entry, file)
    described = {**about, "data": str(job.data), "questions_file": file.name, "split": split}
    return runner.evaluate(model, job.task, *questions, job.output, settings, described)


def run_jobs(
    jobs: Sequence[Job],
    model: LoadedModel,
    settings: runner.Settings,
    about: Mapping[str, Any],
    output: Path,
    without_data: Sequence[str],
) -> Outcome:
    """What came of all jobs; one that fails is told, and the others go on.

    Every process calls this. The first one writes the results of all to `output`, anew after each
    job.
    """
    outcome = Outcome()
    first = torch.distributed.get_rank() == 0
    for job in jobs:
        name = str(job.output.relative_to(output))
        try:
            with together():
                questions = _read(job, settings)
            outcome.results.append(_evaluate(job, questions, model, settings, about))
        except (Owl2Error, OSError) as error:
            outcome.failed[name] = str(error)
            if first:
                _logger.warning("%s failed: %s", name, error)
        if first:
            output.mkdir(parents=True, exist_ok=True)
            results.write(output, outcome.results, without_data, outcome.failed)
    return outcome
