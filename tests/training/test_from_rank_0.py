"""Results and errors of rank 0 on all ranks."""

import multiprocessing
from functools import partial

import pytest
import torch
from tiny_data import record, write

from megatron_owl2.config.schema import DataConfig, SourceConfig
from megatron_owl2.data.shards.dataset import open_sources
from megatron_owl2.errors import ShardError
from megatron_owl2.training.from_rank_0 import from_rank_0


def asked_by_two_ranks(folder, make, look) -> list:
    """What `look` makes of the result in each of two ranks, or the error."""

    def rank(number, answers):
        store = torch.distributed.FileStore(str(folder / "store"), 2)
        torch.distributed.init_process_group("gloo", store=store, rank=number, world_size=2)
        try:
            found = look(from_rank_0(partial(make, number)))
        except Exception as error:
            found = type(error), str(error)
        answers.put((number, found))
        torch.distributed.destroy_process_group()

    fork = multiprocessing.get_context("fork")
    answers = fork.Queue()
    ranks = [fork.Process(target=rank, args=(number, answers)) for number in range(2)]
    for process in ranks:
        process.start()
    found = dict(answers.get(timeout=100) for _ in ranks)
    for process in ranks:
        process.join(100)
    return [found[number] for number in range(2)]


def test_data_sets_that_rank_0_has_opened_can_be_read_everywhere(tmp_path):
    records = [record(i) for i in range(25)]
    config = DataConfig(sources=[SourceConfig(path=str(write(tmp_path / "set", records)))])

    def make(rank):
        assert rank == 0, "the others read nothing"
        return open_sources(config)

    def look(datasets):
        (dataset,) = datasets
        return dataset.fingerprint, dataset[17]

    one, other = asked_by_two_ranks(tmp_path, make, look)
    assert one == other
    assert one[1] == records[17]


@pytest.mark.parametrize("error", [ShardError("no manifest.json"), KeyError("a mistake of ours")])
def test_an_error_of_rank_0_is_one_of_all(tmp_path, error):
    def make(rank):
        raise error

    one, other = asked_by_two_ranks(tmp_path, make, lambda found: found)
    assert one == (type(error), str(error))
    if isinstance(error, ShardError):
        assert other == one
    else:
        assert other == (RuntimeError, "rank 0 failed: KeyError('a mistake of ours')")
