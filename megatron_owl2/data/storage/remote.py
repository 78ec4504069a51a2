"""Storage behind a network: range requests through fsspec, a cache on the node, prefetching."""

import os
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any
from urllib.parse import quote

import fsspec
from fsspec.asyn import AsyncFileSystem, sync
from fsspec.implementations.asyn_wrapper import AsyncFileSystemWrapper

from megatron_owl2.data.storage.base import (
    Process,
    ShortReadError,
    Storage,
    StorageOptions,
    check_name,
)
from megatron_owl2.data.storage.cache import CacheError, RangeCache
from megatron_owl2.data.storage.runtime import Runtime
from megatron_owl2.errors import StorageError

CACHE_PAUSE = 60.0  # seconds without new ranges after the cache disk was full or broken
_SIZE, _DIGITS = ".size", 20  # entry of the cache that holds how large a file is
_Fetch = Callable[[int, int], bytes]
_LASTING_STATUS = {401, 403, 404, 405, 410, 416}  # HTTP answers that will be the same again

# One client, with its connections, per process, protocol and time limit. Never emptied: closing a
# client that a forked child inherited takes the parent's sockets out of the epoll set they share.
_clients: dict[tuple[int, str, float], AsyncFileSystem] = {}


class RangeRefusedError(OSError):
    """The server does not send the range it was asked for."""

    lasting = True


class RemoteStorage(Storage):
    """A location that fsspec knows, read in ranges; `options.cache` names the cache on this node.

    Without a cache, and while its disk is full, every read fetches its own bytes and prefetch does
    nothing. Raises StorageError if the client of the protocol is unknown or not installed.
    """

    def __init__(self, location: str, options: StorageOptions, runtime: Runtime | None = None):
        super().__init__(location, options, runtime)
        self._protocol = location.split("://")[0]
        try:
            fsspec.get_filesystem_class(self._protocol)
        except (ImportError, ValueError) as error:
            raise StorageError(
                f"{location} cannot be read: {error}; HTTP and S3 come with "
                "pip install megatron-owl2[remote]"
            ) from error
        self._cache = None
        if options.cache:
            self._cache = RangeCache(options.cache, location, options.cache_bytes, self.runtime)

    def read_file(self, name: str) -> bytes:
        data = self._persist(name, "the file", lambda: self._request("_cat_file", name))
        self._here().add(bytes_fetched=len(data))
        return data

    def size(self, name: str) -> int:
        entry, extent = name + _SIZE, (0, _DIGITS)
        text = self._cached(entry, *extent, extent, lambda *_: self._ask_size(name))
        if not text.isdigit():  # what lies in a cache may have been damaged there
            self.forget_size(name)
            text = self._ask_size(name)
        return int(text)

    def forget_size(self, name: str) -> None:
        self.drop(name + _SIZE, 0, _DIGITS)

    def read(
        self, name: str, start: int, stop: int, extent: tuple[int, int] | None = None
    ) -> bytes:
        began = self.runtime.monotonic()
        data = self._cached(name, start, stop, extent or (start, stop), partial(self._fetch, name))
        self._here().add_read(len(data), 0, self.runtime.monotonic() - began)
        return data

    def prefetch(self, name: str, start: int, stop: int) -> None:
        if self._cache is not None:
            self._here().prefetch((name, start, stop), self.options.prefetch_threads, self._fill)

    def drop(self, name: str, start: int, stop: int) -> None:
        check_name(self.location, name)
        if self._cache is not None:
            self._cache.drop(name, (start, stop))

    def close(self) -> None:
        self._here().stop_prefetching()

    def _cached(
        self, name: str, start: int, stop: int, extent: tuple[int, int], fetch: _Fetch
    ) -> bytes:
        """The bytes from `start` to `stop`, of an extent of the cache where there is one; `fetch`
        brings those of a range."""
        check_name(self.location, name)
        data = None
        if self._cache is not None:
            data = self._cache.read(name, extent, start, stop)
        if data is not None:
            self._here().add(cache_hits=1)
            return data
        self._here().add(cache_misses=1)
        cache = self._usable_cache()
        for _ in range(2):
            if cache is None:
                break
            data = self._fill(name, *extent, fetch)
            if data is not None:
                return data[start - extent[0] : stop - extent[0]]
            # Another process or thread brought it; where the cache is tight it may be gone again.
            data = cache.read(name, extent, start, stop)
            if data is not None:
                return data
        return fetch(start, stop)

    def _fill(self, name: str, start: int, stop: int, fetch: _Fetch | None = None) -> bytes | None:
        """The extent if this call fetched it, now cached; None if it did not."""
        check_name(self.location, name)
        cache = self._usable_cache()
        if cache is None:
            return None
        here, fetch = self._here(), fetch or partial(self._fetch, name)
        try:
            return cache.fill(
                name, (start, stop), lambda: fetch(start, stop), self.options.patience
            )
        except CacheError as error:
            here.add(cache_failures=1)
            here.cache_resumes = self.runtime.monotonic() + CACHE_PAUSE
            if not here.warned:
                here.warned = True
                warnings.warn(f"{error}; {self.location} is read without it", stacklevel=2)
            return None

    def _usable_cache(self) -> RangeCache | None:
        """The cache, unless it could not take a range a moment ago."""
        return self._cache if self.runtime.monotonic() >= self._here().cache_resumes else None

    def _fetch(self, name: str, start: int, stop: int) -> bytes:
        def attempt() -> bytes:
            data = self._request("_cat_file", name, start=start, end=stop)
            if len(data) != stop - start:
                raise ShortReadError(f"the answer ended at byte {start + len(data)}")
            return data

        data = self._persist(name, f"bytes {start} to {stop}", attempt)
        self._here().add(bytes_fetched=len(data))
        return data

    def _ask_size(self, name: str) -> bytes:
        size = self._persist(name, "its size", lambda: self._request("_info", name))["size"]
        if size is None:
            raise StorageError(f"{self.location}/{name}: the server does not tell its size")
        return b"%0*d" % (_DIGITS, size)

    def _request(self, method: str, name: str, **arguments) -> Any:
        """One attempt within the time limit, through fsspec's event loop."""
        timeout = self.options.timeout
        client = _client(self._protocol, timeout)
        web = self._protocol in ("http", "https")
        url = f"{self.location}/{quote(name) if web else name}"
        try:
            path = client._strip_protocol(url)
            return sync(client.loop, getattr(client, method), path, timeout=timeout, **arguments)
        except TimeoutError:
            raise TimeoutError(f"no whole answer within {timeout:g} s") from None
        except FileNotFoundError as error:
            if web and error.__cause__ is not None:  # fsspec calls every failed size request so
                raise error.__cause__ from None
            raise

    def _is_lasting(self, error: Exception) -> bool:
        refused = getattr(error, "status", 0) in _LASTING_STATUS
        kinds = (FileNotFoundError, PermissionError, IsADirectoryError)
        return refused or isinstance(error, kinds) or super()._is_lasting(error)

    def _is_missing(self, error: Exception) -> bool:
        return super()._is_missing(error) or getattr(error, "status", 0) == 404

    def _new_process(self) -> "_RemoteProcess":
        return _RemoteProcess(self.runtime)

    def _here(self) -> "_RemoteProcess":
        here = super()._here()
        assert isinstance(here, _RemoteProcess)
        return here


