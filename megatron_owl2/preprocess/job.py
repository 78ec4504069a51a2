"""From a published corpus to a data set: many processes, repeatable, nothing lost uncounted.

A reader (data_prep/) cuts its input into parts. Every part becomes its own shards and a small
result file, written last; the manifest is made when all results are there. So an interrupted run
continues where it stopped, partitions on several machines share a folder, and the bytes depend on
neither.
"""

import json
import multiprocessing
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_owl2.data.records import BadSampleError, Record
from megatron_owl2.data.shards import MANIFEST, ShardWriter, write_atomically, write_manifest
from megatron_owl2.preprocess.parts import Part, PreprocessError, Skipped

REPORT = "report.json"
_WORK = "preprocess"  # holds job.json and one result file per part
_NAME = re.compile(r"[A-Za-z0-9_-]+")
_EXAMPLES = 5  # kept for each reason to skip


@dataclass(frozen=True)
class Report:
    """What came of a corpus: samples kept, samples skipped by reason, examples of each reason."""

    kept: int
    skipped: dict[str, int]
    examples: dict[str, list[str]]

    def __str__(self) -> str:
        lines = [f"kept {self.kept}, skipped {sum(self.skipped.values())}"]
        for reason, count in sorted(self.skipped.items(), key=lambda item: (-item[1], item[0])):
            lines.append(f"  {count} x {reason} (such as {self.examples[reason][0]})")
        return "\n".join(lines)


@dataclass(frozen=True)
class Outcome:
    """The report, or None while `missing` parts of other partitions are not there; `written` counts
    the parts that this run made."""

    report: Report | None
    written: int
    missing: int


def preprocess(
    parts: Sequence[Part],
    read: Callable[[Any], Iterator[Record | Skipped]],
    output: Path,
    arguments: dict[str, Any],
    samples_per_shard: int = 10_000,
    workers: int = 1,
    partition: tuple[int, int] = (0, 1),
) -> Outcome:
    """Write the parts i with i % n == partition index as shards of `output`.

    The run that finds the parts of all partitions there writes the report and the manifest.
    `arguments` (JSON) describes the job: an output folder made with the same arguments is
    continued, or left alone if finished. Raises PreprocessError if the folder holds anything else,
    if no sample at all was kept, or if a process was killed.
    """
    job = arguments | {
        "samples_per_shard": samples_per_shard,
        "parts": [[part.name, part.identity] for part in parts],
    }
    names = [part.name for part in parts]
    if len(set(names)) < len(names) or not all(map(_NAME.fullmatch, names)):
        raise PreprocessError(
            f"parts of the input need different names of letters, digits, '_', '-': {names[:5]}"
        )
    _claim(output, job)
    todo: list[Part] = []
    if not (output / MANIFEST).exists():
        index, count = partition
        todo = [part for part in parts[index::count] if not _result(output, part).exists()]
        _run(partial(_write_part, read, output, samples_per_shard), todo, workers)
        missing = sum(not _result(output, part).exists() for part in parts)
        if missing:
            return Outcome(None, len(todo), missing)
        _finish(output, parts)
    return Outcome(Report(**json.loads((output / REPORT).read_bytes())), len(todo), 0)


def _claim(output: Path, job: dict) -> None:
    """Mark an empty folder as this job's, or check that it is."""
    path = output / _WORK / "job.json"
    if output.exists() and not output.is_dir():
        raise PreprocessError(f"{output} is not a folder; choose another --output")
    if not path.exists():
        if output.exists() and any(entry.name != _WORK for entry in output.iterdir()):
            raise PreprocessError(
                f"{output} is not empty and was not made by this program; choose another --output"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(job, indent=1, sort_keys=True).encode())
    found = json.loads(path.read_bytes())
    if found != json.loads(json.dumps(job)):
        different = sorted(key for key in found.keys() | job if found.get(key) != job.get(key))
        raise PreprocessError(
            f"{output} holds the output of another job (different: {', '.join(different)}); "
            "choose another --output or delete it"
        )


def _run(write: Callable[[Part], None], parts: list[Part], workers: int) -> None:
    with ExitStack() as stack:
        results: Iterable[None] = map(write, parts)
        if min(workers, len(parts)) > 1:
            # Forking a process that has threads can deadlock; spawning cannot.
            context = multiprocessing.get_context("spawn")
            pool = ProcessPoolExecutor(min(workers, len(parts)), mp_context=context)
            results = stack.enter_context(pool).map(write, parts)
        try:
            for _ in tqdm(results, total=len(parts), unit="part"):
                pass
        except BrokenProcessPool:
            raise PreprocessError(
                "a process was killed, probably for lack of memory; start again with fewer "
                "--workers: finished parts are kept"
            ) from None


def _write_part(read: Callable, output: Path, samples_per_shard: int, part: Part) -> None:
    skipped: Counter[str] = Counter()
    examples: dict[str, list[str]] = {}
    writer = ShardWriter(output, samples_per_shard, prefix=part.name, manifest=False)
    with writer:
        for item in read(part.payload):
            if isinstance(item, Record):
                try:
                    writer.write(item)
                    continue
                except BadSampleError as error:
                    item = Skipped("record cannot be stored", f"{item.key}: {error}")
            skipped[item.reason] += 1
            if skipped[item.reason] <= _EXAMPLES:
                examples.setdefault(item.reason, []).append(item.detail)
    result = {"rows": writer.rows, "skipped": skipped, "examples": examples}
    write_atomically(_result(output, part), json.dumps(result).encode())


def _finish(output: Path, parts: Sequence[Part]) -> None:
    rows: list[dict] = []
    skipped: Counter[str] = Counter()
    examples: dict[str, list[str]] = {}
    for part in parts:
        result = json.loads(_result(output, part).read_bytes())
        rows += result["rows"]
        skipped += Counter(result["skipped"])
        for reason, details in result["examples"].items():
            known = examples.setdefault(reason, [])
            known += details[: _EXAMPLES - len(known)]
    report = Report(sum(row["samples"] for row in rows), dict(skipped), examples)
    if not rows:
        raise PreprocessError(f"no sample was kept, so {output} is not a data set: {report}")
    write_atomically(output / REPORT, json.dumps(vars(report), indent=1).encode() + b"\n")
    write_manifest(output, rows)


def _result(output: Path, part: Part) -> Path:
    return output / _WORK / f"{part.name}.json"
