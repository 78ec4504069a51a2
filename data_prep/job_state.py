"""State of a job in its output folder, by which runs continue and machines share the work.

Below `preprocess/`, job.json describes the job, scan/, selection/ and parts/ hold complete results,
and skipped.jsonl lists what a finished job left out. Work in progress lies in unfinished/, in a
folder of the process that does it, and is moved out as a whole; so nothing that was interrupted
looks finished.
"""

import json
import os
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from data_prep.splits import InputSplit
from megatron_owl2.data.shards.writer import INDEX, SUMS
from megatron_owl2.errors import PreprocessError
from megatron_owl2.utils.files import locked, write_atomically
from megatron_owl2.utils.json_text import parse_json

_WORK = "preprocess"
_ABANDONED = 24 * 3600  # seconds without a change


class JobState:
    """Output folder of a job; picklable, so that worker processes get it."""

    def __init__(self, output: Path):
        self.output = output
        self._work = output / _WORK
        self.selection = self._work / "selection"
        self.skipped = self._work / "skipped.jsonl"

    def claim(self, job: dict[str, Any]) -> None:
        """Claim of an empty folder; raises PreprocessError if it is or holds anything else."""
        if self.output.exists() and not self.output.is_dir():
            raise PreprocessError(f"{self.output} is not a folder; choose another --output")
        path = self._work / "job.json"
        if not path.exists():
            mine = f".{_WORK}-"  # another process may be claiming it now
            if self.output.exists() and any(
                entry.name != _WORK and not entry.name.startswith(mine)
                for entry in self.output.iterdir()
            ):
                raise PreprocessError(
                    f"{self.output} is not empty and was not made by this program; "
                    "choose another --output"
                )
            temporary = self.output / f"{mine}{secrets.token_hex(8)}"
            temporary.mkdir(parents=True)
            write_atomically(
                temporary / path.name, json.dumps(job, indent=1, sort_keys=True).encode()
            )
            try:
                # Renaming a folder fails where there is a full one: only one process can claim.
                os.rename(temporary, self._work)
            except OSError:
                shutil.rmtree(temporary)
        found, job = self._read_json(path), json.loads(json.dumps(job))
        if found is None:
            raise PreprocessError(f"{path} has gone; start again")
        _complete_identities(found, job)
        if found == job:
            return
        different = sorted(key for key in found.keys() | job if found.get(key) != job.get(key))
        if different == ["parts"]:
            raise PreprocessError(
                f"the input changed since {self.output} was begun ({_change(found, job)}); "
                "choose another --output or delete it"
            )
        raise PreprocessError(
            f"{self.output} holds the output of another job (different: {', '.join(different)}); "
            "choose another --output or delete it"
        )

    def scan(self, split: InputSplit) -> Path:
        """Path of the table of a first reading: one row for each record that stays so far."""
        return self._work / "scan" / f"{split.name}.npy"

    def scan_result(self, split: InputSplit) -> dict | None:
        """Counts of the first reading of a split, or None if it is not complete."""
        return self._read_json(self.scan(split).with_suffix(".json"))

    def keep_decisions(self, split: InputSplit) -> Path:
        """Path of the decisions (uint8) about every row of the scan."""
        return self.selection / f"{split.name}.npy"

    def result(self, split: InputSplit) -> dict | None:
        """Shard rows and counts of a split, or None if they or one of its files are not there."""
        result = self._read_json(self._work / "parts" / f"{split.name}.json")
        for row in result["rows"] if result else ():
            count = row["samples"]
            for ending, size in (("", row["bytes"]), (INDEX, 8 * (count + 1)), (SUMS, 8 * count)):
                try:
                    found = (self.output / f"{row['name']}{ending}").stat().st_size
                except FileNotFoundError:
                    return None
                if found != size:
                    return None
        return result

    def keep_scan(self, split: InputSplit, unfinished: Path, result: dict) -> None:
        """Move of `rows.npy` of `unfinished` to its place; the counts, which come last, say that
        it is complete."""
        path = self.scan(split)
        path.parent.mkdir(exist_ok=True)
        os.replace(unfinished / "rows.npy", path)
        _move_json(unfinished, path.with_suffix(".json"), result)

    def keep_split(self, split: InputSplit, shards: Path, result: dict) -> None:
        """Move of the shards in `shards` to the output; the result comes last."""
        for path in sorted(shards.iterdir()):
            os.replace(path, self.output / path.name)
        place = self._work / "parts" / f"{split.name}.json"
        place.parent.mkdir(exist_ok=True)
        _move_json(shards, place, result)

    @contextmanager
    def unfinished(self, name: str) -> Iterator[Path]:
        """Folder for work in progress, deleted at the end; a locked file marks it as in use."""
        name = f"{socket.gethostname()}.{secrets.token_hex(8)}.{name}"
        path = self._unfinished / name
        self._unfinished.mkdir(exist_ok=True)
        lock = self._unfinished / f"{name}.lock"
        with _lock_file(lock):
            try:
                path.mkdir()
                yield path
            finally:
                _delete(path, lock)

    def remove_leftovers(self) -> None:
        """Deletion of what killed processes left: of this machine all that nobody has locked, of
        others (where a lock may not be seen) what has not changed for a day."""
        host = socket.gethostname()
        for path in self._unfinished.glob("*.lock"):
            folder = path.with_suffix("")
            if path.name.startswith(f"{host}."):
                with suppress(OSError), locked(path):
                    _delete(folder, path)
            elif time.time() - _last_change(folder, path) > _ABANDONED:
                _delete(folder, path)

    @property
    def _unfinished(self) -> Path:
        return self._work / "unfinished"

    def _read_json(self, path: Path) -> dict | None:
        """Object in a file of this folder, or None if it is not there."""
        try:
            content = parse_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except ValueError:
            content = None
        if not isinstance(content, dict):
            raise PreprocessError(f"{path} is damaged; delete {self.output} and start again")
        return content


@contextmanager
def _lock_file(path: Path) -> Iterator[None]:
    """New file that stays locked until the block ends or this process dies."""
    while True:
        path.touch()
        with ExitStack() as stack:
            with suppress(OSError):  # a file system without locks: then only age tells
                stack.enter_context(locked(path, wait=True))
            # Another run may have deleted the file before it was locked; its random name is
            # never used again, so a file that is there is the locked one.
            if path.exists():
                yield
                return


def _delete(folder: Path, lock: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    lock.unlink(missing_ok=True)


def _last_change(folder: Path, lock: Path) -> float:
    paths, newest = [lock, folder], 0.0
    for place, folders, files in os.walk(folder):  # which passes over what its owner deletes
        paths += [Path(place, name) for name in (*folders, *files)]
    for path in paths:
        with suppress(FileNotFoundError):
            newest = max(newest, path.stat().st_mtime)
    return newest


def _complete_identities(found: dict, job: dict) -> None:
    """Completion of the identities that an earlier version has left, the beginnings of today's."""
    now = dict(job["parts"])
    for part in found.get("parts", ()):
        if now.get(part[0], "").startswith(f"{part[1]},"):
            part[1] = now[part[0]]


def _change(found: dict, job: dict) -> str:
    """First split that is new, gone or changed, for a message."""
    old, new = (dict(description["parts"]) for description in (found, job))
    name = min(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    return f"split {name}: {old.get(name, 'was not there')}, now {new.get(name, 'gone')}"


def _move_json(unfinished: Path, path: Path, content: dict) -> None:
    temporary = unfinished / "result.json"
    write_atomically(temporary, json.dumps(content).encode())
    os.replace(temporary, path)
