"""What a job keeps in its output folder, so that runs continue and machines share the work.

Below `preprocess/`: job.json says whose folder it is, scan/, selection/ and parts/ hold what is
complete. Work in progress lies in unfinished/, in a folder of the process that does it, and moves
out as a whole; so nothing that was interrupted looks finished.
"""

import fcntl
import json
import os
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from data_prep.splits import InputSplit
from megatron_owl2.data.shards.writer import INDEX, SUMS, write_atomically
from megatron_owl2.errors import PreprocessError

_WORK = "preprocess"
_ABANDONED = 24 * 3600  # seconds without a change


class JobState:
    """The output folder of a job; it can be sent to other processes."""

    def __init__(self, output: Path):
        self.output = output
        self._work = output / _WORK
        self.selection = self._work / "selection"

    def claim(self, job: dict[str, Any]) -> None:
        """Mark an empty folder as this job's; raises PreprocessError if it is anything else's."""
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
        found, job = json.loads(path.read_bytes()), json.loads(json.dumps(job))
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

    def scan(self, part: InputSplit) -> Path:
        """What the first reading of a part found: one row for each record that stays so far."""
        return self._work / "scan" / f"{part.name}.npy"

    def scan_result(self, part: InputSplit) -> dict | None:
        """The counts of the first reading, or None if it is not complete."""
        return _read_json(self.scan(part).with_suffix(".json"))

    def keep_decisions(self, part: InputSplit) -> Path:
        """What becomes of every row of the scan."""
        return self.selection / f"{part.name}.npy"

    def result(self, part: InputSplit) -> dict | None:
        """The shard rows and counts of a part, or None if it or one of its files is not there."""
        result = _read_json(self._work / "parts" / f"{part.name}.json")
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

    def keep_scan(self, part: InputSplit, unfinished: Path, result: dict) -> None:
        """Move `rows.npy` of `unfinished` to its place; the counts, which come last, say that it
        is complete."""
        path = self.scan(part)
        path.parent.mkdir(exist_ok=True)
        os.replace(unfinished / "rows.npy", path)
        _move_json(unfinished, path.with_suffix(".json"), result)

    def keep_split(self, part: InputSplit, shards: Path, result: dict) -> None:
        """Move the shards in `shards` to the output; the result comes last."""
        for path in sorted(shards.iterdir()):
            os.replace(path, self.output / path.name)
        place = self._work / "parts" / f"{part.name}.json"
        place.parent.mkdir(exist_ok=True)
        _move_json(shards, place, result)

    @contextmanager
    def unfinished(self, name: str) -> Iterator[Path]:
        """A folder for work in progress, deleted at the end; a lock says that its owner lives."""
        name = f"{socket.gethostname()}.{secrets.token_hex(8)}.{name}"
        path = self._unfinished / name
        self._unfinished.mkdir(exist_ok=True)
        with _locked(self._unfinished / f"{name}.lock") as lock:
            try:
                path.mkdir()
                yield path
            finally:
                shutil.rmtree(path, ignore_errors=True)
                Path(lock.name).unlink(missing_ok=True)

    def remove_leftovers(self) -> None:
        """Delete what killed processes left: of this machine whatever nobody holds the lock of, of
        others (where a lock may not reach) what has not changed for a day."""
        host = socket.gethostname()
        for path in self._unfinished.glob("*.lock"):
            folder = path.with_suffix("")
            if path.name.startswith(f"{host}."):
                with suppress(OSError), path.open("r+") as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    _delete(folder, path)
            elif time.time() - _last_change(folder, path) > _ABANDONED:
                _delete(folder, path)

    @property
    def _unfinished(self) -> Path:
        return self._work / "unfinished"


@contextmanager
def _locked(path: Path) -> Iterator[TextIO]:
    """A file that this process has the lock of for as long as it lives."""
    while True:
        with path.open("w") as file:
            with suppress(OSError):  # a file system without locks: then only age tells
                fcntl.flock(file, fcntl.LOCK_EX)
            # Another run may have deleted the file between the two steps.
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                yield file
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


def _change(found: dict, job: dict) -> str:
    """The first part that is new, gone or changed."""
    old, new = (dict(map(tuple, parts["parts"])) for parts in (found, job))
    name = min(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    return f"part {name}: {old.get(name, 'was not there')}, now {new.get(name, 'gone')}"


def _read_json(path: Path) -> dict | None:
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None


def _move_json(unfinished: Path, path: Path, content: dict) -> None:
    temporary = unfinished / "result.json"
    write_atomically(temporary, json.dumps(content).encode())
    os.replace(temporary, path)
