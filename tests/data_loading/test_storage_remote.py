"""Storage behind a real web server that is slow, fails, lies or hangs."""

import gc
import multiprocessing
import os
import threading
import time

import numpy as np
import pytest
from http_server import HttpServer
from processes import wait_until
from torch.utils.data import DataLoader

from megatron_owl2.data.shards.dataset import ShardedDataset
from megatron_owl2.data.storage import StorageOptions, open_storage
from megatron_owl2.errors import StorageError, StorageMissing

pytestmark = pytest.mark.slow

DATA = np.random.default_rng(0).bytes(200_000)
EXTENT = (1000, 5000)


@pytest.fixture
def server(tmp_path):
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / "a.tar").write_bytes(DATA)
    with HttpServer(folder) as server:
        yield server


def opened(server, tmp_path=None, **options):
    options = {"backoff": 0.001, "attempts": 4, "timeout": 5.0} | options
    if tmp_path is not None:
        options["cache"] = str(tmp_path / "cache")
    return open_storage(server.url, StorageOptions(**options))


def test_whole_files_sizes_and_ranges(server):
    (server.folder / "b #1?.tar").write_bytes(b"other")
    storage = opened(server)
    assert storage.size("a.tar") == len(DATA)
    assert storage.read_file("a.tar") == DATA
    assert storage.read("a.tar", 1234, 2345, EXTENT) == DATA[1234:2345]
    assert storage.read("b #1?.tar", 1, 5) == b"ther"
    assert storage.counters["retries"] == 0


def test_a_size_is_asked_once_for_a_node_until_it_is_found_wrong(server, tmp_path):
    def sizes():
        return [opened(server, tmp_path).size("a.tar") for _ in range(2)]

    def asked():
        return sum(method == "HEAD" for method, _, _ in server.requests)

    assert sizes() == [len(DATA)] * 2 and asked() == 1
    (server.folder / "a.tar").write_bytes(DATA[:-1])
    assert sizes() == [len(DATA)] * 2 and asked() == 1
    opened(server, tmp_path).forget_size("a.tar")
    assert sizes() == [len(DATA) - 1] * 2 and asked() == 2
    (entry,) = (tmp_path / "cache").glob("*/a.tar.size/*")
    entry.write_bytes(bytes(20))
    assert sizes() == [len(DATA) - 1] * 2 and asked() == 4  # one for the damage, one to keep


def test_without_a_cache_only_the_bytes_themselves_travel(server):
    storage = opened(server)
    storage.prefetch("a.tar", *EXTENT)
    for _ in range(2):
        assert storage.read("a.tar", 1234, 2345, EXTENT) == DATA[1234:2345]
    assert server.ranges() == [(1234, 2345)] * 2
    assert storage.counters["bytes_fetched"] == storage.counters["bytes_read"] == 2 * 1111


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("kind", [500, 503, 429, "hang", "reset", "short"])
def test_a_fault_that_passes_is_tried_again(server, tmp_path, kind, cached):
    timeout = 1.0 if kind == "hang" else 10.0
    storage = opened(server, tmp_path if cached else None, timeout=timeout)
    server.fail(kind, times=3)
    assert storage.read("a.tar", 2000, 3000, EXTENT) == DATA[2000:3000]
    assert storage.counters["retries"] == 3 and storage.counters["requests"] == 4
    assert server.ranges() == [EXTENT if cached else (2000, 3000)] * 4


@pytest.mark.parametrize("kind", [500, 503, "hang", "reset", "short"])
def test_a_fault_that_stays_ends_in_time_in_an_error_that_says_everything(server, tmp_path, kind):
    storage = opened(server, tmp_path, timeout=0.5 if kind == "hang" else 5.0)
    server.fail(kind)
    began = time.monotonic()
    with pytest.raises(StorageError) as caught:
        storage.read("a.tar", 2000, 3000, EXTENT)
    assert time.monotonic() - began < storage.options.patience + 2
    assert len(server.ranges()) == 4
    for part in (f"{server.url}/a.tar", "bytes 1000 to 5000", "4 attempts", "the last: "):
        assert part in str(caught.value)
    server.heal()
    assert storage.read("a.tar", 2000, 3000, EXTENT) == DATA[2000:3000]


