"""Verification that the ranks of one model train on the same samples.

Every rank reads for itself. A copy of the data that is damaged on one node would make that rank
substitute other samples than its peers, which nothing else would notice, or which would end in
collectives of different sizes.
"""

import torch
from xxhash import xxh3_64_intdigest

from megatron_owl2.data.batch import Batch
from megatron_owl2.errors import DataError


class SampleConsistencyCheck:
    """Digest of the keys and lengths of all micro-batches, compared over the ranks of one model.

    `group` is that of `mcore.host_group`, or None where every rank has a model of its own.
    """

    def __init__(self, group: torch.distributed.ProcessGroup | None):
        self._group = group
        self._digest = 0
        self._newest: list[int] = []

    def add(self, batch: Batch) -> None:
        """Take note of a micro-batch."""
        self._newest = batch.sample_indices.tolist()
        identity = f"{self._digest} {self._newest} {batch.keys} {batch.lengths.tolist()}"
        digest = xxh3_64_intdigest(identity.encode())
        self._digest = digest >> 2  # fits a signed integer, negated too

    def verify(self) -> None:
        """Compare since the start; all ranks of the model together, and before anything is computed
        of the newest micro-batch. Raises DataError if a rank differs."""
        if self._group is None:
            return
        pair = torch.tensor([self._digest, -self._digest])
        torch.distributed.all_reduce(pair, torch.distributed.ReduceOp.MAX, group=self._group)
        largest, negated_least = pair.tolist()
        if largest != -negated_least:
            ranks = torch.distributed.get_process_group_ranks(self._group)
            raise DataError(
                f"the ranks {ranks} of one model did not read the same samples, up to sample "
                f"{self._newest[-1]}: a copy of the data or a cache is damaged on one of their "
                "nodes; run tools/check_data.py there"
            )
