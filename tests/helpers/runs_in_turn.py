"""Training runs one after the other in the same processes, which start only once.

`launch` is called by tests; the file itself is what every process runs. A run is what
`python -m megatron_owl2.train` makes of a configuration, on a process group of its own.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from processes import run_ranks


def launch(
    config: Path, runs: Sequence[tuple[Path, Sequence[str]]], processes: int
) -> subprocess.CompletedProcess:
    """Do `runs`, (output folder, overrides) each, in their order; does not raise on failure."""
    given = json.dumps([(str(output), list(overrides)) for output, overrides in runs])
    return run_ranks(processes, __file__, config, environment={"RUNS_IN_TURN": given}, timeout=900)


def main() -> None:
    from megatron_owl2.mcore.setup import setup

    setup()
    import torch.distributed as dist

    from megatron_owl2.config.load import load_config
    from megatron_owl2.training.signals import StopSignal
    from megatron_owl2.training.trainer import Trainer
    from megatron_owl2.utils.logs import setup_logging

    setup_logging()

    stop = StopSignal()
    if "RANK" in os.environ:
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(*address, size, is_master=False)
    else:  # one process, without torchrun
        rank, size, store = 0, 1, dist.HashStore()
    for number, (output, overrides) in enumerate(json.loads(os.environ["RUNS_IN_TURN"])):
        config = load_config(sys.argv[1], [f"train.output={output}", *overrides])
        # Their addresses lie in the store; those of the group before must not be found there.
        own = dist.PrefixStore(f"run {number}", store)
        dist.init_process_group("gloo", store=own, rank=rank, world_size=size)
        received = Trainer(config, stop).train()
        if received:
            raise SystemExit(f"signal {received}")


if __name__ == "__main__":
    main()
