"""Process group of the ranks of one model, for what their hosts tell each other.

It is of gloo also beside NCCL: nothing here waits for a device, or for work that is queued there.
"""

from datetime import timedelta

import torch
from megatron.core.process_groups_config import ProcessGroupCollection


def model_group_on_host(
    groups: ProcessGroupCollection, timeout_minutes: int
) -> torch.distributed.ProcessGroup | None:
    """The ranks that share one model, and so read the same samples; None where each has its own.

    All ranks of the job make their groups together.
    """
    tp, cp, dp, pp = (group.size() for group in (groups.tp, groups.cp, groups.dp, groups.pp))
    if tp * cp * pp == 1:
        return None
    # megatron-core counts ranks tensor first, then context, data, pipeline.
    ranks = torch.arange(tp * cp * dp * pp).view(pp, dp, cp * tp).transpose(0, 1).flatten(1)
    own, _ = torch.distributed.new_subgroups_by_enumeration(
        ranks.tolist(), timedelta(minutes=timeout_minutes), backend="gloo"
    )
    assert not isinstance(own, int), "every rank is in one of them"
    return own
