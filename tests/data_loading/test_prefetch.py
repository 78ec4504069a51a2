"""Training from a web server: the same batches as from a folder, fetched ahead, once per node."""

import multiprocessing
import random
import shutil
import threading
import time

import pytest
from http_server import HttpServer
from processes import wait_until
from streams import config, loader, pairs, rows_of
from tiny_data import write

from megatron_owl2.config.schema import StorageConfig
from megatron_owl2.data.sampling import shuffle as order
from megatron_owl2.errors import StorageError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("remote") / "set", pairs("r", 400), samples_per_shard=100)


@pytest.fixture
def server(folder):
    with HttpServer(folder) as server:
        yield server


def over(server, cache, workers=0, **storage):
    values = dict(cache=str(cache), attempts=4, timeout=5.0) | storage
    return config(server.url, weights=(1,), workers=workers, storage=StorageConfig(**values))


@pytest.mark.parametrize("ranks, workers", [(1, 0), (1, 2), (2, 1)])
def test_batches_over_http_are_those_of_the_folder(folder, server, tmp_path, ranks, workers):
    expected = rows_of(loader(config(folder, weights=(1,)), micro=20, limit_samples=800))
    found = {}
    for rank in range(ranks):
        data = over(server, tmp_path / "cache", workers)
        found |= rows_of(loader(data, rank=rank, ranks=ranks, micro=20, limit_samples=800))
    assert found == expected
    # Two epochs, and every block crossed the wire once for all processes of the node.
    blocks = [r for name in range(4) for r in server.ranges(f"shard-{name:06d}.tar")]
    assert len(blocks) == 4
    asked = [name for method, name, _ in server.requests if method == "HEAD"]
    assert sorted(asked) == [f"shard-{name:06d}.tar" for name in range(4)]


def test_a_server_that_misbehaves_costs_retries_and_no_sample(folder, server, tmp_path):
    expected = rows_of(loader(config(folder, weights=(1,)), micro=20, limit_samples=400))
    for kind in (503, "reset", "short", "flip"):
        server.fail(kind, times=1, name=".tar")
    batches = list(loader(over(server, tmp_path / "cache"), micro=20, limit_samples=400))
    assert rows_of(batches) == expected
    assert sum(batch.bad for batch in batches) == 0
    assert sum(batch.measurements["read_retries"] for batch in batches) >= 1


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", [500, 404, "hang", "in full"])
def test_a_server_that_stays_broken_stops_the_run(server, tmp_path, kind, workers):
    server.fail(kind, name="shard-000002.tar")
    data = over(server, tmp_path / "cache", workers, attempts=2, timeout=3.0)
    start = time.monotonic()
    with pytest.raises(StorageError, match="shard-000002.tar"):
        list(loader(data, micro=20, limit_samples=400))
    assert time.monotonic() - start < 60
    assert multiprocessing.active_children() == []  # nothing is left to wait for


def test_the_next_shuffle_block_is_fetched_before_it_is_read(folder, tmp_path, monkeypatch):
    """When a stream enters a shuffle block, all of it and of the next is asked for."""
    for name, value in (("STREAMS", 2), ("BLOCK_SIZE", 10), ("SHUFFLE_BLOCK_SIZE", 50)):
        monkeypatch.setattr(order, name, value)
    monkeypatch.setattr("megatron_owl2.data.shards.dataset.BLOCK_SIZE", 10)
    monkeypatch.setattr(order.ShuffleOrder.__init__, "__defaults__", (2, 10, 50))
    with HttpServer(folder) as server:
        stream = loader(over(server, tmp_path / "cache"), micro=1)._dataset
        wanted = {
            block
            for sample_index in (0, 1)
            for first in (sample_index, stream.order.samples.next_shuffle_block(sample_index))
            for block in stream.order.samples.blocks(first)
        }
        stream[[0, 1]]
        tars = [f"shard-{i:06d}.tar" for i in range(4)]

        def fetched() -> int:
            return sum(len(set(server.ranges(name))) for name in tars)

        wait_until(lambda: fetched() == len(wanted))
        assert len(wanted) >= 20
        # Reading on within these shuffle blocks waits for nothing: the server may be gone.
        server.fail(500)
        sample_indices = list(range(2, 200))
        random.Random(0).shuffle(sample_indices)
        near = [s for s in sample_indices if stream.order.samples.shuffle_block(s)[2] == 0]
        assert len(near) > 90
        stream[near]


def test_a_cache_that_is_too_small_is_said(folder, server, tmp_path, caplog):
    size = sum(path.stat().st_size for path in folder.glob("*.tar"))
    for gib, said in ((1.0, False), (size / 2**31, True)):
        loader(over(server, tmp_path / "cache", cache_gib=gib))
        assert ("data.storage.cache_gib" in caplog.text) == said
        caplog.clear()


@pytest.mark.parametrize("suffix", [".idx", ".sums"])
def test_a_sidecar_that_is_damaged_on_the_way_is_fetched_again(server, tmp_path, suffix):
    server.fail("flip", times=1, name=suffix)
    batches = loader(over(server, tmp_path / "cache"), micro=20, limit_samples=400)
    assert sum(batch.bad for batch in batches) == 0


def test_a_data_set_made_anew_replaces_what_the_cache_holds(tmp_path):
    """The same names and sizes of sidecars, other bytes."""
    place = tmp_path / "set"
    write(place, pairs("old", 100), samples_per_shard=50)
    with HttpServer(place) as server:
        data = over(server, tmp_path / "cache")
        assert all(row[0][:3] == "old" for row in rows_of(loader(data, limit_samples=100)).values())
        shutil.rmtree(place)
        write(place, pairs("new", 100), samples_per_shard=50)
        rows = rows_of(loader(data, limit_samples=100))
        assert sorted(row[0] for row in rows.values()) == [f"new{i:04d}" for i in range(100)]


def test_looking_ahead_ends_with_the_loader(server, tmp_path):
    def threads() -> int:
        return sum(thread.name == "look-ahead" for thread in threading.enumerate())

    before = threads()
    batches = iter(loader(over(server, tmp_path / "cache")))
    next(batches)
    assert threads() > before
    batches.close()
    wait_until(lambda: threads() <= before)


def test_a_shard_that_was_replaced_is_not_held_against_the_size_in_the_cache(folder, tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    shutil.copytree(folder, old)
    write(new, pairs("q", 400), samples_per_shard=80)
    with HttpServer(old) as server:
        data = over(server, tmp_path / "cache")
        rows_of(loader(data, micro=20, limit_samples=400))
        shutil.rmtree(old)
        shutil.copytree(new, old)
        found = rows_of(loader(data, micro=20, limit_samples=400))
    assert found == rows_of(loader(config(new, weights=(1,)), micro=20, limit_samples=400))
