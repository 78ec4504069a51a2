"""Packed training data: the same rows however a run is cut, nothing lost or skipped uncounted."""

import itertools
import json

import dialogues
import pytest
from tiny_data import write

from data_prep.measure import measure_lengths
from megatron_owl2.config.schema import DataConfig, SourceConfig
from megatron_owl2.config.templates import OWL2
from megatron_owl2.data.batch import Batch
from megatron_owl2.data.lengths import load_lengths
from megatron_owl2.data.loader import build_loader
from megatron_owl2.data.sample_builder import SampleBuilder
from megatron_owl2.data.sampling.packed_order import Packing
from megatron_owl2.data.sampling.phases import first_phase, resume, to_json
from megatron_owl2.data.shards.dataset import open_sources
from megatron_owl2.data.shards.records import Record
from megatron_owl2.data.tokenizer import Tokenizer, train_tokenizer
from megatron_owl2.data.training_order import TrainingOrder
from megatron_owl2.errors import ConfigError

ROW, ROWS_PER_IMAGE, BATCH = 64, 5, 8


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    words = [f"USER: say {i} ASSISTANT: it is picture number {i} sure? yes" for i in range(60)]
    return train_tokenizer(words, tmp_path_factory.mktemp("t") / "tokenizer.model", 320)


@pytest.fixture(scope="module")
def data(tmp_path_factory, tokenizer) -> DataConfig:
    """Two sources of 60 and 25 samples, of which an epoch has each once."""
    root = tmp_path_factory.mktemp("packed")
    sources = []
    for name, count in (("a", 60), ("b", 25)):
        records = [dialogues.dialogue(index, name) for index in range(count)]
        write(root / name, records, samples_per_shard=20)
        measure_lengths(root / name, tokenizer, OWL2)
        sources.append(SourceConfig(str(root / name), weight=0))
    return DataConfig(
        sources=sources,
        sequence_length=ROW,
        packing=True,
        images_per_row=3,
        workers=0,
        augment=True,
        max_bad_fraction=0.9,
    )


class Reader:
    """Loaders of the packed rows of a configuration."""

    def __init__(self, data: DataConfig, tokenizer: Tokenizer, epochs: int | None = None):
        self.data, self.tokenizer = data, tokenizer
        self.datasets = open_sources(data)
        lengths = [load_lengths(dataset, tokenizer, OWL2) for dataset in self.datasets]
        self.packing = Packing(lengths, ROWS_PER_IMAGE, ROW, data.images_per_row, BATCH)
        self.phase = first_phase(data, self.datasets, self.packing)
        self.order = TrainingOrder(data, self.datasets, self.phase, self.packing, epochs)

    def batches(self, first: int, steps: int, ranks: int = 1, rank: int = 0, micro=1, log=None):
        builder = SampleBuilder(self.tokenizer, OWL2, ROWS_PER_IMAGE, 8, ROW, 3)
        return build_loader(
            self.data,
            self.datasets,
            self.order,
            builder,
            row_alignment=ROW,
            micro_batch_size=micro,
            start_sample=first * BATCH,
            data_parallel_rank=rank,
            data_parallel_size=ranks,
            limit_samples=steps * BATCH,
            bad_sample_log=log,
        )


def rows_of(batches) -> dict[int, tuple]:
    """What each row index holds, pixels included."""
    found = {}
    for batch in batches:
        keys, images = iter(batch.keys), iter(batch.image)
        for row, index in enumerate(batch.sample_indices.tolist()):
            count = int(batch.modality[row].sum()) // ROWS_PER_IMAGE
            found[index] = (
                list(itertools.islice(keys, batch.samples_per_row[row])),
                batch.tokens[row].tolist(),
                batch.labels[row].tolist(),
                batch.packed.lengths[row],
                [image.numpy().tobytes() for image in itertools.islice(images, count)],
            )
    return found


