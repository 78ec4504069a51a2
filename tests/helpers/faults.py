"""Training with a fault: `python faults.py FAULT` and the arguments of megatron_owl2.train.

A fault is a function below. It may return a Trainer, or change what lies beneath: the disk, the
tensors of a loss, the file system as a rank sees it.
"""

import os
import pathlib
import resource
import signal
import sys
import time
from collections.abc import Callable

import prepared  # noqa: F401
import torch
from megatron.core.dist_checkpointing.strategies.filesystem_async import (
    FileSystemWriterAsync,
)
from torch.distributed.checkpoint import filesystem

from megatron_owl2.data.sample_builder import SampleBuilder
from megatron_owl2.errors import BadSampleError
from megatron_owl2.train import main
from megatron_owl2.training import step
from megatron_owl2.training.checkpoint import directories
from megatron_owl2.training.checkpoint.async_writer import Writing
from megatron_owl2.training.metrics.wandb_logger import WandbLogger
from megatron_owl2.training.sample_consistency import SampleConsistencyCheck
from megatron_owl2.training.trainer import Trainer

RANK = os.environ.get("RANK", "0")


def writes_slowly() -> None:
    """Files of a checkpoint are written once step 5 is in metrics.jsonl."""
    metrics = pathlib.Path(os.environ["METRICS"])
    _write_after(lambda: '"step": 5,' in metrics.read_text())


def disk_of_rank_1_is_full() -> None:
    if RANK == "1":
        Writing._write = lambda self, *file: self._failures.append(_no_space())


def share_of_rank_1_is_too_large() -> None:
    if RANK == "1":
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))


def no_space_for_what_is_common() -> None:
    save = torch.save

    def refuse(state, file):
        return _refuse() if "common.pt" in str(file) else save(state, file)

    if RANK == "0":
        torch.save = refuse


def no_space_for_the_index() -> None:
    if RANK == "0":
        FileSystemWriterAsync.finish = _refuse


def mistake_in_the_code() -> None:
    def write_companions(*arguments):
        raise KeyError("a mistake of ours")

    directories.write_companions = write_companions


def rank_1_is_lost_while_it_reads() -> None:
    def lost(*arguments):
        os.kill(os.getpid(), signal.SIGKILL)

    if RANK == "1":
        filesystem.FileSystemReader.read_data = lost


def device_of_rank_1_fails_while_it_reads() -> None:
    def broken(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    if RANK == "1":
        filesystem.FileSystemReader.read_data = broken


def torch_is_built_for_the_cpu() -> None:
    torch.version.cuda = None


def rank_1_sees_files_late() -> None:
    """At the fourth look; it waits SEEN_WITHIN seconds for that."""
    looks, lacks = 0, directories._lacks

    def late(directory):
        nonlocal looks
        looks += 1
        return ["run.yaml"] if looks < 4 else lacks(directory)

    if RANK == "1":
        directories._lacks = late
        directories._SEEN_WITHIN = float(os.environ["SEEN_WITHIN"])


def loss_of_the_second_step_is_nan() -> None:
    _poison(lambda micro_batch: micro_batch == 6)


def loss_of_the_first_step_is_nan() -> None:
    _poison(lambda micro_batch: micro_batch == 1)


def loss_is_nan_and_files_are_written_late() -> None:
    """From the second step on; the files of the first step's checkpoint wait for a skipped one."""
    skipped = pathlib.Path(os.environ["RUN"]) / "skipped_steps.jsonl"
    _poison(lambda micro_batch: micro_batch > 4)
    _write_after(skipped.exists)


def rank_1_hangs() -> type[Trainer]:
    """In its third step."""

    class Hanging(Trainer):
        def forward_backward(self) -> torch.Tensor:
            if self.state.step == 3 and RANK == "1":
                sleeps()
            return super().forward_backward()

    return Hanging


def sleeps() -> None:
    time.sleep(1000)


def rank_1_is_slow() -> None:
    """It reads slowly in two steps and computes slowly from then on."""
    add, summed_loss = SampleConsistencyCheck.add, step._summed_loss
    read = 0

    def slow_add(self, batch):
        nonlocal read
        read += 1
        if RANK == "1" and read <= 2:
            time.sleep(0.4)
        add(self, batch)

    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            if RANK == "1" and read > 2:
                time.sleep(0.4)
            return grad

    SampleConsistencyCheck.add = slow_add
    step._summed_loss = lambda batch, losses: summed_loss(batch, Slow.apply(losses))


def images_of_rank_1_are_damaged() -> None:
    """All images of its copy of the training data are damaged."""
    _damage_images_of_rank_1(training=True)


def validation_images_of_rank_1_are_damaged() -> None:
    """All images of its copy of the validation data are damaged."""
    _damage_images_of_rank_1(training=False)


def _damage_images_of_rank_1(*, training: bool) -> None:
    build = SampleBuilder.build

    def damaged(self, record, measured, augmentation=None, beside=()):
        if record.images and (augmentation is not None) == training:  # validation augments nothing
            raise BadSampleError("image cannot be decoded")
        return build(self, record, measured, augmentation, beside)

    if RANK == "1":
        SampleBuilder.build = damaged


def step_3_and_closing_fail() -> type[Trainer]:
    def refuse(self, *, failed):
        raise RuntimeError("no way to close")

    WandbLogger.close = refuse
    return step_3_fails()


def step_3_fails() -> type[Trainer]:
    class Failing(Trainer):
        def forward_backward(self) -> torch.Tensor:
            if self.state.step == 3:
                raise RuntimeError("a mistake in step 3")
            return super().forward_backward()

    return Failing


def _poison(wanted: Callable[[int], bool]) -> None:
    """Make the losses NaN of the micro-batches of this process, from 1 on, that are wanted."""
    summed_loss, calls = step._summed_loss, 0

    def poisoned(batch, losses):
        nonlocal calls
        calls += 1
        loss, targets, sums = summed_loss(batch, losses)
        return (loss * float("nan") if wanted(calls) else loss), targets, sums

    step._summed_loss = poisoned


def _write_after(condition: Callable[[], bool]) -> None:
    write = Writing._write

    def later(self, *file):
        began = time.monotonic()
        while not condition() and time.monotonic() < began + 60:
            time.sleep(0.01)
        write(self, *file)

    Writing._write = later


def _refuse(*arguments, **options):
    raise _no_space()


def _no_space() -> OSError:
    return OSError(28, "No space left on device")


if __name__ == "__main__":
    fault, *arguments = sys.argv[1:]
    sys.exit(main(arguments, globals()[fault]()))
