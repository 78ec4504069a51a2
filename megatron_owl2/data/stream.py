"""The training stream: slots in order, read, decoded, tokenised; the bad substituted and listed.

A slot's sample is a pure function of the data, the seed and the slot. So any worker may build any
micro-batch, ranks that share a data-parallel index build equal ones, and resuming is a seek.
"""

import dataclasses
import hashlib
import json
import signal
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset

from megatron_owl2.config import DataConfig
from megatron_owl2.data import images
from megatron_owl2.data.batch import BadSample, Batch, collate
from megatron_owl2.data.conversation import Sample, build_sample
from megatron_owl2.data.hashing import KeyedRandom
from megatron_owl2.data.order import CHUNK, LANES, WINDOW, Order
from megatron_owl2.data.records import BadSampleError
from megatron_owl2.data.shards import Dataset as ShardDataset
from megatron_owl2.data.shards import read_manifest
from megatron_owl2.data.tokenizer import Tokenizer

SUBSTITUTES = 8  # how many other samples are tried for a slot
BAD_FRACTION_AFTER = 1000  # slots of a rank before max_bad_fraction is applied
MAX_BAD_IN_A_ROW = 100
_AUGMENT = 16  # keeps the crops' keys apart from the order's


class DataError(RuntimeError):
    """Too much of the data cannot be used; the message says how much and where to look."""


class SampleStream(Dataset):
    """Maps slots to samples and lists of slots to batches; holds no position.

    With `decode_images=False` pictures are decoded and thrown away: a rank that needs no pixels
    must substitute exactly what the ranks with pixels substitute, and only decoding tells.
    Raises ShardError if a data set is unfinished or damaged.
    """

    def __init__(
        self,
        config: DataConfig,
        tokenizer: Tokenizer,
        tokens_per_image: int,
        image_size: int,
        decode_images: bool = True,
    ):
        self.datasets = [ShardDataset(source.path) for source in config.sources]
        weights = [source.weight for source in config.sources]
        self.order = Order([dataset.sizes for dataset in self.datasets], weights, config.seed)
        self._config = config
        self._tokenizer = tokenizer
        self._tokens_per_image = tokens_per_image
        self._image_size = image_size
        self._decode_images = decode_images

    def __getitem__(self, slots: list[int]) -> Batch:
        """The batch of these slots. Raises DataError if a slot and all substitutes are bad, and
        ShardError if a shard cannot be read."""
        bad: list[BadSample] = []
        samples = [self.sample(slot, bad) for slot in slots]
        batch = collate(samples, self._image_size if self._decode_images else 0)
        batch.bad_samples = bad
        return batch

    def sample(self, slot: int, bad: list[BadSample]) -> Sample:
        """The sample of a slot or its first usable substitute; the unusable are added to `bad`."""
        for attempt in range(1 + SUBSTITUTES):
            dataset_index, shard, index = self.order.locate(slot, attempt)
            dataset = self.datasets[dataset_index]
            key = None
            try:
                record = dataset.read(shard, index)
                key = record.key
                sample = build_sample(
                    record, self._tokenizer, self._tokens_per_image, self._config.sequence_length
                )
                if record.image is not None:
                    sample.image = self._picture(record.image, slot)
            except BadSampleError as error:
                name, offset = dataset.location(shard, index)
                entry = BadSample(slot, key, str(dataset.directory), name, offset, str(error))
                bad.append(entry)
            except Exception as error:
                error.add_note(f"slot {slot}: sample {index} of {dataset.shards[shard]['name']}")
                raise
            else:
                sample.slot = slot
                sample.key = record.key
                return sample
        raise DataError(
            f"slot {slot}: its sample and {SUBSTITUTES} substitutes are all unusable, the last is "
            f"{key or name} of {dataset.directory}: {bad[-1].reason}"
        )

    def _picture(self, data: bytes, slot: int) -> torch.Tensor:
        image = images.decode(data)
        if not self._decode_images:
            return torch.empty(3, 0, 0, dtype=torch.uint8)
        if not self._config.augment:
            return images.resize_square(image, self._image_size)
        random = KeyedRandom(self._config.seed, _AUGMENT, slot)
        return images.augment(image, self._image_size, random)


class MicroBatches:
    """The slots of every micro-batch of one data-parallel rank, from `start_slot` on."""

    def __init__(self, start_slot: int, rank: int, ranks: int, size: int, limit: int | None):
        if not 0 <= rank < ranks:
            raise ValueError(f"data-parallel rank {rank} of {ranks}")
        if limit is not None and limit % (ranks * size):
            raise ValueError(
                f"limit_slots {limit} is not a multiple of {size} micro-batch rows x {ranks} "
                "data-parallel ranks, so the ranks would end at different times"
            )
        self._first = start_slot + (rank - start_slot) % ranks
        self._ranks = ranks
        self._size = size
        self._end = None if limit is None else start_slot + limit

    def __iter__(self) -> Iterator[list[int]]:
        slot, step = self._first, self._ranks * self._size
        while self._end is None or slot < self._end:
            yield list(range(slot, slot + step, self._ranks))
            slot += step


