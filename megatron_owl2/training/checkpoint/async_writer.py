"""Asynchronous writing of a checkpoint: tensors are copied at once, then written by threads.

megatron-core's own writers are processes. Forked from one that has CUDA and threads they may
deadlock, spawned they want the tensors a second time in shared memory, and both outlive a trainer
that is killed. A thread needs nothing of that: writing lets the interpreter run, and it ends with
its process. What a rank cannot write is an error on all ranks.
"""

import io
import os
import queue
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.base import (
    StrategyAction,
    register_default_strategy,
)
from megatron.core.dist_checkpointing.strategies.common import TorchCommonSaveStrategy
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.storage import WriteResult

from megatron_owl2.errors import CheckpointError, CheckpointIOError
from megatron_owl2.mcore import setup
from megatron_owl2.training.checkpoint.index import first_failure

_FORMAT = ("torch_dist", 1)


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
    it as it was. Raises CheckpointIOError on all ranks if one cannot begin.
    """

    def __init__(self, state: dict, folder: Path):
        install()
        self._folder = folder
        self._plan = _Plan(*_FORMAT)
        dist_checkpointing.save(
            state,
            str(folder),
            self._plan,
            async_sharded_save=True,
            validate_access_integrity=False,  # the plan is validated by torch, on one rank
        )
        self._results: list[WriteResult] = []
        self._failures: list[BaseException] = []
        self._threads = [
            threading.Thread(target=self._write, args=file, name="checkpoint")
            for file in _copied(self._plan.writer.write_buckets)
        ]
        self._plan.writer.write_buckets = None  # the threads let go what they have written
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
        """Write one file; every copy is let go once it is written."""
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


def _copied(buckets: list | None) -> list[tuple[str, str, deque]]:
    """Path, name and (item, data) of every file of this rank; the data are in main memory and
    nobody else's."""
    files = [
        (path, name, deque([*objects, *((item, _copy(tensor)) for item, tensor in tensors)]))
        for path, name, (objects, tensors) in buckets or []
    ]
    torch.cuda.synchronize()
    return files


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone() if setup.on_cpu() else tensor.to("cpu", non_blocking=True)


class _Plan(TorchDistSaveShardedStrategy):
    """megatron-core's plan of which rank writes what; `writer` and `metadata` are what it made."""

    def _get_save_and_finalize_callbacks(self, writer, save_state_dict_ret) -> AsyncRequest:
        self.writer, self.metadata, _ = save_state_dict_ret
        return AsyncRequest(None, (), [])


class _Common(TorchCommonSaveStrategy):
    """Writing of what is not sharded, by rank 0 in the midst of the planning, where a failure must
    not leave the other ranks waiting."""

    def save_common(self, common_state_dict, checkpoint_dir) -> None:
        with raise_on_all_ranks(Path(checkpoint_dir)):
            super().save_common(common_state_dict, checkpoint_dir)


def install() -> None:
    """Have megatron-core write what is not sharded, and collect results, as this module does."""
    # Nothing is written by another process, so results need no queue in one, which takes seconds
    # to start and outlives a rank that is killed.
    filesystem_async._results_queue = queue.Queue()
    register_default_strategy(StrategyAction.SAVE_COMMON, "torch", 1, _Common("torch", 1))
