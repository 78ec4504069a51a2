"""Sharded dataset with random access to its samples, wherever the shards lie."""

import bisect
import copy
import itertools
import operator
from collections import OrderedDict
from typing import NamedTuple

import numpy as np

from megatron_owl2.config.schema import DataConfig, StorageConfig
from megatron_owl2.data.sampling.shuffle import BLOCK_SIZE
from megatron_owl2.data.shards.manifest import MANIFEST, parse_manifest
from megatron_owl2.data.shards.records import Record
from megatron_owl2.data.shards.tar import unpack_sample
from megatron_owl2.data.shards.writer import INDEX, SUMS, checksum, load_index
from megatron_owl2.data.storage import Storage, StorageOptions, open_storage
from megatron_owl2.errors import BadSampleError, ShardError, StorageMissing

_MAX_BLOCKS = 4096  # whose part of the index is kept: 4 kB each


_GIB = 2**30


class _Block(NamedTuple):
    """The part of a shard's index that a run of BLOCK_SIZE samples needs."""

    first: int
    offsets: np.ndarray
    sums: np.ndarray

    @property
    def extent(self) -> tuple[int, int]:
        return int(self.offsets[0]), int(self.offsets[-1])


class ShardedDataset:
    """Random-access dataset of the records in a folder of shards, or behind a URL that fsspec
    knows.

    `dataset[index]` counts over all shards, `read` takes shard and place. `storage` reads it in
    place of what `location` and `options` say.

    Raises ShardError if the manifest is missing or damaged, StorageError if it cannot be read.
    Safe to copy into forked workers.
    """

    def __init__(
        self,
        location: str,
        options: StorageOptions | None = None,
        storage: Storage | None = None,
    ):
        self.location = str(location)
        self.storage = storage or open_storage(self.location, options or StorageOptions())
        manifest = self._read_manifest()
        self.fingerprint: str = manifest["fingerprint"]
        self.shards: list[dict] = manifest["shards"]
        self.sizes: list[int] = [row["samples"] for row in self.shards]
        self._ends = list(itertools.accumulate(self.sizes))
        self._blocks: OrderedDict[tuple[int, int], _Block] = OrderedDict()
        self._checked: set[int] = set()

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Record:
        """The record at a place of the whole data set, counted over its shards; negative from the
        end. Raises IndexError beyond it, else what `read` does."""
        index = operator.index(index)
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)} in {self.location}")
        return self.read(*self.find(index % len(self)))

    def find(self, index: int) -> tuple[int, int]:
        """The shard, and the place in it, of the sample at `index` of the whole data set."""
        shard = bisect.bisect_right(self._ends, index)
        return shard, index - (self._ends[shard - 1] if shard else 0)

    def read(self, shard_index: int, sample_index: int) -> Record:
        """One record. Raises BadSampleError if this sample is damaged, ShardError if its shard
        differs from the manifest and StorageError if it cannot be read; all name the file."""
        block = self._block(shard_index, sample_index)
        name, number = self.shards[shard_index]["name"], sample_index - block.first
        start, stop = int(block.offsets[number]), int(block.offsets[number + 1])
        data = self.storage.read(name, start, stop, block.extent)
        try:
            if checksum(data) != block.sums[number]:
                # What lies in a cache may have been damaged there.
                self.storage.drop(name, *block.extent)
                data = self.storage.read(name, start, stop, block.extent)
                if checksum(data) != block.sums[number]:
                    raise BadSampleError("its bytes do not match their checksum")
            return Record.from_members(*unpack_sample(data))
        except BadSampleError as error:
            where = f"{self._path(shard_index)} at byte {start}"
            raise BadSampleError(f"{where}: {error}") from None

    def prefetch(self, shard_index: int, sample_index: int) -> None:
        """Have the block of a sample fetched in the background, its part of the index at once."""
        block = self._block(shard_index, sample_index)
        self.storage.prefetch(self.shards[shard_index]["name"], *block.extent)

    def range_of(self, shard_index: int, sample_index: int) -> tuple[int, int]:
        """The byte offsets in its shard at which a sample starts and ends."""
        block = self._block(shard_index, sample_index)
        number = sample_index - block.first
        return int(block.offsets[number]), int(block.offsets[number + 1])

    def reopened(self, storage: Storage | None = None) -> "ShardedDataset":
        """The same data set for another thread: the manifest, of thousands of rows, is shared, all
        else its own, such as a copy of the storage, or `storage` in its place."""
        other = copy.copy(self)
        other.storage = storage or copy.deepcopy(self.storage)
        other._blocks, other._checked = OrderedDict(), set()
        return other

    def close(self) -> None:
        """Close every file; reading opens them again."""
        self.storage.close()

    def _path(self, shard_index: int) -> str:
        return f"{self.location.rstrip('/')}/{self.shards[shard_index]['name']}"

    def _block(self, shard_index: int, sample_index: int) -> _Block:
        row = self.shards[shard_index]
        if not 0 <= sample_index < row["samples"]:
            raise IndexError(f"sample {sample_index} of {row['samples']} in {row['name']}")
        first = sample_index - sample_index % BLOCK_SIZE
        block = self._blocks.get((shard_index, first))
        if block is not None:
            self._blocks.move_to_end((shard_index, first))
            return block
        self._check_size(shard_index)
        offsets, sums = self._load_index(shard_index)
        stop = min(first + BLOCK_SIZE, row["samples"])
        block = _Block(first, offsets[first : stop + 1].copy(), sums[first:stop].copy())
        while len(self._blocks) >= _MAX_BLOCKS:
            self._blocks.popitem(last=False)
        self._blocks[shard_index, first] = block
        return block

    def _load_index(self, shard_index: int) -> tuple[np.ndarray, np.ndarray]:
        row, path = self.shards[shard_index], self._path(shard_index)
        name, samples = row["name"], row["samples"]
        sizes = {name + INDEX: 8 * (samples + 1), name + SUMS: 8 * samples}

        def read() -> list[bytes]:
            return [self.storage.read(name, 0, size, (0, size)) for name, size in sizes.items()]

        try:
            return load_index(path, row, *read())
        except ShardError:
            # A cache may hold those of an older data set, or damaged ones.
            for name, size in sizes.items():
                self.storage.drop(name, 0, size)
            return load_index(path, row, *read())

    def _check_size(self, shard_index: int) -> None:
        if shard_index in self._checked:
            return
        row = self.shards[shard_index]
        size = self.storage.size(row["name"])
        if size != row["bytes"]:
            self.storage.forget_size(row["name"])
            size = self.storage.size(row["name"])
        if size != row["bytes"]:
            raise ShardError(
                f"{self._path(shard_index)} has {size} bytes, its manifest says {row['bytes']}: "
                "cut or replaced; copy or preprocess it again"
            )
        self._checked.add(shard_index)

    def _read_manifest(self) -> dict:
        try:
            data = self.storage.read_file(MANIFEST)
        except StorageMissing:
            raise ShardError(
                f"{self.location} holds no {MANIFEST}: not a data set, or its writing did not "
                "finish; make it with tools/preprocess_data.py"
            ) from None
        return parse_manifest(data, f"{self.location.rstrip('/')}/{MANIFEST}")


def open_dataset(path: str, storage: StorageConfig) -> ShardedDataset:
    """The data set at a path or URL, read as `data.storage` says; raises what ShardedDataset
    does."""
    options = StorageOptions(
        cache=storage.cache,
        cache_bytes=round(storage.cache_gib * _GIB),
        attempts=storage.attempts,
        timeout=storage.timeout,
    )
    return ShardedDataset(path, options)


def open_sources(config: DataConfig) -> list[ShardedDataset]:
    """The data sets of `config.sources`; raises what ShardedDataset does."""
    return [open_dataset(source.path, config.storage) for source in config.sources]
