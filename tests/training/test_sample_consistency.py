"""Ranks of one model that read different samples stop, and name each other."""

import sys

import faults
import pytest
import tiny_run
import torch
from processes import run_ranks
from streams import config, loader
from tiny_data import record, write

from megatron_owl2.errors import DataError
from megatron_owl2.training.sample_consistency import SampleConsistencyCheck

pytestmark = pytest.mark.distributed


def read(one: str, two: str, found: str) -> None:
    """One of two ranks; what `verify` said after every step goes into a file."""
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    consistency = SampleConsistencyCheck(torch.distributed.group.WORLD)
    said = []
    for batch in loader(config((one, two)[rank], weights=(1,)), limit_samples=40):
        consistency.add(batch)
        try:
            consistency.verify()
            said.append("")
        except DataError as error:
            said.append(str(error))
    if rank == 1:
        torch.save(said, found)
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("damaged", [False, True])
def test_a_damaged_copy_of_the_data_is_noticed(tmp_path, damaged):
    folders = [write(tmp_path / name, map(record, range(40)), 40) for name in ("one", "two")]
    if damaged:
        path = folders[1] / "shard-000000.tar"
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    done = run_ranks(2, __file__, *folders, tmp_path / "found")
    assert done.returncode == 0, done.stderr
    said = torch.load(tmp_path / "found")
    assert len(said) == 10
    if damaged:
        first = next(step for step, text in enumerate(said, 1) if text)
        assert all(said[first - 1 :]) and not any(said[: first - 1])
        assert (
            "ranks [0, 1] of one model did not read the same samples, up to sample "
            f"{4 * first - 1}:"
        ) in said[first - 1]
    else:
        assert not any(said)


def test_a_run_ends_before_it_computes_rows_of_other_lengths(tmp_path):
    """Substitutes for what is damaged are longer or shorter; collectives would not fit."""
    done = tiny_run.train(
        tiny_run.make(tmp_path),
        tmp_path / "run",
        *("parallel.tensor=2", "parallel.sequence=true", "data.max_bad_fraction=1"),
        processes=2,
        fault=faults.images_of_rank_1_are_damaged,
    )
    assert done.returncode != 0 and not tiny_run.rows(tmp_path / "run")
    for rank in (0, 1):
        assert f"error: rank {rank}: the ranks [0, 1] of one model did not read" in done.stderr


if __name__ == "__main__":
    read(*sys.argv[1:])
