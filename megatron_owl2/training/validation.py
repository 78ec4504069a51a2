"""Validation loss: the mean loss per target on data that is not trained on, per source."""

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import PurePosixPath

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_owl2.config.schema import RunConfig
from megatron_owl2.data.batch import Batch
from megatron_owl2.data.row_length import row_alignment
from megatron_owl2.data.sample_builder import SampleBuilder
from megatron_owl2.data.sampling.packed_order import Packing
from megatron_owl2.data.shards.dataset import ShardedDataset, open_dataset
from megatron_owl2.data.tokenizer import Tokenizer
from megatron_owl2.data.training_order import load_packing
from megatron_owl2.data.validation_dataset import ValidationDataset
from megatron_owl2.errors import DataError
from megatron_owl2.mcore import setup
from megatron_owl2.training.from_rank_0 import from_rank_0
from megatron_owl2.training.metrics.accumulator import mean_losses
from megatron_owl2.training.step import SUMS, evaluate

_logger = logging.getLogger(__name__)


def open_validation(
    config: RunConfig, tokenizer: Tokenizer
) -> list[tuple[ShardedDataset, Packing | None]]:
    """The data sets of `validation.sources`, and how they are packed; all ranks together. Raises
    what opening a data set and reading its lengths raises."""
    paths = config.validation.sources if config.validation.interval else []
    datasets = from_rank_0(lambda: [open_dataset(path, config.data.storage) for path in paths])
    packings = from_rank_0(lambda: [load_packing(config, [d], tokenizer) for d in datasets])
    return list(zip(datasets, packings, strict=True))


class Validator:
    """Validation on the sources of `validation.sources`, the same samples every time.

    The losses do not depend on the parallel configuration, but for the order in which fp32 numbers
    are added up (and for FP8, whose scales depend on who shares a micro-batch): every sample counts
    once.
    """

    def __init__(
        self,
        config: RunConfig,
        groups: ProcessGroupCollection,
        builder: SampleBuilder,
        sources: Sequence[tuple[ShardedDataset, Packing | None]],
    ):
        self._config, self._groups = config, groups
        parallel = config.parallel
        # Pipeline stages exchange tensors of one shape, and all micro-batches are one schedule.
        one_shape = config.data.sequence_length if parallel.pipeline > 1 else None
        alignment = one_shape or row_alignment(config)
        self._named: set[tuple[str, str]] = set()  # bad samples that were logged
        self._model_ranks = parallel.tensor * parallel.pipeline * parallel.context
        self._sources = [
            ValidationDataset(dataset, config.validation.samples, builder, alignment, packing)
            for dataset, packing in sources
        ]

    def due(self, step: int) -> bool:
        """Whether there is a validation after this step."""
        interval = self._config.validation.interval
        last = step == self._config.train.steps
        return bool(interval and (last or step % interval == 0))

    def run(
        self, chunks: Sequence[DistributedDataParallel], begin: Callable[[str], None]
    ) -> list[dict]:
        """Losses of every source; all ranks together. `begin` is told the name of each.

        Each has its `name` and `path`, `loss` over all targets, `image_loss` and `text_loss` over
        those of samples with and without an image (None where there are no targets), the number of
        `samples`, and of those that are `bad` and left out.
        """
        names = _names(self._config.validation.sources)
        for chunk in chunks:
            chunk.eval()
        try:
            found = []
            paths = self._config.validation.sources
            for name, path, source in zip(names, paths, self._sources, strict=True):
                begin(name)
                found.append({"name": name, "path": path, **self._losses(chunks, source)})
            return found
        finally:
            for chunk in chunks:
                chunk.train()

    def close(self) -> None:
        """Close the files of the sources."""
        for source in self._sources:
            source.dataset.close()

    def _losses(self, chunks: Sequence[DistributedDataParallel], source: ValidationDataset) -> dict:
        shares = list(self._micro_batches(len(source)))
        bad = [0]
        sums = evaluate(self._config, chunks, self._read(source, shares, bad), len(shares))
        self._check_agreement(bad[0], source, [self._groups.mp, self._groups.cp])
        totals = torch.cat([sums, sums.new_tensor(bad)])
        torch.distributed.all_reduce(totals)
        *values, lost = totals.tolist()
        lost = round(lost / self._model_ranks)
        return {
            **mean_losses(dict(zip(SUMS, values, strict=True))),
            "samples": source.samples - lost,
            "bad": lost,
        }

    def _check_agreement(
        self, bad: int, source: ValidationDataset, groups: Sequence[torch.distributed.ProcessGroup]
    ) -> None:
        """Raise DataError if ranks that read the same found other samples bad."""
        extremes = torch.tensor([bad, -bad], device=setup.device())
        for group in groups:
            if group.size() > 1:
                torch.distributed.all_reduce(extremes, torch.distributed.ReduceOp.MAX, group=group)
        most, negated_least = extremes.tolist()
        if most != -negated_least:
            raise DataError(
                f"the ranks of one model found {-negated_least} to {most} bad samples in "
                f"{source.dataset.location}: a copy of the data or a cache is damaged on one of "
                "their nodes; run owl2 check-data there"
            )

    def _micro_batches(self, count: int) -> Iterator[list[int]]:
        """The samples of each micro-batch of this data-parallel rank; all ranks have as many.

        Numbers from `count` on are empty rows.
        """
        rank, ranks = self._groups.dp.rank(), self._groups.dp.size()
        size, parallel = self._config.train.micro_batch_size, self._config.parallel
        batches = -(-count // (ranks * size))
        if parallel.virtual_pipeline > 1:  # its schedule takes rounds of the pipeline
            batches = -(-batches // parallel.pipeline) * parallel.pipeline
        numbers = itertools.count(rank, ranks)
        for _ in range(batches):
            yield list(itertools.islice(numbers, size))

    def _read(
        self, source: ValidationDataset, shares: Sequence[list[int]], bad: list[int]
    ) -> Iterator[Batch]:
        tp, cp = self._groups.tp, self._groups.cp
        for numbers in shares:
            batch = source[numbers]
            # Before the forward pass, whose collectives would not fit together. Pipeline stages,
            # which read at different times, are compared at the end.
            if tp.size() * cp.size() > 1:
                self._check_agreement(len(batch.bad_samples), source, [tp, cp])
            for sample in batch.bad_samples:
                place = (source.dataset.location, f"{sample.shard} {sample.offset}")
                if place not in self._named:
                    self._named.add(place)
                    where = f"{sample.dataset}/{sample.shard} at byte {sample.offset}"
                    _logger.warning("validation leaves out %s: %s", where, sample.reason)
                bad[0] += 1
            yield batch.local_to(cp.rank(), cp.size()).to(setup.device())


def _names(paths: Sequence[str]) -> list[str]:
    """The last part of every path, or all of it where that is not unique."""
    names = [PurePosixPath(path).name or path for path in paths]
    return [
        name if names.count(name) == 1 else path for name, path in zip(names, paths, strict=True)
    ]