@pytest.mark.parametrize("kind", [401, 403, 404, "in full", "elsewhere"])
def test_a_refusal_is_tried_only_a_little(server, kind):
    storage = opened(server)
    server.fail(kind)
    with pytest.raises(StorageError) as caught:
        storage.read("a.tar", 2000, 3000)
    assert (type(caught.value) is StorageMissing) == (kind == 404)
    assert len(server.ranges()) == 2
    if isinstance(kind, str):
        assert "must support range requests" in str(caught.value)


def test_a_server_that_ignores_ranges_is_refused_before_it_sends_gigabytes(server):
    with (server.folder / "big.tar").open("wb") as file:
        file.truncate(300_000_000)
    storage = opened(server, timeout=60.0)
    server.fail("in full")
    began = time.process_time()
    with pytest.raises(StorageError, match="answered 200 in full"):
        storage.read("big.tar", 0, 10)
    received = server.sent["big.tar"]
    assert received < 100_000_000, f"{received} bytes were sent"
    assert time.process_time() - began < 20


def test_missing_files_are_told_apart_from_failing_servers(server):
    storage = opened(server)
    for ask in (storage.size, storage.read_file, lambda name: storage.read(name, 0, 1)):
        with pytest.raises(StorageMissing, match="no.tar"):
            ask("no.tar")
    server.fail(503)
    with pytest.raises(StorageError) as caught:
        storage.read_file("a.tar")
    assert not isinstance(caught.value, StorageMissing)


def test_a_server_that_is_gone_does_not_look_like_a_missing_file(tmp_path):
    with HttpServer(tmp_path) as server:
        storage = opened(server)
    for ask in (storage.size, storage.read_file, lambda name: storage.read(name, 0, 1)):
        with pytest.raises(StorageError, match="4 attempts") as caught:
            ask("a.tar")
        assert not isinstance(caught.value, StorageMissing)


def test_a_file_that_lost_its_end_says_where(server):
    with pytest.raises(StorageError, match="bytes 199000 to 201000.*ended at byte 200000"):
        opened(server).read("a.tar", 199_000, 201_000)
    with pytest.raises(StorageError, match="416"):
        opened(server).read("a.tar", 300_000, 300_010)


def test_look_ahead_does_not_block_and_leaves_nothing_to_wait_for(server, tmp_path):
    storage = opened(server, tmp_path, prefetch_threads=4)
    extents = [(i * 10_000, (i + 1) * 10_000) for i in range(12)]
    server.fail("hold")
    for extent in extents:
        for _ in range(3):  # once for every sample of the extent
            storage.prefetch("a.tar", *extent)
    wait_until(lambda: server.most_at_once == 4)
    assert storage.counters["bytes_fetched"] == 0
    server.release()
    wait_until(lambda: storage.counters["bytes_fetched"] == 120_000)
    wait_until(lambda: len(list((tmp_path / "cache").glob("*/a.tar/*[0-9]"))) == 12)
    assert server.most_at_once == 4
    for start, stop in extents:
        assert (
            storage.read("a.tar", start + 5, stop - 5, (start, stop)) == DATA[start + 5 : stop - 5]
        )
    assert storage.counters["cache_misses"] == 0 and storage.counters["cache_hits"] == 12
    assert sorted(server.ranges()) == extents


def test_a_reader_waits_for_a_look_ahead_under_way_instead_of_asking_again(server, tmp_path):
    storage = opened(server, tmp_path)
    server.fail("hold")
    storage.prefetch("a.tar", *EXTENT)
    wait_until(server.ranges)
    read = []
    ask = ("a.tar", 2000, 3000, EXTENT)
    reader = threading.Thread(target=lambda: read.append(storage.read(*ask)))
    reader.start()
    reader.join(0.3)
    assert reader.is_alive()
    server.release()
    reader.join(20)
    assert read == [DATA[2000:3000]] and server.ranges() == [EXTENT]


