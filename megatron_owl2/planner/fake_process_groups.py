"""Fake process groups: one process as any rank of a job of any size."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_owl2.config.schema import ParallelConfig
from megatron_owl2.mcore import setup


@contextmanager
def fake_process_groups(
    parallel: ParallelConfig, ranks: int, rank: int
) -> Iterator[ProcessGroupCollection]:
    """megatron-core's process groups of `rank` in a job of `ranks`, over torch's fake backend.

    Collectives return at once and leave their outputs as they are. Raises RuntimeError where the
    process has a group already.
    """
    if torch.distributed.is_initialized():
        raise RuntimeError("this process is in a process group already; plan in one that is not")
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    try:
        yield setup.initialize(parallel)
    finally:
        setup.shutdown()
