"""Directory of a run: one job at a time, and files that go back to where the run goes on from."""

import contextlib
import logging
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from megatron_owl2.config.load import save_config
from megatron_owl2.config.schema import RunConfig
from megatron_owl2.data import bad_samples
from megatron_owl2.errors import RunDirectoryError
from megatron_owl2.training import fault_tolerance
from megatron_owl2.training.from_rank_0 import from_rank_0
from megatron_owl2.training.metrics import metrics
from megatron_owl2.training.state import TrainState
from megatron_owl2.utils.files import locked

_logger = logging.getLogger(__name__)

LOCK = ".lock"
PATIENCE = 30.0  # seconds in which the data workers of a job that was killed end, with its lock


@contextlib.contextmanager
def run_directory(output: Path) -> Iterator[None]:
    """The directory of a run, made and locked by rank 0, where the file system has locks; all ranks
    together.

    Two jobs would write the same checkpoints and metrics. Raises RunDirectoryError on all ranks if
    another job has it for longer than PATIENCE, or it cannot be made.
    """
    with contextlib.ExitStack() as held:
        from_rank_0(lambda: _lock(output, held))
        yield


def _lock(output: Path, held: contextlib.ExitStack) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
        (output / LOCK).touch()
    except OSError as error:
        raise RunDirectoryError(f"train.output: {output} cannot be used: {error}") from None
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            held.enter_context(locked(output / LOCK))
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise RunDirectoryError(
                    f"another job trains in {output}; wait for it, end it, or name another "
                    "train.output"
                ) from None
            time.sleep(0.5)
        except OSError as error:
            _logger.info("%s is not locked: %s", output, error.strerror)
            return


def set_back(output: Path, config: RunConfig, state: TrainState) -> None:
    """Removal of what is later than `state` from the files of a run, and its configuration written;
    all ranks together."""
    if torch.distributed.get_rank() == 0:
        save_config(config, output / "run.yaml")
        metrics.drop_after(output, state.step)
        bad_samples.drop_after(output, state.consumed_samples)
        fault_tolerance.drop_after(output, state.step)
    torch.distributed.barrier()  # no rank writes its bad samples before the file was cut
