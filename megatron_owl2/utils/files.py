"""File-system helpers: directories and files that appear complete, JSON lines after a crash."""

import contextlib
import fcntl
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

_logger = logging.getLogger(__name__)
_GIB = 1024**3


@contextlib.contextmanager
def new_directory(output: Path, needed: int = 0) -> Iterator[Path]:
    """A folder to write in, which becomes `output` at the end, all of it on the disk by then.

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
        with contextlib.suppress(OSError), _locked(abandoned):  # fails while its writer lives
            shutil.rmtree(abandoned)
    partial = Path(tempfile.mkdtemp(**names, dir=output.parent))
    try:
        with _locked(partial):
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
    """Cut a file of JSON lines down to the wanted ones; a line torn by a crash is dropped and
    logged."""
    kept, torn = [], 0
    for line in path.read_text(errors="replace").splitlines(keepends=True):
        try:
            row = json.loads(line)
            whole = line.endswith("\n") and isinstance(row, dict)
        except ValueError:
            whole = False
        torn += not whole
        if whole and wanted(row):
            kept.append(line)
    if torn:
        _logger.warning("%s: dropped %d lines that a crash has torn", path, torn)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text("".join(kept))
    os.replace(partial, path)


def rename_durably(partial: Path, output: Path) -> None:
    """Rename a folder once all its files are on the disk."""
    for file in partial.iterdir():
        sync(file)
    sync(partial)
    partial.rename(output)
    sync(output.parent)


def sync(path: Path) -> None:
    """Wait until a file or the names in a folder are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Raises OSError if another process has locked it, or if the file system has no locks."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
