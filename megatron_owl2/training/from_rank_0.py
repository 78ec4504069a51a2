"""Result of rank 0 on all ranks, for what each of them would read from the same disk."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from megatron_owl2.errors import Owl2Error

_Result = TypeVar("_Result")


def from_rank_0(make: Callable[[], _Result]) -> _Result:
    """What `make` returns on rank 0, pickled and sent to the others; all ranks together.

    An error there is raised on all ranks, one that is not an Owl2Error as a RuntimeError.
    """
    found: list[Any] = [None, None]
    if torch.distributed.get_rank() == 0:
        try:
            found = [make(), None]
        except Exception as error:
            known = isinstance(error, Owl2Error)
            found = [None, error if known else RuntimeError(f"rank 0 failed: {error!r}")]
            torch.distributed.broadcast_object_list(found)
            raise
    torch.distributed.broadcast_object_list(found)
    result, error = found
    if error is not None:
        raise error
    return result
