"""Ranges of remote files on a disk of this node, shared by all of its processes.

`<cache>/<hash of the location>/<file>/<start>-<stop>` holds one range and appears by a rename.
While it is fetched it is `<start>-<stop>.part`, locked by the process that fetches it; the kernel
drops the lock of a killed process, so a part without a lock is nobody's and is removed or taken
over. A part has its full size from the start: the disk is full before a fetch, never in the middle,
and `<cache>/.usage`, the sum of all sizes, is never too small; `<cache>/.swept` says when, in
nanoseconds, the last search for what killed processes left began.
"""

import errno
import fcntl
import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from megatron_owl2.data.storage.runtime import Runtime

_POLL, _SLOWEST_POLL = 0.005, 0.1  # seconds between the first two looks at a lock, and later
_KEEP = 0.9  # of the allowed bytes stays after an eviction, so that not every fetch needs one
_FOLDER = re.compile(r"[0-9a-f]{32}")
_RANGE = re.compile(r"\d+-\d+(\.part)?")


class CacheError(OSError):
    """The cache cannot take a range now; the caller reads past it."""


class RangeCache:
    """The cached ranges of one location, as a part of a cache of at most `max_bytes`.

    Safe among threads, forked children and unrelated processes; nothing is open between two calls.
    The least recently read ranges are evicted, which a process that reads them just then does not
    notice. Contents are not proof against a crash of the node: whoever reads checks, and drops.
    """

    def __init__(self, folder: str, location: str, max_bytes: int, runtime: Runtime | None = None):
        self._folder = folder
        self._runtime = runtime or Runtime()
        self._home = os.path.join(folder, hashlib.sha256(location.encode()).hexdigest()[:32])
        self._max_bytes = max_bytes
        self._swept_by = 0  # the process that looked for leftovers

    def read(self, name: str, extent: tuple[int, int], start: int, stop: int) -> bytes | None:
        """The bytes from `start` to `stop` of the file, or None if `extent` is not there whole."""
        path = self._path(name, extent)
        try:
            file = os.open(path, os.O_RDONLY)
        except OSError:
            return None
        try:
            if os.fstat(file).st_size == extent[1] - extent[0]:
                data = os.pread(file, stop - start, start - extent[0])
                if len(data) == stop - start:
                    with suppress(PermissionError):  # another user's file
                        os.utime(file)  # evictions go by it
                    return data
        except OSError:  # a bad cache disk costs a fetch, not the run
            pass
        finally:
            os.close(file)
        self.drop(name, extent)
        return None

    def holds(self, name: str, extent: tuple[int, int]) -> bool:
        """Whether the extent is there, which a later read may find changed."""
        return os.path.exists(self._path(name, extent))

    def drop(self, name: str, extent: tuple[int, int]) -> None:
        """Remove an extent if it is there."""
        with suppress(OSError):
            os.unlink(self._path(name, extent))

    def fill(
        self, name: str, extent: tuple[int, int], fetch: Callable[[], bytes], patience: float
    ) -> bytes | None:
        """Bring `extent` in: its bytes if this process fetched it, None if another one did.

        Waits at most `patience` seconds for other processes. Raises CacheError if the cache cannot
        take it, which is almost always known before anything is fetched, and what `fetch` raises.
        """
        path = self._path(name, extent)
        part = path + ".part"
        deadline = self._runtime.monotonic() + patience
        with self._errors():
            self._remove_leftovers(deadline)
            file = self._claim(path, part, deadline)
        if file is None:
            return None
        try:
            with self._errors():
                self._reserve(file, extent[1] - extent[0], deadline)
            data = fetch()
            with self._errors():
                _write(file, data)
                deadline = self._runtime.monotonic() + patience
                with self._usage(deadline):  # a sweep sees every file once
                    os.rename(part, path)
            return data
        finally:
            _abandon(file, part)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CacheError(f"the cache {self._folder} cannot be used: {error}") from error

    def _path(self, name: str, extent: tuple[int, int]) -> str:
        return f"{self._home}/{name}/{extent[0]}-{extent[1]}"

    def _reserve(self, file: int, size: int, deadline: float) -> None:
        """Give an empty part its size, after evicting what is in the way."""
        with self._usage(deadline) as usage:
            total = _read_number(usage)
            if total is None or total + size > self._max_bytes:
                total = self._sweep(self._max_bytes * _KEEP - size)
            if total + size > self._max_bytes:
                raise OSError(f"{size} bytes do not fit into its {self._max_bytes} bytes")
            try:
                os.posix_fallocate(file, 0, size)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                total = self._sweep(total * _KEEP - size)  # the disk is smaller than the cache
                os.posix_fallocate(file, 0, size)
            _write_number(usage, total + size)

    def _remove_leftovers(self, deadline: float) -> None:
        """Once in every process: what killed processes left counts as used, so it must go.

        A node starts dozens of processes at once, and a full cache has thousands of files: a sweep
        that began after this process asked is as good as its own.
        """
        if self._swept_by == os.getpid():
            return
        os.makedirs(self._folder, exist_ok=True)
        asked = time.time_ns()
        with self._usage(deadline) as usage, self._opened(".swept") as swept:
            if (_read_number(swept) or 0) <= asked:
                began = time.time_ns()
                _write_number(usage, self._sweep(self._max_bytes))
                _write_number(swept, began)
        self._swept_by = os.getpid()

    @contextmanager
    def _usage(self, deadline: float) -> Iterator[int]:
        """The locked file of the sum of all sizes; who holds it may sweep and reserve."""
        with self._opened(".usage") as file:
            pause = _POLL
            while not _lock(file):
                pause = self._wait(deadline, pause)
            yield file

    @contextmanager
    def _opened(self, name: str) -> Iterator[int]:
        file = os.open(os.path.join(self._folder, name), os.O_RDWR | os.O_CREAT, 0o666)
        try:
            yield file
        finally:
            _release(file)

    def _claim(self, path: str, part: str, deadline: float) -> int | None:
        """The new, empty, locked part of a range, or None as soon as the range is there."""
        pause = _POLL
        while True:
            if os.path.exists(path):
                return None
            os.makedirs(os.path.dirname(part), exist_ok=True)
            try:
                file = os.open(part, os.O_RDWR | os.O_CREAT, 0o666)
            except FileNotFoundError:  # a sweep removed the empty folder
                continue
            if not _lock(file):
                os.close(file)
                pause = self._wait(deadline, pause)
            elif not _is_still(file, part):  # its owner finished or gave up in between
                _release(file)
            elif os.path.exists(path):
                _abandon(file, part)
            else:
                os.ftruncate(file, 0)
                return file

    def _wait(self, deadline: float, pause: float) -> float:
        """Sleep for `pause` seconds; the next pause, longer, for hundreds of threads of a node may
        wait for one fetch."""
        if self._runtime.monotonic() > deadline:
            raise TimeoutError("another process holds its lock for too long")
        self._runtime.sleep(pause)
        return min(1.5 * pause, _SLOWEST_POLL)

    def _sweep(self, target: float) -> int:
        """Remove abandoned parts, then the least recently read ranges until at most `target` bytes
        are left if that is possible; the bytes that are left. Touches no other files."""
        found, total = [], 0
        for folder in _folders(self._folder):
            for entry in _entries(folder):
                if not _RANGE.fullmatch(entry.name) or _is_abandoned(entry.path):
                    continue
                with suppress(FileNotFoundError):
                    status = entry.stat()
                    total += status.st_size
                    if not entry.name.endswith(".part"):
                        found.append((status.st_mtime_ns, entry.path, status.st_size))
        for _, path, size in sorted(found):
            if total <= target:
                break
            with suppress(OSError):
                os.unlink(path)
                total -= size
        for folder in _folders(self._folder):
            with suppress(OSError):  # only empty ones go
                os.rmdir(folder)
        return total