def test_a_look_ahead_that_fails_is_counted_and_met_by_the_reader(server, tmp_path):
    storage = opened(server, tmp_path)
    server.fail(503)
    storage.prefetch("a.tar", *EXTENT)
    storage.prefetch("../a.tar", *EXTENT)
    wait_until(lambda: storage.counters["prefetch_failures"] == 2)
    with pytest.raises(StorageError, match="503"):
        storage.read("a.tar", 2000, 3000, EXTENT)
    server.heal()
    storage.prefetch("a.tar", *EXTENT)
    wait_until(lambda: storage.counters["bytes_fetched"] == 4000)


def test_closing_ends_the_threads_and_forgets_what_waits(server, tmp_path):
    before = set(threading.enumerate())

    def look_ahead_threads() -> list[threading.Thread]:
        return [t for t in set(threading.enumerate()) - before if t.name == "look-ahead"]

    storage = opened(server, tmp_path, prefetch_threads=2)
    server.fail("hold")
    for index in range(20):
        storage.prefetch("a.tar", index * 1000, (index + 1) * 1000)
    wait_until(lambda: len(server.ranges()) == 2)
    assert len(look_ahead_threads()) == 2
    storage.close()
    server.release()
    wait_until(lambda: not look_ahead_threads())
    assert len(server.ranges()) == 2
    server.heal()
    storage.prefetch("a.tar", *EXTENT)
    wait_until(lambda: storage.counters["bytes_fetched"] == 6000)


def test_forked_children_and_their_parent_do_not_disturb_each_other(server):
    """A child that closes an inherited client would unregister the parent's sockets."""
    storage = opened(server, timeout=3.0)

    def reads() -> bool:
        spans = [(i * 100, i * 100 + 50) for i in range(20)]
        return all(storage.read("a.tar", a, b) == DATA[a:b] for a, b in spans)

    assert reads()
    children = []
    for _ in range(3):
        child = os.fork()
        if child == 0:
            good = reads() and storage.counters["reads"] == 20
            del storage
            gc.collect()
            os._exit(0 if good else 1)
        children.append(child)
    assert reads()
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    assert reads()
    assert storage.counters["retries"] == 0


class _Ranges(ShardedDataset):
    def __init__(self, storage):
        self.storage = storage

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> bytes:
        extent = (index // 8 * 8000, index // 8 * 8000 + 8000)
        if extent[1] < 40_000:  # a look-ahead that nobody waits for may end with its process
            self.storage.prefetch("a.tar", *(place + 8000 for place in extent))
        return self.storage.read("a.tar", index * 1000, index * 1000 + 1000, extent)


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_data_workers_use_what_their_parent_opened(server, tmp_path, context):
    storage = opened(server, tmp_path)
    storage.read_file("a.tar")
    loader = DataLoader(
        _Ranges(storage), batch_size=None, num_workers=2, multiprocessing_context=context
    )
    assert b"".join(loader) == DATA[:40_000]
    ranges = [r for r in server.ranges() if r]
    assert sorted(ranges) == [(i * 8000, i * 8000 + 8000) for i in range(5)]
    assert multiprocessing.active_children() == []


def test_a_worker_with_a_hanging_look_ahead_can_still_end(server, tmp_path):
    storage = opened(server, tmp_path, timeout=600.0)
    process = multiprocessing.get_context("fork").Process(
        target=storage.prefetch, args=("a.tar", *EXTENT)
    )
    server.fail("hang")
    process.start()
    process.join(20)
    assert process.exitcode == 0


def test_file_systems_without_an_event_loop(tmp_path):
    import fsspec

    fsspec.filesystem("memory").pipe_file("/set/a.tar", DATA)
    storage = open_storage("memory://set", StorageOptions(cache=str(tmp_path), backoff=0.001))
    assert storage.size("a.tar") == len(DATA)
    assert storage.read_file("a.tar") == DATA
    assert storage.read("a.tar", 2000, 3000, EXTENT) == DATA[2000:3000]
    assert storage.read("a.tar", 1000, 2000, EXTENT) == DATA[1000:2000]
    assert storage.counters["cache_hits"] == 1
    with pytest.raises(StorageMissing):
        storage.read_file("b.tar")
