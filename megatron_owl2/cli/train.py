"""Training of one stage, in one process or under torchrun.

    owl2 train --config FILE [section.key=value ...]
    torchrun --nproc-per-node 8 --no-python owl2 train --config FILE [section.key=value ...]

The same as `python -m megatron_owl2.train`.
"""

from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the stage; returns the exit code, which `megatron_owl2.train` describes."""
    from megatron_owl2.train import main as train

    return train(arguments)
