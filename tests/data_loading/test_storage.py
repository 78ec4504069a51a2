"""Storage on file systems: exact bytes, faults that pass, clear errors for those that stay."""

import errno
import os
import pickle
import random
import threading
import time

import numpy as np
import pytest
from processes import open_below

from megatron_owl2.data.storage import LocalStorage, StorageOptions, local, open_storage
from megatron_owl2.errors import StorageError, StorageMissing

QUICK = StorageOptions(backoff=0.001, attempts=4)
DATA = np.random.default_rng(0).bytes(50_000)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a.tar").write_bytes(DATA)
    return tmp_path


def failing_pread(monkeypatch, code: int, times: int) -> list[int]:
    """os.pread raises `times` times; the descriptors it was called with."""
    seen, real = [], os.pread

    def pread(file, size, offset):
        seen.append(os.fstat(file).st_ino)
        if len(seen) <= times:
            raise OSError(code, os.strerror(code))
        return real(file, size, offset)

    monkeypatch.setattr(os, "pread", pread)
    return seen


def test_reads_exactly_what_was_asked(folder):
    storage = open_storage(folder, QUICK)
    assert isinstance(storage, LocalStorage)
    rng = np.random.default_rng(1)
    for _ in range(200):
        start, stop = sorted(rng.integers(0, len(DATA) + 1, 2).tolist())
        assert storage.read("a.tar", start, stop, (0, len(DATA))) == DATA[start:stop]
    assert storage.read_file("a.tar") == DATA
    assert storage.size("a.tar") == len(DATA)
    assert storage.counters["reads"] == 200 and storage.counters["retries"] == 0
    storage.prefetch("a.tar", 0, 10)
    storage.drop("a.tar", 0, 10)
    storage.close()
    assert storage.read("a.tar", 5, 9) == DATA[5:9]


def test_file_urls_are_folders(tmp_path):
    (tmp_path / "two words").mkdir()
    (tmp_path / "two words" / "x").write_bytes(b"12345")
    url = (tmp_path / "two words").as_uri()
    assert "%20" in url and open_storage(url).read("x", 1, 3) == b"23"


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_a_fault_that_passes_is_tried_again_on_a_newly_opened_file(folder, monkeypatch, code):
    storage = open_storage(folder, QUICK)
    storage.read("a.tar", 0, 1)
    replacement = folder / "new"
    replacement.write_bytes(DATA[::-1])
    replacement.rename(folder / "a.tar")
    inodes = failing_pread(monkeypatch, code, times=3)
    assert storage.read("a.tar", 100, 200) == DATA[::-1][100:200]
    assert inodes[-1] == (folder / "a.tar").stat().st_ino != inodes[0]
    assert storage.counters["retries"] == 2  # the first fault met the open file


def test_a_fault_that_stays_ends_in_an_error_that_says_everything(folder, monkeypatch):
    storage = open_storage(folder, QUICK)
    calls = failing_pread(monkeypatch, errno.EIO, times=10**9)
    with pytest.raises(StorageError) as caught:
        storage.read("a.tar", 100, 200)
    assert len(calls) == 4
    for part in (
        f"{folder}/a.tar",
        "bytes 100 to 200",
        "4 attempts",
        "[Errno 5]",
        "check the disk",
    ):
        assert part in str(caught.value)
    assert not isinstance(caught.value, StorageMissing)


def test_the_wait_doubles_up_to_a_limit_with_jitter_that_leaves_other_random_states_alone(
    folder, monkeypatch
):
    delays = []
    monkeypatch.setattr(time, "sleep", delays.append)
    failing_pread(monkeypatch, errno.EIO, times=10**9)
    states = random.getstate(), np.random.get_state()[1].tobytes()
    options = StorageOptions(backoff=0.5, attempts=10)
    with pytest.raises(StorageError):
        open_storage(folder, options).read("a.tar", 0, 1)
    full = [0.5, 1, 2, 4, 8, 16, 30, 30, 30]
    assert len(delays) == 9 and len(set(delays)) == 9
    assert all(f / 2 <= d <= f for d, f in zip(delays, full, strict=True))
    assert options.patience == 10 * 60 + sum(full)
    assert states == (random.getstate(), np.random.get_state()[1].tobytes())


