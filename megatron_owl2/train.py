"""Train one stage: torchrun ... -m megatron_owl2.train --config FILE [section.key=value ...]

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

from megatron_owl2.training.signals import StopSignal

EXIT_RESUMABLE = 75  # EX_TEMPFAIL of sysexits.h


def main() -> int:
    stop = StopSignal()  # the imports below take seconds, in which a signal can come
    usage, _, codes = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        prog="megatron_owl2.train", description=usage, epilog=codes.strip()
    )
    parser.add_argument("--config", required=True, help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_args()

    from megatron_owl2.config.load import load_config
    from megatron_owl2.config.validate import validate
    from megatron_owl2.errors import ConfigError

    try:
        config = load_config(arguments.config, arguments.overrides)
        validate(config, int(os.environ.get("WORLD_SIZE", "1")))
    except ConfigError as error:
        return _refuse(error)

    from megatron_owl2.errors import (
        CheckpointError,
        CheckpointIOError,
        DataError,
        LoaderError,
        ShardError,
        StorageError,
    )
    from megatron_owl2.training.trainer import train

    rank = os.environ.get("RANK", "0")
    try:
        received = train(config, stop)
    except ConfigError as error:
        return _refuse(error)
    except (CheckpointIOError, LoaderError, StorageError) as error:
        _tell(f"rank {rank}: {error}")
        return 1
    except (CheckpointError, DataError, FloatingPointError, ShardError) as error:
        _tell(f"rank {rank}: {error}")
        return 2
    if received == signal.SIGINT:
        return 128 + received
    return EXIT_RESUMABLE if received else 0


def _refuse(error: ValueError) -> int:
    """What is wrong may be so on one node or one rank alone, so every rank says it."""
    rank = os.environ.get("RANK", "0")
    _tell(str(error) if rank == "0" else f"rank {rank} on {socket.gethostname()}: {error}")
    return 2


def _tell(message: str) -> None:
    """In one write, for the ranks of a job share a terminal or a log."""
    sys.stderr.write(f"error: {message}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
