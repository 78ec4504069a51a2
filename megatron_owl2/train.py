"""Train one stage: torchrun ... -m megatron_owl2.train --config FILE [section.key=value ...]"""

import argparse
import os
import sys


def main() -> int:
    # Imports are inside: the checkpoint writer starts a process that imports this file again.
    parser = argparse.ArgumentParser(prog="megatron_owl2.train", description=__doc__)
    parser.add_argument("--config", required=True, help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_args()

    from megatron_owl2 import config as configuration

    first = os.environ.get("RANK", "0") == "0"
    try:
        config = configuration.load(arguments.config, arguments.overrides)
        configuration.check(config, int(os.environ.get("WORLD_SIZE", "1")))

        from megatron_owl2.data.shards import ShardError
        from megatron_owl2.data.stream import DataError
        from megatron_owl2.training.checkpoint import CheckpointError
        from megatron_owl2.training.loop import train
    except configuration.ConfigError as error:
        return _refuse(error, first)
    try:
        received = train(config)
    except (configuration.ConfigError, CheckpointError, DataError, ShardError) as error:
        return _refuse(error, first)
    return 128 + received if received else 0


def _refuse(error: Exception, first: bool) -> int:
    if first:
        print(f"error: {error}", file=sys.stderr, flush=True)
    return 2


if __name__ == "__main__":
    sys.exit(main())
