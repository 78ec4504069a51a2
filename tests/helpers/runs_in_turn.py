"""Training runs one after the other in the same processes, which start only once.

`launch` is called by tests; the file itself is what every process runs. A run is what
`python -m megatron_owl2.train` makes of a configuration, on a process group of its own.
"""

import functools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist
from processes import run_ranks


def launch(
    config: Path, runs: Sequence[tuple[Path, Sequence[str]]], processes: int
) -> subprocess.CompletedProcess:
    """Do `runs`, (output folder, overrides) each, in their order; does not raise on failure."""
    given = json.dumps([(str(output), list(overrides)) for output, overrides in runs])
    return run_ranks(processes, __file__, config, environment={"RUNS_IN_TURN": given}, timeout=900)


@functools.cache
def _store() -> dist.Store:
    if "RANK" not in os.environ:  # one process, without torchrun
        return dist.HashStore()
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(*address, int(os.environ["WORLD_SIZE"]), is_master=False)


def join_group(name: str) -> None:
    """Join a process group of all ranks that has not been there before.

    Addresses of ranks lie in the store; those of the group before must not be found there.
    """
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    dist.init_process_group(
        "gloo", store=dist.PrefixStore(name, _store()), rank=rank, world_size=size
    )


def main() -> None:
    from megatron_owl2.mcore.setup import setup

    setup()
    from megatron_owl2.config.load import load_config
    from megatron_owl2.training.signals import StopSignal
    from megatron_owl2.training.trainer import Trainer
    from megatron_owl2.utils.logs import setup_logging

    setup_logging()
    stop = StopSignal()
    for number, (output, overrides) in enumerate(json.loads(os.environ["RUNS_IN_TURN"])):
        config = load_config(sys.argv[1], [f"train.output={output}", *overrides])
        join_group(f"run {number}")
        received = Trainer(config, stop).train()
        if received:
            raise SystemExit(f"signal {received}")


if __name__ == "__main__":
    main()
