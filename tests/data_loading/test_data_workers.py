"""Data workers that are killed, hang or crash: nothing is lost, and none outlives its loader."""

import gc
import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from processes import killed_by_errors
from streams import assert_equal, config, loader, two_sets
from tiny_data import LetterTokenizer
from torch.utils.data._utils import signal_handling

from megatron_owl2.data import loader as loader_module
from megatron_owl2.errors import LoaderError
from megatron_owl2.utils.process_pool import SPAWN

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return two_sets(tmp_path_factory.mktemp("data"))


class Deadly(LetterTokenizer):
    """Kills its process, as the system does when memory is short, while a file is there."""

    def __init__(self, fuse, once: bool):
        self.fuse, self.once = fuse, once

    def encode(self, text):
        if "7" in text and self.fuse.exists():
            if self.once:
                self.fuse.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().encode(text)


@pytest.mark.parametrize("workers", [1, 3])
def test_a_killed_worker_is_replaced_and_nothing_is_lost(folders, tmp_path, workers, caplog):
    expected = list(loader(config(*folders), limit_samples=80))
    fuse = tmp_path / "fuse"
    fuse.touch()
    batches = loader(
        config(*folders, workers=workers), tokenizer=Deadly(fuse, once=True), limit_samples=80
    )
    for a, b in zip(expected, batches, strict=True):
        assert_equal(a, b)
    assert not fuse.exists() and batches.restarts == 1
    assert "a data worker ended unexpectedly" in caplog.text


@pytest.mark.parametrize("seed", range(3))
def test_workers_killed_at_any_moment_cost_nothing(folders, seed, monkeypatch):
    """With finished batches still in the pipe, too: torch then fails in other ways."""
    monkeypatch.setattr(loader_module, "MAX_RESTARTS", 100)
    chance = random.Random(seed)
    expected = list(loader(config(*folders), limit_samples=400))
    batches = loader(config(*folders, workers=2, prefetch=3), limit_samples=400)
    for number, batch in enumerate(batches):
        assert_equal(expected[number], batch)
        if number % 25 == 10:
            time.sleep(chance.choice((0, 0.02, 0.2)))
            chance.choice(multiprocessing.active_children()).kill()
    assert number == 99 and batches.restarts >= 1


class _DeadlyInside(Deadly):
    """Kills a worker while it asks torch's flag of the end, which the trainer asks as well."""

    def encode(self, text):
        if "7" in text and self.fuse.exists():
            frame = sys._getframe()
            while "done_event" not in frame.f_locals:
                frame = frame.f_back
            if condition := getattr(frame.f_locals["done_event"], "_cond", None):
                condition.acquire()  # as `is_set` of multiprocessing's events does
        return super().encode(text)


def _read_past_a_death(folders, fuse: Path) -> None:
    expected = list(loader(config(*folders), limit_samples=80))
    tokenizer = _DeadlyInside(fuse, once=True)
    batches = loader(config(*folders, workers=2), tokenizer=tokenizer, limit_samples=80)
    for a, b in zip(expected, batches, strict=True):
        assert_equal(a, b)
    assert not fuse.exists() and batches.restarts == 1


def test_a_worker_killed_with_a_lock_holds_up_nobody(folders, tmp_path):
    fuse = tmp_path / "fuse"
    fuse.touch()
    # A process of its own, since one that waits for such a lock can only be killed.
    reader = SPAWN.Process(target=_read_past_a_death, args=(folders, fuse))
    reader.start()
    with killed_by_errors(reader):
        reader.join(120)
        assert reader.exitcode == 0


class _Handle:
    """Stands for a process group or a tensor on a GPU: freed in a forked process, it crashes it."""

    def __init__(self):
        self.owner, self.cycle = os.getpid(), self

    def __del__(self):
        if os.getpid() != self.owner:
            os.kill(os.getpid(), signal.SIGSEGV)


class _Collecting(LetterTokenizer):
    def encode(self, text):
        gc.collect()
        return super().encode(text)


def test_what_the_trainer_left_to_the_collector_is_not_freed_in_a_worker(folders):
    gc.disable()
    try:
        _Handle()
        batches = loader(config(*folders, workers=2), tokenizer=_Collecting(), limit_samples=16)
        assert len(list(batches)) == 4 and batches.restarts == 0
        assert gc.get_freeze_count() == 0  # the trainer's own collector goes on as before
    finally:
        gc.enable()


def test_the_signal_handler_of_another_loader_does_no_harm(folders, monkeypatch):
    """torch installs one handler per process, which raises wherever the training is."""
    monkeypatch.setattr(signal_handling, "_SIGCHLD_handler_set", False)
    before = signal.getsignal(signal.SIGCHLD)
    assert list(torch.utils.data.DataLoader([1, 2], num_workers=1)) == [1, 2]
    assert signal.getsignal(signal.SIGCHLD) != before
    batches = iter(loader(config(*folders, workers=2)))
    next(batches)
    for worker in multiprocessing.active_children():
        worker.kill()
    time.sleep(0.2)  # the death is noticed by the next batch, not here
    next(batches)
    batches.close()


def test_workers_that_give_nothing_stop_the_run(folders):
    class Stuck(LetterTokenizer):
        def encode(self, text):
            time.sleep(100)

    data = config(*folders, workers=1, stall_timeout=1.0)
    with pytest.raises(LoaderError, match=r"nothing for 1 seconds .* samples 0 to 3"):
        next(iter(loader(data, tokenizer=Stuck())))


def test_workers_that_are_killed_again_and_again_stop_the_run(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(
        loader_module, "MAX_RESTARTS", 1
    )  # torch notices a death after five seconds
    fuse = tmp_path / "fuse"
    fuse.touch()
    batches = loader(
        config(*folders, workers=1), tokenizer=Deadly(fuse, once=False), limit_samples=80
    )
    with pytest.raises(LoaderError, match="2 times in short order.*lower data.workers"):
        list(batches)
    assert batches.restarts == 1


def test_no_worker_outlives_its_loader(folders):
    def children():
        return {child.pid for child in psutil.Process().children()}

    before = children()
    batches = iter(loader(config(*folders, workers=3)))  # endless
    next(batches)
    workers = children() - before
    assert len(workers) == 3
    batches.close()
    assert not workers & children()
