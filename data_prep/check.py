"""Check of a whole data set: every sample of every shard against its checksum."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from data_prep.map_shards import map_shards
from megatron_owl2.data import images
from megatron_owl2.data.sampling.keyed_random import KeyedRandom
from megatron_owl2.data.shards.dataset import ShardedDataset
from megatron_owl2.data.shards.tar import END, members
from megatron_owl2.data.storage import LocalStorage, StorageOptions
from megatron_owl2.errors import BadSampleError, ShardError, StorageError
from megatron_owl2.utils.files import is_hidden

_DECODE = 64  # keeps the choice of samples apart from the order's keys


@dataclass
class ShardCheck:
    """Findings in one shard.

    `good` + `len(bad)` + `unreadable` is the number of samples that it should hold. `decoded`
    counts the images that were decoded; `faults` are of the shard as a whole.
    """

    name: str
    good: int = 0
    decoded: int = 0
    bad: list[str] = field(default_factory=list)
    unreadable: int = 0
    faults: list[str] = field(default_factory=list)


def check(
    location: str,
    decode: float = 0.0,
    workers: int = 1,
    options: StorageOptions | None = None,
) -> Iterator[ShardCheck]:
    """Findings in every shard of a data set, in the order in which the shards are completed.

    A fraction `decode` of the images is decoded as well: the same ones in every run. Raises
    ShardError if the manifest is missing or damaged.
    """
    dataset = ShardedDataset(location, options)
    work = partial(check_shard, dataset, decode)
    sizes = {index: row["bytes"] for index, row in enumerate(dataset.shards)}
    for _, result in map_shards(work, sizes, workers, "check"):
        yield result


def check_shard(dataset: ShardedDataset, decode: float, index: int) -> ShardCheck:
    """Findings in one shard: size, index, checksum and record of every sample, end marker.

    Shards of other programs may hold a key twice; those are two samples.
    """
    row = dataset.shards[index]
    result = ShardCheck(row["name"])
    for number in range(row["samples"]):
        try:
            record = dataset.read(index, number)
            chosen = KeyedRandom(_DECODE, index, number).uniform() < decode
            if chosen:
                try:
                    for image in record.images:
                        images.decode(image)
                except BadSampleError as error:
                    start, _ = dataset.range_of(index, number)
                    place = f"{row['name']} at byte {start}: {record.key}"
                    raise BadSampleError(f"{place}: {error}") from None
                result.decoded += len(record.images)
            result.good += 1
        except BadSampleError as error:
            result.bad.append(str(error))
        except (ShardError, StorageError) as error:
            # A fault of the shard: the samples before are good, the rest cannot be read.
            result.unreadable = row["samples"] - number
            result.faults.append(str(error))
            return result
    result.faults += _faults_around(dataset, index)
    return result


def _faults_around(dataset: ShardedDataset, index: int) -> Iterator[str]:
    """Faults of the bytes that no sample covers: the start and the end of the archive."""
    row = dataset.shards[index]
    first, _ = dataset.range_of(index, 0)
    _, end = dataset.range_of(index, row["samples"] - 1)
    try:
        head = dataset.storage.read(row["name"], 0, first, (0, first)) if first else b""
        tail = dataset.storage.read(row["name"], end, row["bytes"], (end, row["bytes"]))
    except StorageError as error:
        yield str(error)
        return
    if not _holds_no_file(head):
        yield f"{row['name']}: not only folders lie before its first sample, at byte {first}"
    if len(tail) < len(END) // 2 or tail.strip(b"\0"):
        yield f"{row['name']}: no end marker after its last sample, at byte {end}"


def _holds_no_file(head: bytes) -> bool:
    try:
        return not any(members(lambda start, stop: head[start:stop], 0, len(head)))
    except BadSampleError:
        return False


def unlisted(location: str) -> list[str]:
    """Names of shards in a folder that are not in its manifest, and so are never read."""
    dataset = ShardedDataset(location)
    if not isinstance(dataset.storage, LocalStorage):
        return []  # a web server does not list its files
    named = {row["name"] for row in dataset.shards}
    found = (path.name for path in Path(dataset.storage.location).glob("*.tar"))
    return sorted(name for name in found if name not in named and not is_hidden(name))
