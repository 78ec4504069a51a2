"""Agreement of the processes of an evaluation: what one of them meets, all of them learn."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar, cast

import torch

from megatron_owl2.errors import Owl2Error, TaskError

T = TypeVar("T")


@contextmanager
def together(group: torch.distributed.ProcessGroup | None = None) -> Iterator[None]:
    """Context in which an error of one process of `group` (all, if None) is raised by each of them.

    All of them enter and leave it; inside, none may wait for another. Only errors that users see
    are shared, others end their process and torchrun the rest.
    """
    failure: Exception | None = None
    try:
        yield
    except (Owl2Error, OSError) as error:
        failure = error
    said: list = [None] * torch.distributed.get_world_size(group)
    kind = type(failure) if isinstance(failure, Owl2Error) else TaskError
    told = None if failure is None else (kind, str(failure))
    torch.distributed.all_gather_object(said, told, group)
    if failure is not None:
        raise failure
    if first := next(filter(None, said), None):
        kind, message = first
        raise kind(message)


def from_first(make: Callable[[], T]) -> T:
    """What `make` gives on the first process, which alone calls it, on all; its errors as well."""
    box: list[T | None] = [None]
    with together():
        if torch.distributed.get_rank() == 0:
            box = [make()]
    torch.distributed.broadcast_object_list(box)
    return cast("T", box[0])
