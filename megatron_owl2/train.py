"""Training of one stage: torchrun ... -m megatron_owl2.train --config FILE [section.key=value ...]

Exit codes: 0 the run is finished; 2 the configuration, the data or a checkpoint cannot be used, so
that trying again does not help; 1 a disk, a network or data workers failed, or another rank was
lost, which trying again may mend; 75 SIGTERM, SIGUSR1 or SIGUSR2 ended the run early with a
checkpoint, so that it can go on later; 130 Ctrl-C did; anything else is a crash.
"""

import argparse
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from megatron_owl2.errors import ConfigError, Owl2Error
from megatron_owl2.training.signals import StopSignal

if TYPE_CHECKING:
    from megatron_owl2.config.schema import RunConfig
    from megatron_owl2.training.trainer import Trainer

EXIT_RESUMABLE = 75  # EX_TEMPFAIL of sysexits.h


def main(
    arguments: Sequence[str] | None = None,
    trainer: "Callable[[RunConfig, StopSignal], Trainer] | None" = None,
) -> int:
    """Run the command; returns its exit code. `trainer` makes the Trainer, or a subclass of it."""
    stop = StopSignal()  # the imports below take seconds, in which a signal can come
    usage, _, codes = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        prog="megatron_owl2.train", description=usage, epilog=codes.strip()
    )
    parser.add_argument("--config", required=True, help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_args(arguments)

    from megatron_owl2.config.load import load_config
    from megatron_owl2.config.validate import validate
    from megatron_owl2.mcore.setup import setup
    from megatron_owl2.utils.logs import setup_logging

    setup_logging()
    # Before the first call of CUDA, which checks of the machine make; see mcore/setup.py.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    try:
        config = load_config(options.config, options.overrides)
        # At once: the Trainer does it too, but comes with the seconds of importing torch.
        validate(config, int(os.environ.get("WORLD_SIZE", "1")))
        setup()
        from megatron_owl2.training.trainer import Trainer

        received = (trainer or Trainer)(config, stop).train()
    except Owl2Error as error:
        _tell(error)
        _leave_the_others(error.exit_code)
        return error.exit_code
    if received == signal.SIGINT:
        return 128 + received
    return EXIT_RESUMABLE if received else 0


def _tell(error: Owl2Error) -> None:
    """Say what is wrong, in one write, for the ranks of a job share a terminal or a log.

    A configuration may be wrong on one node or one rank alone, so every rank says it.
    """
    rank = os.environ.get("RANK", "0")
    if not isinstance(error, ConfigError):
        where = f"rank {rank}: "
    elif rank == "0":
        where = ""
    else:
        where = f"rank {rank} on {socket.gethostname()}: "
    sys.stderr.write(f"error: {where}{error}\n")
    sys.stderr.flush()


def _leave_the_others(code: int) -> None:
    """End this process at once if it has joined other ranks.

    The interpreter's own way out takes process groups apart while the others do the same, and what
    is thrown in their threads then ends the process with a signal instead of the code.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return
    import torch

    if torch.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    sys.exit(main())
