"""Job that makes a data set of a published corpus, in many processes and on many machines.

A format cuts its input into splits. Every split becomes its own shards and a result file that is
written last; report and manifest are made when all results are there. Duplicates, and a sample of
n records, depend on the whole corpus, so the input is read twice: the first reading leaves a table
of every split, one process selects from the tables, the second reading writes. An interrupted run
thus continues where it stopped, partitions on several machines share a folder, and the bytes
depend on neither.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.corpus_statistics import Statistics, StatisticsBuilder
from data_prep.dedup import select
from data_prep.html_report import write_html_report
from data_prep.job_state import JobState
from data_prep.split_pool import SplitPool
from data_prep.splits import InputPlan, InputSplit
from data_prep.worker import Settings, scan_split, write_split
from megatron_owl2.data.shards.manifest import MANIFEST, write_manifest
from megatron_owl2.errors import PreprocessError
from megatron_owl2.utils.files import write_atomically

REPORT, PAGE = "report.json", "report.html"
_NAME = re.compile(r"[A-Za-z0-9_-]+")
_NAMED = 5  # missing splits in a message


@dataclass(frozen=True)
class Outcome:
    """Result of one run of a job.

    `report` is None while the data set is not finished; `scanned` and `written` count the splits
    that this run read for the first time and wrote; `selected` and `finished` say whether it made
    the selection between the two readings, and whether it finished the data set.
    """

    report: Statistics | None
    scanned: int = 0
    written: int = 0
    selected: bool = False
    finished: bool = False


def preprocess(
    plan: InputPlan,
    settings: Settings,
    output: Path,
    arguments: dict[str, Any],
    workers: int = 1,
    partition: tuple[int, int] = (0, 1),
    merge: bool = False,
) -> Outcome:
    """Run of a job: makes `output` a data set of the plan's splits, or does a share of that work.

    Partition (i, n) scans its splits i, i + n, ... or, once the selection is there, writes them.
    With n > 1 it leaves the selection and the end to a run with `merge`, which does those two and
    no more. `arguments` (JSON) say, with `settings`, what the job is: a folder made by the same job
    is continued, or left alone if finished. Raises PreprocessError if two splits have one name or
    one has a name that shards cannot have, if the folder holds anything else, if `merge` finds
    splits missing, if no sample was kept, or if a split cannot be done.
    """
    splits = plan.splits
    _check_names(splits)
    state = JobState(output)
    state.claim(_describe(splits, settings, arguments))
    if (output / MANIFEST).exists():
        return Outcome(read_statistics(output))
    state.remove_leftovers()
    index, partitions = partition
    mine = [] if merge else splits[index::partitions]
    scanned, selected = 0, False
    with SplitPool(workers) as pool:
        if settings.two_readings and not state.selection.exists():
            scanned = _scan(pool, state, mine, settings)
            if partitions > 1:
                return Outcome(None, scanned)
            _select(state, splits, settings)
            selected = True
            if merge:
                return Outcome(None, selected=True)
        written = _write(pool, state, mine, settings)
    if partitions > 1:
        return Outcome(None, written=written)
    report = _finish(state, plan, settings)
    return Outcome(report, scanned, written, selected, finished=True)


def read_statistics(output: Path) -> Statistics:
    """Statistics of a finished data set; raises PreprocessError if its report is damaged."""
    try:
        return Statistics.from_json((output / REPORT).read_bytes())
    except (ValueError, TypeError, RecursionError):
        raise PreprocessError(
            f"{output / REPORT} is damaged; tools/check_data.py says whether the shards are whole"
        ) from None


def _check_names(splits: Sequence[InputSplit]) -> None:
    known: dict[str, Path] = {}
    for split in splits:
        if not _NAME.fullmatch(split.name):
            raise PreprocessError(
                f"shards of {split.origin} cannot be named {split.name!r}; rename it with letters, "
                "digits, '_' and '-' alone"
            )
        if split.name in known:
            raise PreprocessError(
                f"shards of {known[split.name]} and of {split.origin} would both be named "
                f"{split.name}; rename one of them (all but letters, digits, '_' and '-' count as "
                "'_')"
            )
        known[split.name] = split.origin


def _describe(splits: Sequence[InputSplit], settings: Settings, arguments: dict) -> dict[str, Any]:
    """Description of a job, which must be the same for it to be continued."""
    flat = asdict(settings)
    del flat["read"]  # named by the format among the arguments
    flat |= flat.pop("filters") | flat.pop("reencoding")
    if not settings.hold_out:  # jobs of earlier versions do not say so
        del flat["hold_out"], flat["only_held_out"]
    return arguments | flat | {"parts": [[split.name, split.identity] for split in splits]}


def _scan(
    pool: SplitPool, state: JobState, splits: Sequence[InputSplit], settings: Settings
) -> int:
    """First reading of the splits that lack it; returns their number."""
    todo = [split for split in splits if state.scan_result(split) is None]
    pool.run(partial(scan_split, settings, state), todo, "scan")
    return len(todo)


def _write(
    pool: SplitPool, state: JobState, splits: Sequence[InputSplit], settings: Settings
) -> int:
    """Only or second reading of the splits that lack it; returns their number."""
    todo = [split for split in splits if state.result(split) is None]
    pool.run(partial(write_split, settings, state), todo, "write")
    return len(todo)


def _select(state: JobState, splits: Sequence[InputSplit], settings: Settings) -> None:
    """Selection among the records of all splits: duplicates and the sample."""
    statistics = StatisticsBuilder(settings.filters)
    for result in _complete("scanned", splits, state.scan_result):
        statistics.add(result)
    statistics.check_scores(settings.filters.score_names)
    tables = [partial(np.load, state.scan(split)) for split in splits]
    with state.unfinished("selection") as unfinished:
        folder = unfinished / "keep_decisions"
        folder.mkdir()
        selection = select(
            tables,
            settings.deduplicate is not None,
            settings.sample,
            hold_out=settings.hold_out,
            only_held_out=settings.only_held_out,
        )
        for split, decisions in zip(splits, selection, strict=True):
            np.save(folder / f"{split.name}.npy", decisions)
        try:
            folder.rename(state.selection)
        except OSError:
            if not state.selection.exists():  # or another run has made the same
                raise


def _finish(state: JobState, plan: InputPlan, settings: Settings) -> Statistics:
    """List of what was left out, report, page and, last, manifest of a data set whose splits are
    all written."""
    splits = plan.splits
    statistics = StatisticsBuilder(settings.filters)
    if settings.two_readings:
        for result in _complete("scanned", splits, state.scan_result):
            statistics.add(result)
    rows = []
    for result in _complete("written", splits, state.result):
        statistics.add(result)
        rows += result["rows"]
    write_atomically(state.skipped, statistics.skipped_lines())
    statistics.check_scores(settings.filters.score_names)
    sample = None if settings.only_held_out else settings.sample
    asked = sample if isinstance(sample, int) else None
    report = Statistics.of(statistics, rows, asked, plan.unread)
    if not rows:
        raise PreprocessError(
            f"no sample was kept, so {state.output} is not a data set: {report}\n"
            f"listed in {state.skipped}"
        )
    write_atomically(state.output / REPORT, report.to_json())
    write_html_report(state.output, state.output / PAGE, report, rows, settings.filters)
    write_manifest(state.output, rows)
    return report


def _complete(
    verb: str, splits: Sequence[InputSplit], load: Callable[[InputSplit], dict | None]
) -> Iterator[dict]:
    """Results of all splits, one in memory at a time; raises PreprocessError naming those that have
    none."""
    missing = []
    for split in splits:
        if (result := load(split)) is None:
            missing.append(split.name)
        elif not missing:
            yield result
    if missing:
        more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
        raise PreprocessError(
            f"{len(missing)} of {len(splits)} splits are not {verb} yet: "
            f"{', '.join(missing[:_NAMED])}{more}; run their partitions (again)"
        )