def test_a_missing_file_is_told_apart_and_tried_only_a_little(folder):
    storage = open_storage(folder, QUICK)
    for ask in (
        lambda: storage.read("b.tar", 0, 1),
        lambda: storage.read_file("b.tar"),
        lambda: storage.size("b.tar"),
    ):
        before = storage.counters["requests"]
        with pytest.raises(StorageMissing, match="b.tar"):
            ask()
        assert storage.counters["requests"] - before == 2
    with pytest.raises(StorageMissing):
        open_storage(folder / "nowhere", QUICK).read_file("manifest.json")


def test_a_file_that_blinks_is_found(folder, monkeypatch):
    storage = open_storage(folder, StorageOptions(backoff=0.4))
    monkeypatch.setattr(time, "sleep", lambda s: (folder / "b.tar").write_bytes(b"here"))
    assert storage.read("b.tar", 0, 4) == b"here"


def test_a_file_that_lost_its_end_says_where(folder):
    storage = open_storage(folder, QUICK)
    storage.read("a.tar", 0, 10)
    os.truncate(folder / "a.tar", 150)
    with pytest.raises(StorageError, match="bytes 100 to 200 .* ended at byte 150"):
        storage.read("a.tar", 100, 200)
    assert storage.read("a.tar", 100, 150) == DATA[100:150]


def test_few_files_are_open_at_once(tmp_path):
    for index in range(300):
        (tmp_path / f"{index}").write_bytes(b"%06d" % index)
    storage = open_storage(tmp_path, QUICK)

    for index in [*range(300), *range(0, 300, 7)]:
        assert storage.read(f"{index}", 0, 6) == b"%06d" % index
    assert open_below(tmp_path) == 128
    storage.close()
    assert open_below(tmp_path) == 0


def test_threads_may_share_a_storage_that_opens_and_closes_files_all_the_time(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(local, "MAX_OPEN", 2)
    for index in range(20):
        (tmp_path / f"{index}").write_bytes(b"%06d" % index * 100)
    storage = open_storage(tmp_path, QUICK)
    wrong = []

    def work(seed: int) -> None:
        for index in np.random.default_rng(seed).integers(0, 20, 1500):
            if storage.read(f"{index}", 6, 18) != b"%06d" % index * 2:
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and storage.counters["reads"] == 6000 and storage.counters["retries"] == 0


def test_copies_and_forked_children_read_and_count_for_themselves(folder):
    storage = open_storage(folder, QUICK)
    storage.read("a.tar", 0, 10)
    copy = pickle.loads(pickle.dumps(storage))
    assert copy.read("a.tar", 7, 12) == DATA[7:12] and copy.counters["reads"] == 1
    child = os.fork()
    if child == 0:
        good = storage.read("a.tar", 20, 40) == DATA[20:40] and storage.counters["reads"] == 1
        os._exit(0 if good else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert storage.counters["reads"] == 1


@pytest.mark.parametrize("name", ["", ".", "..", "../a.tar", "sub/a.tar", "/etc/passwd", "a\0b"])
def test_names_that_lead_elsewhere_are_refused(folder, name):
    storage = open_storage(folder, QUICK)
    (folder / "sub").mkdir()
    (folder / "sub" / "a.tar").write_bytes(DATA)
    for ask in (storage.read_file, storage.size, lambda n: storage.read(n, 0, 1)):
        with pytest.raises(StorageError, match="not a plain file name"):
            ask(name)


def test_an_error_keeps_its_type_on_the_way_out_of_a_data_worker(folder):
    error = pickle.loads(pickle.dumps(StorageMissing("gone")))
    assert type(error) is StorageMissing and str(error) == "gone"


@pytest.mark.parametrize(
    "change",
    [{"attempts": 0}, {"timeout": 0}, {"backoff": -1}, {"cache_bytes": 0}, {"prefetch_threads": 0}],
)
def test_options_that_cannot_work_are_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        StorageOptions(**change)


def test_unknown_addresses_are_refused_at_once():
    began = time.monotonic()
    with pytest.raises(StorageError, match="nosuch://x.*not known"):
        open_storage("nosuch://x")
    assert time.monotonic() - began < 5
