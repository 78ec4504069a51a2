"""Shards of a local or shared file system."""

import os
from collections import OrderedDict
from contextlib import suppress

from megatron_owl2.data.storage.base import ShortReadError, Storage, StorageOptions
from megatron_owl2.data.storage.runtime import Runtime

MAX_OPEN = 128  # descriptors of a LocalStorage


class LocalStorage(Storage):
    """A folder of a local or shared file system, read with pread from at most 128 open files.

    A fault of the file system is tried again on a newly opened file. A file system that blocks (a
    hard NFS mount whose server is gone) blocks the reader: no time limit reaches into the kernel.
    """

    def __init__(self, location: str, options: StorageOptions, runtime: Runtime | None = None):
        super().__init__(location, options, runtime)
        self._files: OrderedDict[str, _Descriptor] = OrderedDict()

    def read_file(self, name: str) -> bytes:
        def attempt() -> bytes:
            with open(self._path(name), "rb") as file:
                return file.read()

        return self._persist(name, "the file", attempt)

    def size(self, name: str) -> int:
        return self._persist(name, "its size", lambda: os.stat(self._path(name)).st_size)

    def read(
        self, name: str, start: int, stop: int, extent: tuple[int, int] | None = None
    ) -> bytes:
        began = self.runtime.monotonic()
        here = self._here()
        try:
            with here.lock:
                file = self._files[name]  # held until the end, or another thread may close it
                self._files.move_to_end(name)
            data = os.pread(file.number, stop - start, start)
        except (KeyError, OSError):
            data = b""
        if len(data) == stop - start:
            here.add_read(len(data), 1, self.runtime.monotonic() - began)
            return data
        data = self._persist(
            name, f"bytes {start} to {stop}", lambda: self._read(name, start, stop)
        )
        here.add_read(len(data), 0, self.runtime.monotonic() - began)
        return data

    def _read(self, name: str, start: int, stop: int) -> bytes:
        lock = self._here().lock
        with lock:
            self._files.pop(name, None)  # a handle that failed may be stale
        file = _Descriptor(self._path(name))
        with lock:
            self._files[name] = file
            while len(self._files) > MAX_OPEN:
                self._files.popitem(last=False)
        parts, position = [], start
        while position < stop:
            part = os.pread(file.number, stop - position, position)
            if not part:
                raise ShortReadError(f"the file ended at byte {position}", lasting=True)
            parts.append(part)
            position += len(part)
        return b"".join(parts)

    def close(self) -> None:
        with self._here().lock:
            self._files.clear()

    def _path(self, name: str) -> str:
        return os.path.join(self.location, name)


class _Descriptor:
    """An open file that is closed once no thread reads from it any more."""

    __slots__ = ("number",)

    def __init__(self, path: str):
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self):
        with suppress(AttributeError, OSError):
            os.close(self.number)
