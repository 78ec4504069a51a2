"""Evaluations in two ranks of torchrun, one after the other: OUTPUT OPTIONS...; files are compared
by the test that starts this."""

import os
import sys
from pathlib import Path

import torch
from megatron.core import parallel_state

from megatron_owl2.cli.evaluate import main
from megatron_owl2.errors import TaskError
from megatron_owl2.evaluation import runner
from megatron_owl2.evaluation.ranks import from_first, together
from megatron_owl2.training.checkpoint import directories


def check(folder: Path, options: list[str]) -> None:
    rank = int(os.environ["RANK"])
    shared = [*options, "--tensor-parallel", "1", "--output"]
    assert main([*shared, str(folder / "shared")]) == 0
    assert main([*shared, str(folder / "one"), "--limit", "1"]) == 0  # fewer than ranks
    check_errors(rank)
    check_a_failing_share(folder / "resumed", shared, rank)
    check_one_checkpoint(folder / "latest", shared, rank)
    parallel_state.destroy_model_parallel()
    assert main([*options, "--output", str(folder / "split")]) == 0  # tensor parallel


def check_errors(rank: int) -> None:
    for wrong in range(2):
        try:
            with together():
                if rank == wrong:
                    raise TaskError(f"of rank {wrong}")
        except TaskError as error:
            assert str(error) == f"of rank {wrong}"
        else:
            raise AssertionError("nothing was raised")
    assert from_first(lambda: {"rank": rank}) == {"rank": 0}


def check_a_failing_share(output: Path, shared: list[str], rank: int) -> None:
    """Rank 1 fails at its first batch: both ranks say so, and what rank 0 answered is kept."""
    images_of = runner.images_of

    def failing(*arguments):
        if rank == 1:
            raise TaskError("no such image")
        return images_of(*arguments)

    runner.images_of = failing
    assert main([*shared, str(output)]) == 2
    runner.images_of = images_of
    torch.distributed.barrier()
    assert (output / "journal-0.jsonl").read_bytes().count(b"\n") == 3
    assert (output / "journal-1.jsonl").read_bytes().count(b"\n") == 1
    torch.distributed.barrier()
    assert main([*shared, str(output)]) == 0


def check_one_checkpoint(output: Path, shared: list[str], rank: int) -> None:
    """Rank 1 sees a newer checkpoint of the run, which is damaged: all load that of rank 0."""
    resolve, run = directories.resolve, shared[shared.index("--checkpoint") + 1]

    def newer(path):
        return output / "newer" if rank == 1 and str(path) == run else resolve(path)

    output.mkdir(exist_ok=True)
    (output / "newer").mkdir(exist_ok=True)
    torch.distributed.barrier()
    directories.resolve = newer
    assert main([*shared, str(output)]) == 0
    directories.resolve = resolve


if __name__ == "__main__":
    check(Path(sys.argv[1]), sys.argv[2:])
