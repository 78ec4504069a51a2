"""From a published corpus to a data set: many processes, repeatable, nothing lost uncounted.

A reader (data_prep/) cuts its input into parts. Every part becomes its own shards and a result
that is written last; report and manifest are made when all results are there. What depends on the
whole corpus (duplicates, a sample of n) takes two readings: the first leaves a table of every part,
one process selects from the tables, the second writes. So an interrupted run continues where it
stopped, partitions on several machines share a folder, and the bytes depend on neither.
"""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.corpus_statistics import Statistics, StatisticsBuilder
from data_prep.dedup import select
from data_prep.html_report import write_html_report
from data_prep.job_state import JobState
from data_prep.pool import Pool
from data_prep.splits import InputSplit
from data_prep.worker import Settings, scan_split, write_split
from megatron_owl2.data.shards.manifest import MANIFEST, write_atomically, write_manifest
from megatron_owl2.errors import PreprocessError

REPORT, PAGE = "report.json", "report.html"
_NAME = re.compile(r"[A-Za-z0-9_-]+")
_NAMED = 5  # missing parts in a message


@dataclass(frozen=True)
class Outcome:
    """The report, or None while the data set is not finished; how many parts this run scanned and
    wrote, whether it made the selection between the two, and whether it finished the data set."""

    report: Statistics | None
    scanned: int = 0
    written: int = 0
    selected: bool = False
    finished: bool = False


def preprocess(
    parts: Sequence[InputSplit],
    settings: Settings,
    output: Path,
    arguments: dict[str, Any],
    workers: int = 1,
    partition: tuple[int, int] = (0, 1),
    merge: bool = False,
) -> Outcome:
    """Make `output` a data set of the parts, or do a share of it.

    Partition (i, n) scans its parts i, i + n, ... or, once the selection is there, writes them.
    With n > 1 it leaves the selection and the end to a run with `merge`, which does those two and
    no more. `arguments` (JSON) say, with `settings`, what the job is: a folder made by the same job
    is continued, or left alone if finished. Raises PreprocessError if two parts have one name or
    one has a name that shards cannot have, if the folder holds anything else, if `merge` finds
    parts missing, if no sample was kept, or if a part cannot be done.
    """
    _check_names(parts)
    folder = JobState(output)
    folder.claim(_describe(parts, settings, arguments))
    if (output / MANIFEST).exists():
        return Outcome(Statistics.from_json((output / REPORT).read_bytes()))
    folder.remove_leftovers()
    index, count = partition
    mine = [] if merge else parts[index::count]
    scanned = written = 0
    selected = False
    with Pool(workers) as pool:
        if settings.two_readings and not folder.selection.exists():
            todo = [part for part in mine if folder.scan_result(part) is None]
            pool.run(partial(scan_split, settings, folder), todo, "scan")
            scanned = len(todo)
            if count > 1:
                return Outcome(None, scanned)
            _select(folder, parts, settings)
            selected = True
            if merge:
                return Outcome(None, selected=True)
        todo = [part for part in mine if folder.result(part) is None]
        pool.run(partial(write_split, settings, folder), todo, "write")
        written = len(todo)
    if count > 1:
        return Outcome(None, written=written)
    return Outcome(_finish(folder, parts, settings), scanned, written, selected, finished=True)


def _check_names(parts: Sequence[InputSplit]) -> None:
    known: dict[str, Path] = {}
    for part in parts:
        if not _NAME.fullmatch(part.name):
            raise PreprocessError(
                f"shards of {part.origin} cannot be named {part.name!r}; rename it with letters, "
                "digits, '_' and '-' alone"
            )
        if part.name in known:
            raise PreprocessError(
                f"shards of {known[part.name]} and of {part.origin} would both be named "
                f"{part.name}; rename one of them (all but letters, digits, '_' and '-' count as "
                "'_')"
            )
        known[part.name] = part.origin


def _describe(parts: Sequence[InputSplit], settings: Settings, arguments: dict) -> dict[str, Any]:
    """What must be the same for a job to be continued."""
    flat = asdict(settings)
    del flat["read"]  # named by the format among the arguments
    flat |= flat.pop("filters") | flat.pop("reencoding")
    return arguments | flat | {"parts": [[part.name, part.identity] for part in parts]}


def _select(folder: JobState, parts: Sequence[InputSplit], settings: Settings) -> None:
    statistics = StatisticsBuilder(settings.filters)
    _add_all(statistics, "scanned", {part.name: folder.scan_result(part) for part in parts})
    statistics.check_scores(settings.filters.score_names)
    tables = [partial(np.load, folder.scan(part)) for part in parts]
    with folder.unfinished("selection") as unfinished:
        keep_decisions = unfinished / "keep_decisions"
        keep_decisions.mkdir()
        selection = select(tables, settings.deduplicate is not None, settings.sample)
        for part, fate in zip(parts, selection, strict=True):
            np.save(keep_decisions / f"{part.name}.npy", fate)
        keep_decisions.rename(folder.selection)


def _finish(folder: JobState, parts: Sequence[InputSplit], settings: Settings) -> Statistics:
    """Write report and page and, last, the manifest."""
    statistics = StatisticsBuilder(settings.filters)
    if settings.two_readings:
        _add_all(statistics, "scanned", {part.name: folder.scan_result(part) for part in parts})
    results = {part.name: folder.result(part) for part in parts}
    _add_all(statistics, "written", results)
    statistics.check_scores(settings.filters.score_names)
    rows = [row for result in results.values() for row in result["rows"]]
    asked = settings.sample if isinstance(settings.sample, int) else None
    report = Statistics.of(statistics, rows, asked)
    if not rows:
        raise PreprocessError(f"no sample was kept, so {folder.output} is not a data set: {report}")
    write_atomically(folder.output / REPORT, report.to_json())
    write_html_report(folder.output, folder.output / PAGE, report, rows, settings.filters)
    write_manifest(folder.output, rows)
    return report


def _add_all(statistics: StatisticsBuilder, verb: str, results: dict[str, dict | None]) -> None:
    missing = [name for name, result in results.items() if result is None]
    if missing:
        more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
        raise PreprocessError(
            f"{len(missing)} of {len(results)} parts are not {verb} yet: "
            f"{', '.join(missing[:_NAMED])}{more}; run their partitions (again)"
        )
    for result in results.values():
        statistics.add(result)
