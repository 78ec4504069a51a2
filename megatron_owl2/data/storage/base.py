"""Interface of a storage, with options, bounded attempts and counts that all storages share."""

import errno
import os
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from megatron_owl2.data.storage.runtime import Runtime
from megatron_owl2.errors import StorageError, StorageMissing

MAX_BACKOFF = 30.0  # seconds between two attempts
LASTING_ATTEMPTS = 2  # for a missing file, a refusal: shared file systems and proxies blink
COUNTERS = (
    "reads",
    "bytes_read",  # handed to the caller
    "requests",  # attempts on the network or the file system
    "retries",
    "bytes_fetched",  # over the network
    "cache_hits",
    "cache_misses",  # reads that had to wait for the network
    "cache_failures",  # fetches that a full or broken cache disk did not take
    "prefetch_failures",
    "seconds_waited",  # inside reads
)
_LASTING_ERRNO = {
    errno.ENOENT,
    errno.EACCES,
    errno.EPERM,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
}
_T = TypeVar("_T")


class ShortReadError(OSError):
    """Fewer bytes than asked for; `lasting` if the file itself ends there."""

    def __init__(self, message: str, lasting: bool = False):
        super().__init__(message)
        self.lasting = lasting


@dataclass(frozen=True)
class StorageOptions:
    """Options of reading shards; raises ValueError for a value that cannot work.

    `cache` is a folder on a disk of this node, of which `cache_bytes` are used at most; without one
    every remote sample is a request of its own. `timeout` is in seconds for one request, `backoff`
    in seconds before the second attempt and doubles from then on.
    """

    cache: str = ""
    cache_bytes: int = 50 * 2**30
    attempts: int = 6
    timeout: float = 60.0
    backoff: float = 0.5
    prefetch_threads: int = 4

    def __post_init__(self):
        for name in ("cache_bytes", "attempts", "timeout", "prefetch_threads"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive")
        if not self.backoff >= 0:
            raise ValueError(f"backoff is {self.backoff}; it cannot be negative")

    @property
    def patience(self) -> float:
        """The most seconds that all attempts of one request take together."""
        delays = (self.delay(attempt) for attempt in range(1, self.attempts))
        return self.attempts * self.timeout + sum(delays)

    def delay(self, attempt: int) -> float:
        """Seconds after attempt number `attempt` (from 1), before jitter shortens them."""
        return min(self.backoff * 2.0 ** min(attempt - 1, 32), MAX_BACKOFF)


class Storage:
    """One folder of shards; safe to pickle and to use in forked processes and several threads.

    A subclass says what an attempt is; every public method raises StorageError when attempts do
    not help and StorageMissing when there is no such file. A read also waits for the process that
    fetches the same range already, so it ends after at most thrice `options.patience`.
    """

    def __init__(self, location: str, options: StorageOptions, runtime: Runtime | None = None):
        self.location = location
        self.options = options
        self.runtime = runtime or Runtime()
        self._processes: dict[int, Process] = {}

    def read_file(self, name: str) -> bytes:
        """A whole small file, such as a manifest or an index."""
        raise NotImplementedError

    def size(self, name: str) -> int:
        """Bytes of a file. A remote storage with a cache asks once for all processes of a node."""
        raise NotImplementedError

    def forget_size(self, name: str) -> None:
        """Forget a cached size, which may be that of an older file."""

    def read(
        self, name: str, start: int, stop: int, extent: tuple[int, int] | None = None
    ) -> bytes:
        """Exactly the bytes from `start` up to `stop`.

        A remote storage with a cache fetches and keeps the whole `extent` around them at once.
        """
        raise NotImplementedError

    def prefetch(self, name: str, start: int, stop: int) -> None:
        """Start to bring an extent into the cache; returns at once and never raises."""

    def drop(self, name: str, start: int, stop: int) -> None:
        """Forget a cached extent that proved damaged, so that the next read fetches it again."""

    def close(self) -> None:
        """Let go of files and threads; the storage can be used again afterwards."""

    @property
    def counters(self) -> dict[str, float]:
        """Counts of this process so far, by the names of COUNTERS."""
        return self._here().counters

    def __getstate__(self) -> dict:
        return {"location": self.location, "options": self.options, "runtime": self.runtime}

    def __setstate__(self, state: dict) -> None:
        self.__init__(**state)

    def _here(self) -> "Process":
        """State that must not be shared with a forked child: counts, locks, random numbers."""
        here = self._processes.get(os.getpid())
        return here or self._processes.setdefault(os.getpid(), self._new_process())

    def _new_process(self) -> "Process":
        return Process()

    def _is_lasting(self, error: Exception) -> bool:
        """Whether another attempt will hardly help."""
        return getattr(error, "lasting", False) or (
            isinstance(error, OSError) and error.errno in _LASTING_ERRNO
        )

    def _is_missing(self, error: Exception) -> bool:
        return isinstance(error, FileNotFoundError)

    def _persist(self, name: str, what: str, attempt: Callable[[], _T]) -> _T:
        """The result of `attempt`, called again while that may help; StorageError then."""
        here, began, number = self._here(), self.runtime.monotonic(), 0
        check_name(self.location, name)
        while True:
            number += 1
            here.add(requests=1)
            try:
                return attempt()
            except Exception as error:  # the clients of object stores raise many types
                lasting = self._is_lasting(error)
                allowed = self.options.attempts
                if number >= (min(LASTING_ATTEMPTS, allowed) if lasting else allowed):
                    raise self._failure(name, what, number, began, error) from error
            here.add(retries=1)
            # Its own generator: a retry must not move the random state that training depends on.
            self.runtime.sleep(self.options.delay(number) * here.random.uniform(0.5, 1.0))

    def _failure(self, name, what, attempts, began, error: Exception) -> StorageError:
        missing = self._is_missing(error)
        if missing:
            advice = "check the location, or copy the missing file there"
        elif self._is_lasting(error):
            advice = "check the file, the address and the permission to read it"
        else:
            advice = "check the disk, network or server behind it, or give it more attempts or time"
        return (StorageMissing if missing else StorageError)(
            f"{self.location}/{name}: {what} cannot be read; "
            f"{attempts} attempts in {self.runtime.monotonic() - began:.1f} s, the last: "
            f"{type(error).__name__}: {error}; {advice}"
        )


class Process:
    """The part of a storage that belongs to one process."""

    def __init__(self):
        self.counters: dict[str, float] = dict.fromkeys(COUNTERS, 0)
        self.random = random.Random()
        self.lock = threading.Lock()

    def add(self, **amounts: float) -> None:
        with self.lock:
            for name, amount in amounts.items():
                self.counters[name] += amount

    def add_read(self, size: int, requests: int, seconds: float) -> None:
        counters = self.counters
        with self.lock:
            counters["reads"] += 1
            counters["bytes_read"] += size
            counters["requests"] += requests
            counters["seconds_waited"] += seconds


def check_name(location: str, name: str) -> None:
    """Raise StorageError for a name that could lead out of its folder or out of the cache."""
    if name in ("", ".", "..") or "/" in name or "\0" in name:
        raise StorageError(f"{location}: {name!r} is not a plain file name; mend the manifest")