class BatchLoader:
    """Iterates over batches in order, keeps the ledger of bad samples and stops when they are many.

    Raises DataError when more than `max_bad_fraction` of this rank's slots needed a substitute
    (looked at from the 1000th slot on) or 100 slots in a row did. Every iteration starts at the
    same slot.
    """

    def __init__(
        self,
        stream: SampleStream,
        batches: MicroBatches,
        workers: int,
        max_bad_fraction: float,
        bad_samples_path: Path | None,
    ):
        self.slots_per_epoch = stream.order.slots_per_epoch
        self._max_bad_fraction = max_bad_fraction
        self._bad_samples_path = bad_samples_path
        self._loader = DataLoader(
            stream,
            batch_size=None,
            sampler=batches,
            num_workers=workers,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # the global random state belongs to the model
            worker_init_fn=_leave_signals_to_the_trainer,
        )

    def __iter__(self) -> Iterator[Batch]:
        seen = bad = in_a_row = 0
        for batch in self._loader:
            self._write(batch.bad_samples)
            bad_slots = {sample.slot for sample in batch.bad_samples}
            for slot in batch.slots.tolist() if bad_slots else ():
                in_a_row = in_a_row + 1 if slot in bad_slots else 0
                if in_a_row == MAX_BAD_IN_A_ROW:
                    self._stop(batch, f"{in_a_row} slots in a row")
            if not bad_slots:
                in_a_row = 0
            seen += len(batch.slots)
            bad += len(bad_slots)
            if seen >= BAD_FRACTION_AFTER and bad > self._max_bad_fraction * seen:
                self._stop(batch, f"{bad} of {seen} slots ({bad / seen:.2%})")
            yield batch

    def _write(self, bad_samples: list[BadSample]) -> None:
        if bad_samples and self._bad_samples_path is not None:
            self._bad_samples_path.parent.mkdir(parents=True, exist_ok=True)
            with self._bad_samples_path.open("a") as file:
                for sample in bad_samples:
                    file.write(json.dumps(dataclasses.asdict(sample)) + "\n")

    def _stop(self, batch: Batch, amount: str) -> None:
        raise DataError(
            f"{amount} had unusable samples (data.max_bad_fraction is {self._max_bad_fraction}); "
            f"the last: {batch.bad_samples[-1].reason}. "
            f"All are listed in {self._bad_samples_path or 'the batches'}"
        )


def _leave_signals_to_the_trainer(worker: int) -> None:
    """Ctrl-C reaches every process of the terminal; the trainer ends its workers itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def build_loader(
    config: DataConfig,
    *,
    tokenizer: Tokenizer,
    tokens_per_image: int,
    image_size: int,
    micro_batch_size: int,
    start_slot: int,
    data_parallel_rank: int,
    data_parallel_size: int,
    decode_images: bool = True,
    bad_samples_path: str | Path | None = None,
    limit_slots: int | None = None,
) -> BatchLoader:
    """The batches of one data-parallel rank from global slot `start_slot` on.

    Rank r of R gets the slots s with s % R == r in increasing order: if R divides the global batch
    size, every global batch holds the same samples for any R. Batches do not depend on
    `config.workers` (0: no worker processes). `limit_slots` ends after that many slots of all ranks
    together. The ledger gets one JSON line for every unusable sample of a batch that was handed
    out. Raises ShardError for a data set that cannot be opened and ValueError for a rank or limit
    that does not fit.
    """
    stream = SampleStream(config, tokenizer, tokens_per_image, image_size, decode_images)
    batches = MicroBatches(
        start_slot, data_parallel_rank, data_parallel_size, micro_batch_size, limit_slots
    )
    path = None if bad_samples_path is None else Path(bad_samples_path)
    return BatchLoader(stream, batches, config.workers, config.max_bad_fraction, path)


def fingerprint(config: DataConfig) -> str:
    """SHA-256 over everything that decides which sample a slot holds.

    These are the manifests' fingerprints in order, the weights, the seed and the order's constants;
    a data cursor is valid only under the same fingerprint.
    """
    total = sum(source.weight for source in config.sources)
    sources = [
        [read_manifest(source.path)["fingerprint"], repr(source.weight / total)]
        for source in config.sources
    ]
    identity = [sources, config.seed, LANES, CHUNK, WINDOW]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()