def stretch(reader: Reader, first: int, steps: int, ranks: int, workers: int = 0) -> dict:
    reader.data.workers = workers
    found: dict[int, tuple] = {}
    for rank in range(ranks):
        found |= rows_of(reader.batches(first, steps, ranks, rank, micro=BATCH // ranks))
    reader.data.workers = 0
    return found


STEPS = 16  # three epochs


def test_ranks_workers_and_stops_change_nothing(data, tokenizer):
    """Fresh objects for every stop, as a resumed run has them."""
    expected = stretch(Reader(data, tokenizer), 0, STEPS, 1)
    assert len(expected) == BATCH * STEPS
    found: dict[int, tuple] = {}
    schedule = [(1, 0), (2, 0), (4, 1), (8, 0), (2, 2), (1, 1), (4, 0), (8, 0)]
    for number, (ranks, workers) in enumerate(schedule):
        found |= stretch(Reader(data, tokenizer), 2 * number, 2, ranks, workers)
    assert found == expected


def test_one_epoch_has_every_sample_once_and_ends(data, tokenizer):
    reader = Reader(data, tokenizer, epochs=1)
    rows = reader.order.rows(1)
    steps = -(-rows // BATCH)
    found = rows_of(reader.batches(0, steps))
    keys = sorted(key for row in found.values() for key in row[0])
    expected = [
        dialogues.dialogue(i, name).key for name, n in (("a", 60), ("b", 25)) for i in range(n)
    ]
    assert keys == sorted(expected)
    empty = [index for index, row in found.items() if not row[0]]
    assert len(empty) == steps * BATCH - rows and all(found[i][3] == (ROW,) for i in empty)
    assert rows < len(keys)


def test_bad_samples_of_a_row_are_left_out_listed_and_limited(data, tokenizer, tmp_path):
    def damaged(index: int) -> Record:
        record = dialogues.dialogue(index, "c")
        if index % 10 != 2:
            return record
        return Record(record.key, (b"\xff\xd8\xff" + bytes(40),) * 2, turns=record.turns)

    write(tmp_path / "c", map(damaged, range(40)))
    measure_lengths(tmp_path / "c", tokenizer, OWL2)
    values = vars(data) | {"sources": [SourceConfig(str(tmp_path / "c"))]}
    reader = Reader(DataConfig(**values), tokenizer, epochs=1)
    log = tmp_path / "bad.jsonl"
    steps = -(-reader.order.rows(1) // BATCH)
    batches: list[Batch] = list(reader.batches(0, steps, micro=2, log=log))
    keys = {key for batch in batches for key in batch.keys}
    bad = {f"c{index:05d}" for index in range(2, 40, 10)}
    assert keys == {f"c{index:05d}" for index in range(40)} - bad
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert {line["key"] for line in lines} == bad and len(lines) == 4
    assert sum(batch.bad for batch in batches) == 4
    assert sum(batch.asked for batch in batches) == 40
    for batch in batches:
        for line in batch.bad_samples:
            assert line.sample_index in batch.sample_indices.tolist()


def test_a_sample_that_is_longer_than_measured_is_left_out(data, tokenizer, tmp_path):
    """As when a shard was damaged as it was measured, and was copied again."""
    write(tmp_path / "d", [dialogues.dialogue(index, "d") for index in range(20)])
    measure_lengths(tmp_path / "d", tokenizer, OWL2)
    values = vars(data) | {"sources": [SourceConfig(str(tmp_path / "d"))]}
    reader = Reader(DataConfig(**values), tokenizer, epochs=1)
    for table in (reader.packing.lengths[0].text, reader.packing.lengths[0].images):
        table.flags.writeable = True
        table[:5] = 0
    steps = -(-reader.order.rows(1) // BATCH)
    batches: list[Batch] = list(reader.batches(0, steps))
    bad = [sample for batch in batches for sample in batch.bad_samples]
    assert bad and all("owl2 measure-lengths" in sample.reason for sample in bad)
    assert sum(len(batch.keys) for batch in batches) + len(bad) == 20
    assert max(int(batch.lengths.max()) for batch in batches) <= ROW


def test_a_run_goes_on_with_the_same_rows_or_is_told_why_not(data, tokenizer):
    reader = Reader(data, tokenizer)
    recorded = to_json([reader.phase])
    again = resume(recorded, data, reader.datasets, 24, "ckpt", reader.packing)
    assert again == [reader.phase] and again[0].group == BATCH
    wider = Packing(reader.packing.lengths, ROWS_PER_IMAGE, ROW, 4, 16)
    for packing in (wider, None):
        with pytest.raises(ConfigError, match="lengths or the limits of a row.*data.phase=2"):
            resume(recorded, data, reader.datasets, 24, "ckpt", packing)
    other = Packing(reader.packing.lengths, ROWS_PER_IMAGE, ROW, 3, 16)  # another batch size
    assert resume(recorded, data, reader.datasets, 24, "ckpt", other)[0].group == BATCH
