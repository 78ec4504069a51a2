"""Asynchronous writing of a checkpoint: tensors are copied at once, then written by threads.

megatron-core's own writers are processes. Forked from one that has CUDA and threads they may
deadlock, spawned they want the tensors a second time in shared memory, and both outlive a trainer
that is killed. A thread needs nothing of that: writing lets the interpreter run, and it ends with
its process. What a rank cannot write is an error on all ranks.
"""

import inspect
import io
import os
import queue
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.storage import WriteResult

from megatron_owl2.errors import CheckpointError, CheckpointIOError
from megatron_owl2.mcore import setup
from megatron_owl2.training.checkpoint.index import first_failure
from megatron_owl2.training.checkpoint.staging import Staging

_FORMAT = ("torch_dist", 1)
_FILES = 2  # of each rank, a thread each


@contextmanager
def raise_io_error(directory: Path) -> Iterator[None]:
    """Context that turns the errors of a disk into CheckpointIOError."""
    try:
        yield
    except (OSError, CheckpointException) as error:
        reason = first_failure(error)
        raise CheckpointIOError(f"{directory} could not be written: {reason}") from error


@contextmanager
def raise_on_all_ranks(directory: Path) -> Iterator[None]:
    """Context in which an error of one rank raises CheckpointError on all of them.

    All ranks enter it together; inside, none may wait for another. Raises CheckpointIOError where
    the first failure is one, or is neither (a mistake, which its own rank raises as it is).
    """
    failure = None
    try:
        with raise_io_error(directory):
            yield
    except Exception as error:
        failure = error
    failed = torch.tensor([failure is not None], dtype=torch.int32, device=setup.device())
    torch.distributed.all_reduce(failed, torch.distributed.ReduceOp.MAX)
    if failed:
        said = [None] * torch.distributed.get_world_size()
        known = type(failure) if isinstance(failure, CheckpointError) else CheckpointIOError
        torch.distributed.all_gather_object(
            said, None if failure is None else (known, str(failure) or repr(failure))
        )
        if failure is not None and not isinstance(failure, CheckpointError):
            raise failure
        kind, message = next(filter(None, said))
        raise kind(message) from failure


class Writing:
    """A state dict of megatron-core's sharded tensors on its way into `folder`.

    Made by all ranks together. From then on the state may change: what is written are copies of
    it as it was, in `staging`, which no other save may use until this one has ended. Raises
    CheckpointIOError on all ranks if one cannot begin.
    """

    def __init__(self, state: dict, folder: Path, staging: Staging):
        # Nothing is written by another process, so results need no queue in one, which takes
        # seconds to start and outlives a rank that is killed.
        filesystem_async._results_queue = queue.Queue()
        self._folder = folder
        # The plan is validated by torch, on one rank.
        sharded: Any
        sharded, common = save_preprocess(state, validate_access_integrity=False)
        with raise_on_all_ranks(folder):
            if torch.distributed.get_rank() == 0:
                torch.save(common, folder / "common.pt")
        self._plan = _Plan(*_FORMAT, thread_count=_FILES)
        self._plan.async_save(sharded, folder, **_OWN_THREADS)
        self._results: list[WriteResult] = []
        self._failures: list[BaseException] = []
        self._threads = [
            threading.Thread(target=self._write, args=file, name="checkpoint")
            for file in _copied(self._plan.writer.write_buckets, staging)
        ]
        self._plan.writer.write_buckets = None  # it would hold the tensors themselves
        for thread in self._threads:
            thread.start()

    @property
    def ended(self) -> bool:
        """Whether this rank has written its share, or has failed to."""
        return not any(thread.is_alive() for thread in self._threads)

    def finish(self) -> None:
        """Wait for all ranks and write the index; all ranks together.

        Raises CheckpointIOError on all ranks if one could not write its share.
        """
        main = torch.distributed.get_rank() == 0
        with raise_on_all_ranks(self._folder):
            for thread in self._threads:
                thread.join()
            for failure in self._failures:
                reason = first_failure(failure)
                raise CheckpointIOError(f"{self._folder} could not be written: {reason}")
        shares = [None] * torch.distributed.get_world_size() if main else None
        torch.distributed.gather_object(self._results, shares)
        with raise_on_all_ranks(self._folder):
            if main:
                self._plan.writer.finish(self._plan.metadata, shares)
                save_config(CheckpointingConfig(*_FORMAT), str(self._folder))

    def _write(self, path: str, name: str, items: deque) -> None:
        """Write one file."""
        try:
            with open(path, "wb") as stream:
                while items:
                    if not threading.main_thread().is_alive():  # the run has ended in an error
                        return
                    item, data = items.popleft()
                    start = stream.tell()
                    if isinstance(data, io.BytesIO):
                        stream.write(data.getbuffer())
                    else:
                        torch.save(data, stream)
                    length = stream.tell() - start
                    place = _StorageInfo(name, start, length)
                    self._results.append(WriteResult(item.index, length, place))
                stream.flush()
                os.fsync(stream.fileno())
        except BaseException as error:  # torch makes several kinds of what a disk refuses
            self._failures.append(error)


def _copied(buckets: list | None, staging: Staging) -> list[tuple[str, str, deque]]:
    """Path, name and (item, data) of every file of this rank; the data are nobody else's."""
    buckets = buckets or []
    copies = iter(staging.copy([tensor for *_, (_, pairs) in buckets for _, tensor in pairs]))
    return [
        (path, name, deque([*objects, *((item, next(copies)) for item, _ in pairs)]))
        for path, name, (objects, pairs) in buckets
    ]


class _Plan(TorchDistSaveShardedStrategy):
    """megatron-core's plan of which rank writes what; `writer` and `metadata` are what it made."""

    def _get_save_and_finalize_callbacks(self, writer, save_state_dict_ret, *_) -> AsyncRequest:
        self.writer, self.metadata, _ = save_state_dict_ret
        return AsyncRequest(None, (), [])


# From 0.17 on megatron-core would plan with nvidia-resiliency-ext where it is not told otherwise.
_ASKED = inspect.signature(_Plan.async_save).parameters
_OWN_THREADS = {"async_strategy": "mcore"} if "async_strategy" in _ASKED else {}
