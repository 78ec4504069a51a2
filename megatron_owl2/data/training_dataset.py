"""Training data as a map-style dataset: records read, decoded, tokenised, bad ones substituted.

What a sample index holds is a pure function of the data, the seed and the index. So any worker may
build any micro-batch, ranks with the same data-parallel rank build equal ones, and resuming is a
seek.
"""

import time
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch.utils.data import Dataset

from megatron_owl2.config.schema import DataConfig
from megatron_owl2.data import images
from megatron_owl2.data.batch import BadSample, Batch, collate
from megatron_owl2.data.conversation import Sample, build_sample
from megatron_owl2.data.sampling.keyed_random import KeyedRandom
from megatron_owl2.data.sampling.phases import Phase, order_seed
from megatron_owl2.data.sampling.prefetch import Prefetcher
from megatron_owl2.data.sampling.shuffle import ShuffleOrder
from megatron_owl2.data.shards.dataset import ShardedDataset
from megatron_owl2.data.tokenizer import Tokenizer
from megatron_owl2.errors import BadSampleError, ConfigError, DataError

SUBSTITUTES = 8  # how many other samples are tried in place of one
_AUGMENT = 16  # keeps the crops' keys apart from the order's


class TrainingDataset(Dataset):
    """Map-style dataset from lists of global sample indices to batches; holds no position.

    `phase` says where the order of these data sets starts; batches are as long as their longest row
    and `row_alignment` ask (row_length.py). With `decode_images=False` images are only checked: a
    rank that needs no pixels must substitute exactly what the ranks with pixels substitute. Raises
    ConfigError for an impossible mixture.
    """

    def __init__(
        self,
        config: DataConfig,
        datasets: Sequence[ShardedDataset],
        phase: Phase,
        tokenizer: Tokenizer,
        tokens_per_image: int,
        image_size: int,
        row_alignment: int,
        decode_images: bool = True,
        to_square: images.SquareResize = images.STRETCH,
    ):
        self.datasets = datasets
        weights = [source.weight for source in config.sources]
        sizes = [dataset.sizes for dataset in datasets]
        try:
            self.order = ShuffleOrder(sizes, weights, order_seed(config.seed, phase.number))
        except ValueError as error:
            raise ConfigError(f"data.sources: {error}") from None
        self._first_sample = phase.start_sample
        self._config = config
        self._tokenizer = tokenizer
        self._tokens_per_image = tokens_per_image
        self._image_size, self._row_alignment = image_size, row_alignment
        self._decode_images, self._to_square = decode_images, to_square
        self._prefetcher = Prefetcher(self.datasets, self.order)

    def __getitem__(self, sample_indices: list[int]) -> Batch:
        """The batch of these samples. Raises DataError if a sample and all its substitutes are bad,
        ShardError if a shard is not what its manifest says, StorageError if it cannot be read."""
        bad: list[BadSample] = []
        measured = defaultdict(float, read_retries=-self._retries())
        samples = [self.sample(sample_index, bad, measured) for sample_index in sample_indices]
        image_size = self._image_size if self._decode_images else 0
        batch = collate(samples, image_size, self._row_alignment)
        measured["read_retries"] += self._retries()
        batch.bad_samples, batch.measurements = bad, measured
        return batch

    def sample(self, sample_index: int, bad: list[BadSample], measured: dict[str, float]) -> Sample:
        """The sample of an index, or its first usable substitute; the unusable ones are added to
        `bad`, bytes and seconds to `measured`."""
        place = sample_index - self._first_sample
        self._prefetcher.advance_to(place)
        for attempt in range(1 + SUBSTITUTES):
            source, shard, index = self.order.sample_at(place, attempt)
            dataset = self.datasets[source]
            key = None
            try:
                started = time.perf_counter()
                record = dataset.read(shard, index)
                measured["read_seconds"] += time.perf_counter() - started
                measured["bytes"] += len(record.image or b"")
                key = record.key
                sample = build_sample(
                    record, self._tokenizer, self._tokens_per_image, self._config.sequence_length
                )
                if record.image is not None:
                    started = time.perf_counter()
                    sample.image = self._image(record.image, sample_index)
                    measured["decode_seconds"] += time.perf_counter() - started
            except BadSampleError as error:
                name, (offset, _) = dataset.shards[shard]["name"], dataset.range_of(shard, index)
                where = dataset.location, name, offset
                bad.append(BadSample(sample_index, key, source, *where, str(error)))
            except Exception as error:
                name = dataset.shards[shard]["name"]
                error.add_note(f"sample {sample_index}: sample {index} of {name}")
                raise
            else:
                sample.sample_index, sample.key, sample.source = sample_index, record.key, source
                return sample
        reasons = [entry.reason for entry in bad if entry.sample_index == sample_index]
        raise DataError(
            f"sample {sample_index} and {SUBSTITUTES} substitutes for it are all unusable:\n  "
            + "\n  ".join(reasons)
        )

    def close(self) -> None:
        """End the prefetching; the dataset can be used again."""
        self._prefetcher.close()

    def _retries(self) -> int:
        own = sum(dataset.storage.counters["retries"] for dataset in self.datasets)
        return int(own) + self._prefetcher.retries

    def _image(self, data: bytes, sample_index: int) -> torch.Tensor:
        if not self._decode_images:
            images.check(data)
            return torch.empty(3, 0, 0, dtype=torch.uint8)
        config = self._config
        random = KeyedRandom(config.seed, _AUGMENT, sample_index) if config.augment else None
        scaled = config.scaled_decoding
        return images.load_square(data, self._image_size, random, scaled, self._to_square)
