"""Work on every shard of a data set, in several processes, with progress in bytes."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from tqdm import tqdm

from megatron_owl2.errors import ShardError
from megatron_owl2.utils.process_pool import ProcessPool

_Shard = TypeVar("_Shard")
_Result = TypeVar("_Result")


def each_shard(
    work: Callable[[_Shard], _Result],
    sizes: dict[_Shard, int],
    workers: int,
    verb: str,
) -> Iterator[tuple[_Shard, _Result]]:
    """Shards with what came of them, as they end, from `workers` processes.

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
        futures = {pool.submit(work, shard): shard for shard in shards}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool:
            raise ShardError(
                "a process was killed, probably for lack of memory; use fewer --workers"
            ) from None
        except BaseException:  # an interrupt, or whoever iterates has stopped
            pool.kill()
            raise
