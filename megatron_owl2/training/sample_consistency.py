"""Verification that the ranks of one model-parallel group trained on the same samples.

Every rank reads for itself. A copy of the data that is damaged on one node would make that rank
substitute other samples than its peers, which nothing else would notice.
"""

from collections.abc import Sequence

import torch
from xxhash import xxh3_64_intdigest

from megatron_owl2.data.batch import Batch
from megatron_owl2.errors import DataError


class SampleConsistencyCheck:
    """Digest of the keys of all micro-batches, compared over the ranks that share one model.

    These are the ranks reached by going through the `groups` one after the other.
    """

    def __init__(self, groups: Sequence[torch.distributed.ProcessGroup], device: torch.device):
        self._groups = [group for group in groups if group.size() > 1]
        self._device = device
        self._digest = 0

    def add(self, batch: Batch) -> None:
        """Take note of a micro-batch."""
        identity = f"{self._digest} {batch.sample_indices.tolist()} {batch.keys}"
        digest = xxh3_64_intdigest(identity.encode())
        self._digest = digest >> 2  # fits a signed integer, negated too

    def verify(self, step: int) -> None:
        """Compare since the start; all ranks together. Raises DataError if a rank differs."""
        if not self._groups:
            return
        pair = torch.tensor([self._digest, -self._digest], device=self._device)
        for group in self._groups:
            torch.distributed.all_reduce(pair, torch.distributed.ReduceOp.MAX, group=group)
        largest, negated_least = pair.tolist()
        if largest != -negated_least:
            ranks = [torch.distributed.get_process_group_ranks(group) for group in self._groups]
            raise DataError(
                f"the ranks {' and '.join(map(str, ranks))} of one model did not read the same "
                f"samples up to step {step}: a copy of the data or a cache is damaged on one of "
                "their nodes; run tools/check_data.py there"
            )
