"""Atomic writes of files and folders, locks among processes, logs that survive a crash."""

import contextlib
import fcntl
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

_logger = logging.getLogger(__name__)
_GIB = 1024**3


@contextlib.contextmanager
def new_directory(output: Path, needed: int = 0) -> Iterator[Path]:
    """Folder to write in, which becomes `output` at the end, all of it on the disk by then.

    After a failure nothing is left; what a killed process left is removed by the next one that
    writes the same output. Raises OSError if `output` exists, or if its disk has less than
    `needed` bytes free.
    """
    output = Path(output)
    if os.path.lexists(output) or output.name in ("", ".."):
        raise FileExistsError(f"{output} exists already; name a new directory or remove it")
    output.parent.mkdir(parents=True, exist_ok=True)
    names = {"prefix": f".{output.name}.", "suffix": ".partial"}
    for abandoned in output.parent.glob(names["prefix"] + "*" + names["suffix"]):
        with contextlib.suppress(OSError), locked(abandoned):  # fails while its writer lives
            shutil.rmtree(abandoned)
    partial = Path(tempfile.mkdtemp(**names, dir=output.parent))
    try:
        with locked(partial):
            free = shutil.disk_usage(partial).free
            if needed > free:
                sizes = f"needs {needed / _GIB:.1f} GiB, free are {free / _GIB:.1f}"
                raise OSError(f"no room on the disk of {output}: it {sizes}")
            yield partial
            partial.chmod(0o777 & ~_umask())  # mkdtemp's is for its owner alone
            rename_durably(partial, output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def truncate_jsonl(path: Path, wanted: Callable[[dict], bool]) -> None:
    """Removal of the JSON lines of a file that are not wanted; lines that a crash has torn are
    dropped with a warning."""
    kept, torn = [], 0
    # Line feeds alone end a line: texts may hold what splitlines takes for one.
    for line in re.findall(rb"[^\n]*\n|[^\n]+\Z", path.read_bytes()):
        try:
            row = json.loads(line)
            whole = line.endswith(b"\n") and isinstance(row, dict)
        except (ValueError, RecursionError):
            whole = False
        torn += not whole
        if whole and wanted(row):
            kept.append(line)
    if torn:
        _logger.warning("%s: dropped %d lines that a crash has torn", path, torn)
    write_atomically(path, b"".join(kept))


@contextlib.contextmanager
def replaced_atomically(path: Path) -> Iterator[Path]:
    """A path to write to, beside `path`, which it replaces at the end, all of it on the disk.

    After a failure `path` is what it was and nothing is left beside it. That the new file bears
    the name after a power failure is only sure once the folder is synced as well.
    """
    temporary = temporary_name(path)
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_atomically(path: Path, data: bytes) -> None:
    """Atomic write of a file: it is there completely or not at all."""
    with replaced_atomically(path) as temporary:
        temporary.write_bytes(data)


def temporary_name(path: Path) -> Path:
    """Name, in the same folder, of what this process writes before it becomes `path`."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def rename_durably(partial: Path, output: Path) -> None:
    """Rename of a folder once all its files are on the disk."""
    for file in partial.iterdir():
        sync(file)
    sync(partial)
    partial.rename(output)
    sync(output.parent)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(path: Path, wait: bool = False) -> Iterator[None]:
    """Exclusive lock of an existing file or folder; the kernel drops it if the process dies.

    Raises BlockingIOError if another process has it, unless `wait`, and OSError if there is no
    such file or the file system has no locks.
    """
    # NFS locks only files that are open for writing; folders cannot be opened so.
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def is_hidden(path: str) -> bool:
    """Whether a path, with `/` between its parts, is hidden or lies in a hidden folder.

    Hidden are names that begin with a dot, such as the `._NAME` and `.DS_Store` of macOS, and the
    `__MACOSX` that its archives contain.
    """
    if path[:1] not in (".", "_") and "/." not in path and "/_" not in path:
        return False  # as nearly all are, and training asks for every member
    return any(
        part == "__MACOSX" or (part[:1] == "." and part not in (".", ".."))
        for part in path.split("/")
    )
