"""Train one stage: torchrun ... -m megatron_owl2.train --config FILE [section.key=value ...]"""

import argparse
import os
import sys


def main() -> int:
    parser = argparse.ArgumentParser(prog="megatron_owl2.train", description=__doc__)
    parser.add_argument("--config", required=True, help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_args()

    from megatron_owl2 import checks
    from megatron_owl2 import config as configuration

    rank = os.environ.get("RANK", "0")
    try:
        config = configuration.load(arguments.config, arguments.overrides)
        checks.check(config, int(os.environ.get("WORLD_SIZE", "1")))

        from megatron_owl2.data.ledger import DataError
        from megatron_owl2.data.manifest import ShardError
        from megatron_owl2.data.storage import StorageError
        from megatron_owl2.training.checkpoint import CheckpointError
        from megatron_owl2.training.loop import train

        received = train(config)
    except configuration.ConfigError as error:  # the same on every rank
        return _refuse(str(error)) if rank == "0" else 2
    except (CheckpointError, DataError, FloatingPointError, ShardError, StorageError) as error:
        return _refuse(f"rank {rank}: {error}")
    return 128 + received if received else 0


def _refuse(message: str) -> int:
    print(f"error: {message}", file=sys.stderr, flush=True)
    return 2


if __name__ == "__main__":
    sys.exit(main())