class _RemoteProcess(Process):
    """Process state with the prefetching threads, daemons: a hanging server cannot hold up the
    exit."""

    def __init__(self, runtime: Runtime):
        super().__init__()
        self.cache_resumes = 0.0
        self.warned = False
        self._runtime = runtime
        self._jobs: Any = runtime.queue()
        self._pending: set[tuple[str, int, int]] = set()
        self._threads = 0

    def prefetch(self, job: tuple[str, int, int], max_threads: int, fill) -> None:
        with self.lock:
            if job in self._pending:
                return
            self._pending.add(job)
            starts = self._threads < min(max_threads, len(self._pending))
            self._threads += starts
            self._jobs.put(job)
            jobs = self._jobs
        if starts:
            self._runtime.start_thread("look-ahead", self._work, jobs, fill)

    def stop_prefetching(self) -> None:
        """Forget what waits; the threads end after what they do."""
        with self.lock:
            for _ in range(self._threads):
                self._jobs.put(None)
            self._jobs, self._threads, self._pending = self._runtime.queue(), 0, set()

    def _work(self, jobs: Any, fill) -> None:
        while (job := jobs.get()) is not None:
            if jobs is not self._jobs:
                continue
            try:
                fill(*job)
            except Exception:  # whoever needs the range meets the failure and reports it
                self.add(prefetch_failures=1)
            with self.lock:
                if jobs is self._jobs:
                    self._pending.discard(job)


def _client(protocol: str, timeout: float) -> AsyncFileSystem:
    key = os.getpid(), protocol, timeout
    if key not in _clients:
        _clients.setdefault(key, _new_client(protocol, timeout))
    return _clients[key]


def _new_client(protocol: str, timeout: float) -> AsyncFileSystem:
    options = {}
    if protocol in ("http", "https"):
        import aiohttp

        options["client_kwargs"] = {
            "headers": {"Accept-Encoding": "identity"},  # ranges count the bytes of the file
            "raise_for_status": _check_range,
            "timeout": aiohttp.ClientTimeout(total=timeout),
        }
    client = fsspec.filesystem(protocol, skip_instance_cache=True, **options)
    return client if client.async_impl else AsyncFileSystemWrapper(client, asynchronous=False)


async def _check_range(response) -> None:
    """Refuse an answer with other bytes before its body, perhaps gigabytes, is read."""
    asked = response.request_info.headers.get("Range", "")
    if not asked or response.status >= 400:
        return
    answered = response.headers.get("Content-Range", "")
    start = asked.removeprefix("bytes=").split("-")[0]
    if response.status != 206 or not answered.startswith(f"bytes {start}-"):
        response.close()
        raise RangeRefusedError(
            f"asked for {asked}, the server answered {response.status} {answered or 'in full'}; "
            "it must support range requests (nginx, S3 and the like do; python -m http.server does "
            "not)"
        )
