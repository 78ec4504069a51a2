"""Journals of an evaluation: the answers that are there, a line for every batch.

Every data-parallel group has a journal of its own in the output folder, `journal-<group>.jsonl`:
first the settings, then {"batch", "images", "answers"} as each batch is done. A process may be
killed at any moment: a last line that it has torn is cut off, and its batch is asked again. Batches
are the same after a restart as before it, so no answer depends on where that came.
"""

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_owl2.errors import TaskError
from megatron_owl2.evaluation.fingerprint import differences
from megatron_owl2.utils.files import locked
from megatron_owl2.utils.json_text import parse_json

_logger = logging.getLogger(__name__)

_PATTERN = "journal-*.jsonl"
_AGAIN = "begin again with --restart"


@dataclass(frozen=True)
class Batch:
    """Number of questions of a batch, and a mark of their images."""

    size: int
    images: str


Answers = dict[int, list[str]]  # of a batch, by its number


def read_journals(folder: Path, settings: Mapping[str, Any], batches: Sequence[Batch]) -> Answers:
    """The answers of the finished batches in all journals of a folder; torn ends are cut off.

    Answers about other images than a batch has now, such as one that was mended, count as none.
    Raises TaskError for journals of other
    settings, naming what differs, for damaged ones, and while another process writes them.
    """
    finished: Answers = {}
    for path in journals_in(folder):
        with _lock(path):
            lines = _whole_lines(path)
        if not lines:
            path.unlink()
            continue
        before = _object(path, 1, lines[0]).get("settings")
        if not isinstance(before, dict):
            raise TaskError(f"{path} is no journal of an evaluation; {_AGAIN}")
        if changed := differences(before, settings):
            raise TaskError(
                f"{folder} holds an unfinished evaluation with other settings: "
                f"{'; '.join(changed)}; give the same, name another folder, or {_AGAIN}"
            )
        for number, line in enumerate(lines[1:], start=2):
            batch, images, answers = _entry(path, number, line, batches)
            if images != batches[batch].images:
                continue
            if finished.setdefault(batch, answers) != answers:
                raise TaskError(f"{path}: line {number} answers batch {batch} anew; {_AGAIN}")
    return finished


def remove_journals(folder: Path) -> None:
    """Removal of all journals of a folder."""
    for path in journals_in(folder):
        with _lock(path):
            path.unlink()


def journals_in(folder: Path) -> list[Path]:
    """The journals of a folder, sorted."""
    return sorted(folder.glob(_PATTERN))


@contextmanager
def journal_of(
    folder: Path, group: int, settings: Mapping[str, Any], batches: Sequence[Batch]
) -> Iterator[Callable[[int, Sequence[str]], None]]:
    """The journal of a data-parallel group, open and locked: what puts the number and the answers
    of a batch on the disk.

    Raises TaskError while another process writes it.
    """
    path = folder / f"journal-{group}.jsonl"
    path.touch()
    with _lock(path), path.open("ab") as file:

        def write(row: Mapping[str, Any]) -> None:
            file.write(json.dumps(row).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

        if path.stat().st_size == 0:
            write({"settings": settings})
        yield lambda batch, answers: write(
            {"batch": batch, "images": batches[batch].images, "answers": list(answers)}
        )


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Exclusive lock of a journal, where the file system has locks."""
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(path))
        except BlockingIOError:
            raise TaskError(f"another process writes {path}; wait for it or end it") from None
        except OSError as error:
            _logger.info("%s is not locked: %s", path, error.strerror)
        yield


def _whole_lines(path: Path) -> list[bytes]:
    """The lines of a journal; what follows the last line end is cut off the file."""
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        os.truncate(path, len(whole))
    return whole.splitlines()


def _object(path: Path, number: int, line: bytes) -> dict:
    try:
        row = parse_json(line)
    except ValueError as error:
        raise TaskError(f"{path} is damaged: line {number}: {error}; {_AGAIN}") from None
    if not isinstance(row, dict):
        raise TaskError(f"{path} is damaged: line {number} is no object; {_AGAIN}")
    return row


def _entry(
    path: Path, number: int, line: bytes, batches: Sequence[Batch]
) -> tuple[int, str, list[str]]:
    row = _object(path, number, line)
    batch, images, answers = row.get("batch"), row.get("images"), row.get("answers")
    if not isinstance(batch, int) or not 0 <= batch < len(batches) or not isinstance(images, str):
        raise TaskError(f"{path} is damaged: line {number} names no batch; {_AGAIN}")
    texts = isinstance(answers, list) and all(isinstance(answer, str) for answer in answers)
    if not isinstance(answers, list) or not texts or len(answers) != batches[batch].size:
        raise TaskError(f"{path} is damaged: line {number} has not its answers; {_AGAIN}")
    return batch, images, answers
