"""The cache of a node: many processes, little room, kills, damage, full disks."""

import errno
import fcntl
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from http_server import HttpServer
from processes import wait_until

from megatron_owl2.data.storage import StorageOptions, open_storage
from megatron_owl2.data.storage.cache import RangeCache
from megatron_owl2.data.storage.runtime import Runtime
from megatron_owl2.errors import StorageError

pytestmark = pytest.mark.slow

SIZE = 10_000  # of an extent
DATA = np.random.default_rng(0).bytes(40 * SIZE)
FORK = multiprocessing.get_context("fork")


@pytest.fixture
def server(tmp_path):
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / "a.tar").write_bytes(DATA)
    with HttpServer(folder) as server:
        yield server


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def opened(server, cache, **options):
    options = {"backoff": 0.001, "attempts": 3, "timeout": 5.0} | options
    return open_storage(server.url, StorageOptions(cache=str(cache), **options))


def read(storage, index: int) -> None:
    """Reads the middle of extent `index` and checks it."""
    start = index * SIZE
    data = storage.read("a.tar", start + 100, start + 200, (start, start + SIZE))
    assert data == DATA[start + 100 : start + 200]


def cached(cache: Path) -> list[int]:
    """The extents in the cache."""
    return sorted(int(path.name.split("-")[0]) // SIZE for path in cache.glob("*/a.tar/*[0-9]"))


def used(cache: Path) -> int:
    total = 0
    for path in cache.glob("*/*/*"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue
    return total


def run_processes(work, count: int) -> list:
    processes = [FORK.Process(target=work, args=(seed,)) for seed in range(count)]
    for process in processes:
        process.start()
    return processes


def join(processes) -> None:
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * len(processes)


def test_every_extent_travels_once_per_node(server, cache):
    storage = opened(server, cache)
    server.fail("hold")

    def work(seed: int) -> None:
        order = np.random.default_rng(seed).permutation(12).tolist()
        for index in order[::-1]:
            storage.prefetch("a.tar", index * SIZE, (index + 1) * SIZE)
        for index in order:
            read(storage, index)
        assert storage.counters["cache_failures"] == 0

    processes = run_processes(work, 5)
    wait_until(lambda: len(server.ranges()) >= 4)
    server.release()
    join(processes)
    assert sorted(server.ranges()) == [(i * SIZE, (i + 1) * SIZE) for i in range(12)]
    assert cached(cache) == list(range(12))
    assert list(cache.glob("*/*/*.part")) == []
    assert (cache / ".usage").read_bytes() == b"%d\n" % (12 * SIZE)


def test_the_cache_stays_in_its_bounds_while_many_read_from_it(server, cache):
    storage = opened(server, cache, cache_bytes=12 * SIZE)

    def work(seed: int) -> None:
        for index in np.random.default_rng(seed).integers(0, 40, 120).tolist():
            storage.prefetch("a.tar", index * SIZE, (index + 1) * SIZE)
            read(storage, index)
        storage.close()

    processes = run_processes(work, 4)
    most = 0
    while any(process.is_alive() for process in processes):
        most = max(most, used(cache))
        time.sleep(0.002)
    join(processes)
    assert 6 * SIZE < most <= 12 * SIZE
    assert used(cache) <= int((cache / ".usage").read_bytes())
    assert len(server.ranges()) > 40  # evicted ranges came again


def test_the_least_recently_read_goes_first(server, cache):
    storage = opened(server, cache, cache_bytes=10 * SIZE)
    for index in range(10):
        read(storage, index)
    for index in (0, 3, 5):
        time.sleep(0.01)  # file times are as coarse as the kernel's clock
        read(storage, index)
    read(storage, 30)
    kept = cached(cache)
    assert {0, 3, 5, 30} <= set(kept) and not {1, 2} & set(kept)
    assert len(kept) == 9 and len(server.ranges()) == 11


def test_a_killed_download_is_taken_over_and_leaves_nothing(server, cache):
    server.fail("hang")
    storage = opened(server, cache)
    processes = run_processes(lambda index: read(storage, index), 2)
    wait_until(lambda: len(list(cache.glob("*/*/*.part"))) == 2 and len(server.ranges()) == 2)
    assert used(cache) == 2 * SIZE  # the place is taken from the start
    for process in processes:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    server.heal()
    read(storage, 0)
    assert server.ranges()[2:] == [(0, SIZE)]  # at once, and not past the cache as after a wait
    assert cached(cache) == [0] and list(cache.glob("*/*/*.part")) == []
    assert (cache / ".usage").read_bytes() == b"%d\n" % SIZE


def test_who_waits_for_a_killed_process_takes_over(server, cache):
    server.fail("hang", times=1)
    storage = opened(server, cache, timeout=30.0)
    (process,) = run_processes(lambda seed: read(storage, 0), 1)
    wait_until(server.ranges)
    waiting = threading.Thread(target=read, args=(storage, 0))
    waiting.start()
    waiting.join(0.3)
    assert waiting.is_alive() and len(server.ranges()) == 1
    os.kill(process.pid, signal.SIGKILL)
    waiting.join(20)
    assert not waiting.is_alive() and cached(cache) == [0]
    process.join()


def test_who_waits_for_a_stopped_process_reads_past_it_in_the_end(server, cache):
    server.fail("hang", times=1)
    storage = opened(server, cache, timeout=2.0, attempts=1)
    (process,) = run_processes(lambda seed: read(opened(server, cache, timeout=60.0), 0), 1)
    wait_until(server.ranges)
    os.kill(process.pid, signal.SIGSTOP)
    try:
        began = time.monotonic()
        with pytest.warns(UserWarning, match="holds its lock for too long"):
            read(storage, 0)
        assert 0.5 < time.monotonic() - began < 3 * storage.options.patience + 1
        assert server.ranges()[-1] == (100, 200)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.join()


def test_a_failed_download_leaves_nothing(server, cache):
    storage = opened(server, cache)
    server.fail("reset")
    with pytest.raises(StorageError):
        read(storage, 0)
    assert used(cache) == 0 and list(cache.glob("*/*/*")) == []


@pytest.mark.parametrize("size", [0, SIZE - 1, SIZE + 1])
def test_a_range_of_the_wrong_size_is_fetched_again(server, cache, size):
    storage = opened(server, cache)
    read(storage, 0)
    (path,) = cache.glob("*/a.tar/*")
    os.truncate(path, size)
    read(storage, 0)
    assert path.stat().st_size == SIZE and len(server.ranges()) == 2


def test_a_range_that_its_reader_found_damaged_is_fetched_again_once_dropped(server, cache):
    storage = opened(server, cache)
    server.fail("flip", times=1)
    ask = "a.tar", SIZE - 10, SIZE, (0, SIZE)
    assert storage.read(*ask) != DATA[SIZE - 10 : SIZE]
    assert storage.read(*ask) != DATA[SIZE - 10 : SIZE]
    storage.drop("a.tar", 0, SIZE)
    assert storage.read(*ask) == DATA[SIZE - 10 : SIZE]
    assert len(server.ranges()) == 2


def test_a_full_disk_is_read_past_with_one_warning(server, cache, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    storage = opened(server, cache)
    with pytest.warns(UserWarning, match="No space left on device.* is read without it") as caught:
        for index in range(5):
            read(storage, index)
    assert len(caught) == 1
    assert storage.counters["cache_failures"] == 1  # the disk is left alone for a while
    assert server.ranges() == [(i * SIZE + 100, i * SIZE + 200) for i in range(5)]
    assert used(cache) == 0


def test_a_disk_smaller_than_the_cache_holds_what_it_can(server, cache, monkeypatch):
    real = os.posix_fallocate

    def small_disk(file, offset, size):
        if used(cache) + size > 5 * SIZE:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(file, offset, size)

    monkeypatch.setattr(os, "posix_fallocate", small_disk)
    storage = opened(server, cache)
    for index in range(12):
        read(storage, index)
        assert index in cached(cache) and used(cache) <= 5 * SIZE
    assert storage.counters["cache_failures"] == 0 and len(cached(cache)) >= 4


def test_a_disk_that_fails_while_written_to_costs_one_more_request(server, cache, monkeypatch):
    storage = opened(server, cache)
    read(storage, 1)

    def broken(*arguments):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pwrite", broken)
    with pytest.warns(UserWarning, match="Input/output error"):
        read(storage, 0)
    monkeypatch.undo()
    assert storage.counters["cache_failures"] == 1 and cached(cache) == [1]


def test_a_cache_that_cannot_be_written_is_read_past(server, cache):
    cache.write_text("a file where the folder should be")
    storage = opened(server, cache)
    with pytest.warns(UserWarning, match="cannot be used"):
        read(storage, 0)
    read(storage, 1)
    assert cache.read_text() == "a file where the folder should be"


def test_a_range_that_can_be_neither_read_nor_removed_is_read_past(server, cache):
    storage = opened(server, cache)
    read(storage, 0)
    (path,) = cache.glob("*/a.tar/*")
    path.unlink()
    path.mkdir()
    began = time.monotonic()
    read(storage, 0)
    assert time.monotonic() - began < storage.options.patience / 2
    assert server.ranges()[-1] == (100, 200)


def test_an_extent_larger_than_the_cache_is_read_past(server, cache):
    storage = opened(server, cache, cache_bytes=SIZE - 1)
    with pytest.warns(UserWarning, match="do not fit"):
        read(storage, 0)
    assert server.ranges() == [(100, 200)] and used(cache) == 0


def test_other_files_in_the_folder_are_never_touched(server, cache):
    strange = ["thesis.pdf", "0-10000", "photos/2020-2021", "photos/a.tar/0-10000", "a/b/5-6.part"]
    strange += [f"{'0' * 32}/a.tar/notes.part", f"{'0' * 32}/a.tar/0-notes", f"{'0' * 32}/0-5"]
    for name in strange:
        (cache / name).parent.mkdir(parents=True, exist_ok=True)
        (cache / name).write_bytes(bytes(SIZE))
    storage = opened(server, cache, cache_bytes=2 * SIZE)
    for index in range(6):
        read(storage, index)
    assert all((cache / name).stat().st_size == SIZE for name in strange)
    assert cached(cache)[-1] == 5 and len(cached(cache)) <= 3  # photos/a.tar/0-10000 is seen too


def test_two_locations_share_a_cache_without_mixing(server, cache, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "a.tar").write_bytes(DATA[::-1])
    with HttpServer(other) as second:
        storages = opened(server, cache), opened(second, cache)
        for _ in range(2):
            for storage, data in zip(storages, (DATA, DATA[::-1]), strict=True):
                assert storage.read("a.tar", 5, 50, (0, SIZE)) == data[5:50]
    assert len(cached(cache)) == 2


@pytest.mark.parametrize("name", ["..", "../../b", "x/y", "", "/tmp"])
def test_names_do_not_lead_out_of_the_cache(server, cache, tmp_path, name):
    storage = opened(server, cache)
    read(storage, 0)  # the folders that the names climb from are there
    victim = tmp_path / "b" / "0-10"
    victim.parent.mkdir()
    victim.write_bytes(b"precious")
    for call in (
        lambda: storage.read(name, 0, 10, (0, 10)),
        lambda: storage.drop(name, 0, 10),
    ):
        with pytest.raises(StorageError, match="not a plain file name"):
            call()
    assert victim.read_bytes() == b"precious" and len(server.requests) == 1


def test_a_part_that_was_finished_and_evicted_before_it_was_locked_is_not_written_to(cache):
    first, second = (RangeCache(str(cache), "x", 10 * SIZE) for _ in range(2))
    first.fill("b.tar", (0, 1), lambda: b"1", patience=5)
    second.fill("b.tar", (0, 1), lambda: b"1", patience=5)
    real = fcntl.flock
    with pytest.MonkeyPatch.context() as patch:

        def slow_flock(file, operation):
            patch.setattr(fcntl, "flock", real)
            assert os.readlink(f"/proc/self/fd/{file}").endswith("/a.tar/0-10000.part")
            assert second.fill("a.tar", (0, SIZE), lambda: DATA[:SIZE], patience=5) == DATA[:SIZE]
            second.drop("a.tar", (0, SIZE))
            real(file, operation)

        patch.setattr(fcntl, "flock", slow_flock)
        assert first.fill("a.tar", (0, SIZE), lambda: DATA[:SIZE], patience=5) == DATA[:SIZE]
    assert first.read("a.tar", (0, SIZE), 5, 50) == DATA[5:50]


def test_a_child_forked_under_a_lock_does_not_keep_it(cache):
    ranges = RangeCache(str(cache), "x", 10 * SIZE)
    ranges.fill("a.tar", (SIZE, 2 * SIZE), lambda: bytes(SIZE), patience=5)
    locked, real = [], fcntl.flock

    def flock_and_fork(file, operation):
        real(file, operation)
        if operation & fcntl.LOCK_EX and os.readlink(f"/proc/self/fd/{file}").endswith(".usage"):
            child = os.fork()
            if child == 0:
                time.sleep(20)
                os._exit(0)
            locked.append(child)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fcntl, "flock", flock_and_fork)
        ranges.fill("a.tar", (0, SIZE), lambda: bytes(SIZE), patience=5)
    try:
        assert len(locked) == 2
        assert ranges.fill("a.tar", (5, 6), lambda: b"1", patience=0.5) == b"1"
    finally:
        for child in locked:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def test_processes_that_start_together_look_for_leftovers_once(cache, monkeypatch):
    sweeps, waiting = [], set()
    sweep = RangeCache._sweep
    monkeypatch.setattr(RangeCache, "_sweep", lambda self, to: sweeps.append(to) or sweep(self, to))

    class Watched(Runtime):
        def sleep(self, seconds):
            waiting.add(threading.get_ident())
            super().sleep(seconds)

    def start(number):
        own = RangeCache(str(cache), "x", 10**6, Watched())
        own.fill("a.tar", (number, number + 1), lambda: b"x", patience=60)

    cache.mkdir()
    threads = [threading.Thread(target=start, args=[number]) for number in range(8)]
    with open(cache / ".usage", "w") as usage:
        fcntl.flock(usage, fcntl.LOCK_EX)
        for thread in threads:
            thread.start()
        wait_until(lambda: len(waiting) == 8)
    for thread in threads:
        thread.join()
    assert len(sweeps) == 1 and (cache / ".usage").read_bytes() == b"8\n"
    start(9)  # later, when there may be leftovers again
    assert len(sweeps) == 2