def _abandon(file: int, part: str) -> None:
    """Close a locked part and remove it unless it was renamed."""
    with suppress(OSError):
        if _is_still(file, part):
            os.unlink(part)
    _release(file)


def _release(file: int) -> None:
    """Unlock and close; a child that was forked meanwhile has the file open and would keep it
    locked."""
    fcntl.flock(file, fcntl.LOCK_UN)
    os.close(file)


def _is_abandoned(path: str) -> bool:
    """Whether this was a part that nobody fetches, which is then gone."""
    if not path.endswith(".part"):
        return False
    try:
        file = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    abandoned = _lock(file) and _is_still(file, path)
    if abandoned:
        os.unlink(path)
    _release(file)
    return abandoned


def _lock(file: int) -> bool:
    """Lock without waiting; False if another open file holds the lock."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_still(file: int, path: str) -> bool:
    """Whether an open file is the one that bears the name."""
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False


def _write(file: int, data: bytes) -> None:
    rest, position = memoryview(data), 0
    while rest:
        written = os.pwrite(file, rest, position)
        rest, position = rest[written:], position + written


def _read_number(file: int) -> int | None:
    text = os.pread(file, 32, 0)
    return int(text) if re.fullmatch(rb"\d+\n", text) else None


def _write_number(file: int, number: int) -> None:
    os.ftruncate(file, 0)
    os.pwrite(file, b"%d\n" % number, 0)


def _folders(cache: str) -> Iterator[str]:
    """The folders of single files, over all locations."""
    for home in _entries(cache):
        if _FOLDER.fullmatch(home.name):
            yield from (entry.path for entry in _entries(home.path))


def _entries(folder: str) -> list[os.DirEntry]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError:
        return []
