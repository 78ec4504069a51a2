"""Work on every shard of a data set, in several processes, with progress in bytes."""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from megatron_owl2.errors import ShardError
from megatron_owl2.utils.process_pool import ProcessPool, WorkerDiedError

_Shard = TypeVar("_Shard")
_Result = TypeVar("_Result")


def check_writable(directory: Path) -> None:
    """Check, before the work, that its results can lie beside the shards; raises ShardError."""
    if not os.access(directory, os.W_OK):
        raise ShardError(
            f"{directory} may not be written to; name a copy, or a folder of links to its files"
        )


def map_shards(
    work: Callable[[_Shard], _Result],
    sizes: dict[_Shard, int],
    workers: int,
    verb: str,
) -> Iterator[tuple[_Shard, _Result]]:
    """Shards with the results of work(shard), in the order in which they are completed.

    `sizes` are the bytes of every shard. Raises ShardError if the system killed a process.
    """
    with tqdm(total=sum(sizes.values()), unit="B", unit_scale=True, desc=verb) as progress:
        for shard, result in _results(work, list(sizes), workers):
            progress.update(sizes[shard])
            yield shard, result


def _results(
    work: Callable[[_Shard], _Result], shards: Sequence[_Shard], workers: int
) -> Iterator[tuple[_Shard, _Result]]:
    if min(workers, len(shards)) <= 1:
        for shard in shards:
            yield shard, work(shard)
        return
    with ProcessPool(min(workers, len(shards))) as pool:
        try:
            yield from pool.as_completed(work, shards)
        except WorkerDiedError as error:
            raise ShardError(f"{error}; use fewer --workers") from None
        except BaseException:  # an interrupt, or the caller has closed this generator
            pool.kill()
            raise
