"""Manager of the checkpoints of a run: asynchronous saves one after the other, and retention."""

import logging
import os
import re
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path

import torch

from megatron_owl2.config.schema import RunConfig, TrainConfig
from megatron_owl2.mcore import setup
from megatron_owl2.model.owl2 import Owl2
from megatron_owl2.training.checkpoint import directories
from megatron_owl2.training.checkpoint.async_writer import raise_on_all_ranks
from megatron_owl2.training.checkpoint.save_load import Save
from megatron_owl2.training.checkpoint.staging import Staging
from megatron_owl2.utils.files import sync

_logger = logging.getLogger(__name__)
_NAME = re.compile(r"iter_(\d{7,})")


class CheckpointManager:
    """Checkpoints of a run in `run/checkpoints/iter_<step>`; all ranks call it together.

    A checkpoint that is whole gets its name, then `latest` names it, then what `keep_last` and
    `keep_every` do not keep is removed.
    Everything here raises CheckpointError on all ranks if one cannot write.
    """

    def __init__(self, run: Path, config: TrainConfig):
        self._folder = Path(run) / "checkpoints"
        self._config = config
        self._main = torch.distributed.get_rank() == 0
        self._step = 0
        self._under_way: Save | None = None
        self._staging = Staging()

    def save(self, step: int, chunks: Sequence[Owl2], config: RunConfig, **state) -> None:
        """Begin to save what `Save` takes, once the save before is complete. With
        `train.async_save` the files are written while the caller goes on."""
        self.wait()
        directory = self._folder / f"iter_{step:07d}"
        with raise_on_all_ranks(directory):
            if self._main:
                self._remove_leftovers()
        self._step = step
        self._under_way = Save(directory, chunks, config, staging=self._staging, **state)
        if not self._config.async_save:
            self.wait()

    def poll(self) -> None:
        """Complete the save under way if all ranks have written their files; asks the others only
        while there is one."""
        if self._under_way is None:
            return
        writing = torch.tensor([not self._under_way.written], device=setup.device()).int()
        torch.distributed.all_reduce(writing, torch.distributed.ReduceOp.MAX)
        if not writing:
            self.wait()

    def wait(self) -> None:
        """Wait for the save under way, if any, and complete it."""
        if self._under_way is None:
            return
        save, self._under_way = self._under_way, None
        save.complete()
        with raise_on_all_ranks(save.directory):
            if self._main:
                self._point_to(save.directory.name)
                self._prune()
        _logger.info("saved %s", save.directory)

    def _point_to(self, name: str) -> None:
        pointer = self._folder / f".{directories.LATEST}.partial"
        pointer.write_text(name)
        sync(pointer)
        os.replace(pointer, self._folder / directories.LATEST)
        sync(self._folder)

    def _prune(self) -> None:
        """Rename what is not kept before it is deleted, so that half of it looks like nothing."""
        found = [_NAME.fullmatch(path.name) for path in self._folder.iterdir()]
        names = {int(match[1]): match[0] for match in found if match}
        for step in expired(names, self._step, self._config.keep_last, self._config.keep_every):
            old = self._folder / names[step]
            old.rename(old.with_name(f".{old.name}.removed"))
        self._remove_leftovers()

    def _remove_leftovers(self) -> None:
        """Of checkpoints that were removed, and of saves that were killed."""
        for ending in ("partial", "removed"):
            for path in self._folder.glob(f".iter_*.{ending}"):
                shutil.rmtree(path, ignore_errors=True)
                if path.exists():  # on network disks while somebody reads it
                    _logger.warning("%s cannot be removed yet", path)


def expired(steps: Collection[int], newest: int, keep_last: int, keep_every: int) -> list[int]:
    """Those of `steps` that are not kept now that `newest` is whole: those that are older than the
    newest `keep_last` and not divisible by `keep_every`. Later ones are not touched: they are of a
    run that was set back. With keep_last 0 all are kept."""
    if not keep_last:
        return []
    older = sorted(step for step in steps if step <= newest)[:-keep_last]
    return [step for step in older if not keep_every or step % keep_every]
