"""The stream: the same batches for any workers, ranks and starting point; the bad are accounted."""

import json
import os

import pytest
import torch
from streams import SIZE, assert_equal, config, loader, rows_of, two_sets
from tiny_data import LetterTokenizer, encoded, make_image, record, write

from megatron_owl2.config.schema import StorageConfig
from megatron_owl2.data.bad_samples import drop_after, path_of
from megatron_owl2.data.image_resize import SquareResize
from megatron_owl2.data.images import decode
from megatron_owl2.data.sampling.phases import first_phase, resume, to_json
from megatron_owl2.data.shards.dataset import ShardedDataset, open_sources
from megatron_owl2.data.shards.records import Record
from megatron_owl2.errors import ConfigError, DataError, StorageError

pytestmark = pytest.mark.slow

BROKEN = encoded(make_image(9, 200, 100))[:-300]


class Exploding(LetterTokenizer):
    """Fails on one text, as a bug would."""

    def encode(self, text):
        if text == "it is 5":
            raise RuntimeError("tokenizer exploded")
        return super().encode(text)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return two_sets(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_do_not_depend_on_the_number_of_workers(folders, workers):
    alone = list(loader(config(*folders), limit_samples=44))
    with_workers = list(loader(config(*folders, workers=workers), limit_samples=44))
    assert len(alone) == len(with_workers) == 11
    for a, b in zip(alone, with_workers, strict=True):
        assert_equal(a, b)


@pytest.mark.parametrize("ranks, workers", [(2, 0), (2, 1), (3, 0)])
def test_samples_hold_the_same_for_any_number_of_ranks(folders, ranks, workers):
    data = config(*folders)
    expected = rows_of(loader(data, limit_samples=96))
    assert sorted(expected) == list(range(96))
    found = {}
    data.workers = workers
    for rank in range(ranks):
        batches = list(loader(data, rank=rank, ranks=ranks, micro=8, limit_samples=96))
        sample_indices = [
            sample_index for batch in batches for sample_index in batch.sample_indices.tolist()
        ]
        assert sample_indices == list(range(rank, 96, ranks))
        found |= rows_of(batches)
    assert found == expected


def test_resuming_at_any_sample_continues_exactly(folders):
    data = config(*folders)
    whole = list(loader(data, micro=3, limit_samples=240))  # more than one epoch
    for start in (3, 60, 150, 237):
        rest = list(loader(data, start=start, micro=3, limit_samples=240 - start))
        for a, b in zip(whole[start // 3 :], rest, strict=True):
            assert_equal(a, b)


def test_iterating_leaves_the_global_random_state_alone(folders):
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    for _ in loader(config(*folders, workers=1), limit_samples=4):
        pass
    assert torch.equal(torch.rand(1), expected)


def test_one_epoch_holds_every_sample_by_its_weight(folders):
    # 60 samples are 0.6 of it; 25 come 1.6 times
    assert loader(config(*folders))._dataset.order.rows(1) == 100
    keys = [key for batch in loader(config(*folders), limit_samples=100) for key in batch.keys]
    counts = {key: keys.count(key) for key in keys}
    assert len(counts) == 85
    assert all(count == 1 for key, count in counts.items() if key[0] == "a")
    assert sum(count for key, count in counts.items() if key[0] == "b") == 40


@pytest.mark.parametrize("to_square", [SquareResize(), SquareResize("pad")], ids=lambda s: s.mode)
def test_plain_resize_shows_the_whole_image(folders, to_square):
    data = config(folders[0], augment=False)
    images = {r.key: r.images for r in (record(i, "a") for i in range(60))}
    for batch in loader(data, limit_samples=40, to_square=to_square):
        with_image = [key for key in batch.keys if images[key]]
        for key, image in zip(with_image, batch.image, strict=False):
            assert torch.equal(image, to_square(decode(images[key][0]), SIZE))


def test_a_sample_is_cropped_anew_in_every_epoch(folders):
    data = config(folders[0], augment=True)
    epochs = [
        {
            value[0]: value[3]
            for value in rows_of(loader(data, start=e * 60, limit_samples=60)).values()
        }
        for e in (0, 1)
    ]
    assert epochs[0].keys() == epochs[1].keys() and len(epochs[0]) == 60
    with_image = [key for key, pixels in epochs[0].items() if pixels]
    assert len(with_image) == 40
    assert sum(epochs[0][key] == epochs[1][key] for key in with_image) == 0


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """Every fifth of 50 records has an image that cannot be decoded."""

    def records():
        for i in range(50):
            image = BROKEN if i % 5 == 0 else encoded(make_image(i))
            yield Record(f"k{i:03d}", images=(image,), caption=str(i))

    return write(tmp_path_factory.mktemp("damaged") / "set", records())


@pytest.mark.parametrize("change", [dict(workers=2), dict(decode_images=False), dict(ranks=2)])
def test_bad_samples_are_substituted_and_listed_identically(damaged, tmp_path, change):
    def run(name, workers=0, ranks=1, **options):
        logs, batches = [], []
        for rank in range(ranks):
            logs.append(tmp_path / f"{name}{rank}.jsonl")
            batches += loader(
                config(damaged, workers=workers),
                rank=rank,
                ranks=ranks,
                micro=2,
                limit_samples=100,
                bad_sample_log=logs[-1],
                **options,
            )
        lines = [json.loads(line) for path in logs for line in path.open()]
        return batches, sorted(lines, key=lambda line: line["slot"])

    batches, bad_log = run("plain")
    others, other_log = run("other", **change)
    assert bad_log == other_log
    keys, other_keys = ({s: v[0] for s, v in rows_of(b).items()} for b in (batches, others))
    if "decode_images" in change:
        for a, b in zip(batches, others, strict=True):
            assert b.image.shape == (2, 3, 0, 0)
            assert_equal(a, b, ignore=["image"])
    else:
        assert rows_of(batches) == rows_of(others)
    assert keys == other_keys

    # Every broken sample is met once an epoch, and none reaches a batch.
    assert all(int(key[1:]) % 5 for key in keys.values())
    sample_indices = {line["slot"] for line in bad_log}
    assert len(sample_indices) == sum(batch.bad for batch in batches) == 20
    first = next(line for line in bad_log if line["key"] == "k005")
    start, _ = ShardedDataset(damaged).range_of(0, 5)
    place = (str(damaged), "shard-000000.tar", start)
    assert (first["dataset"], first["shard"], first["offset"]) == place
    assert "cannot be decoded" in first["reason"]


def test_damage_in_a_shard_is_a_bad_sample(folders, tmp_path):
    folder = write(tmp_path / "set", (record(i, "a") for i in range(20)))
    name, (offset, _) = "shard-000001.tar", ShardedDataset(folder).range_of(1, 3)
    path = folder / name
    data = bytearray(path.read_bytes())
    data[offset + 1] ^= 1
    path.write_bytes(data)
    bad_log = tmp_path / "bad.jsonl"
    batches = list(loader(config(folder), limit_samples=20, bad_sample_log=bad_log))
    assert sum(batch.bad for batch in batches) == 1
    entry = json.loads(bad_log.read_text().splitlines()[0])
    assert entry["key"] is None and (entry["shard"], entry["offset"]) == (name, offset)
    assert "checksum" in entry["reason"]


def test_too_long_first_questions_are_bad_and_shortened_ones_counted(tmp_path):
    captions = ["x" * 10, "y" * 200, "z" * 20]
    items = [Record(f"k{i}", caption=c) for i, c in enumerate(captions * 4)]
    batches = list(loader(config(write(tmp_path / "s", items)), limit_samples=12))
    assert sum(len(batch.shortened) for batch in batches) == 4
    with pytest.raises(DataError, match=r"(?s)all unusable.*nothing to learn"):
        list(loader(config(tmp_path / "s", sequence_length=1), limit_samples=4))


def test_too_many_bad_samples_stop_the_run(tmp_path):
    def records():
        for i in range(200):
            image = BROKEN if i % 20 == 0 else encoded(make_image(0))
            yield Record(f"k{i:03d}", images=(image,), caption="x")

    folder = write(tmp_path / "s", records(), 100)
    bad_log = tmp_path / "bad.jsonl"
    batches = loader(config(folder, max_bad_fraction=0.04), micro=50, bad_sample_log=bad_log)
    seen = 0
    with pytest.raises(DataError, match=r"50 of 1000 samples \(5.00%\).*bad.jsonl"):
        for batch in batches:
            seen += len(batch.sample_indices)
    assert seen == 950
    assert len({json.loads(line)["slot"] for line in bad_log.open()}) == 50
    fine = loader(config(folder, max_bad_fraction=0.06), micro=50, limit_samples=2000)
    assert sum(batch.bad for batch in fine) == 100


def test_a_long_row_of_bad_samples_stops_the_run(tmp_path):
    items = (
        Record(f"k{i:03d}", (BROKEN if i % 2 else encoded(make_image(0)),), caption="x")
        for i in range(60)
    )
    data = config(write(tmp_path / "s", items))
    rows, row = [], 0
    for batch in loader(data, micro=2, limit_samples=60):
        bad = {sample.sample_index for sample in batch.bad_samples}
        for sample_index in batch.sample_indices.tolist():
            row = row + 1 if sample_index in bad else 0
            rows.append(row)
    longest = max(rows)
    assert data.max_bad_in_a_row == 100 and 3 < longest < 100
    data.max_bad_in_a_row = longest + 1
    assert len(list(loader(data, micro=2, limit_samples=60))) == 30
    data.max_bad_in_a_row = longest
    batches = []
    with pytest.raises(DataError, match=f"{longest} samples in a row"):
        for batch in loader(data, micro=2, limit_samples=60):
            batches.append(batch)
    assert len(batches) == rows.index(longest) // 2


def test_nothing_usable_is_a_clear_error(tmp_path):
    items = [Record(f"k{i}", images=(BROKEN,), caption="x") for i in range(20)]
    with pytest.raises(
        DataError, match=r"sample 0 and 8 substitutes for it are all unusable:(\n.*){9}"
    ):
        next(iter(loader(config(write(tmp_path / "s", items)))))


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_that_are_not_the_datas_reach_the_trainer(folders, workers):
    batches = loader(config(folders[0], workers=workers), tokenizer=Exploding(), limit_samples=60)
    with pytest.raises(RuntimeError, match="tokenizer exploded") as caught:
        list(batches)
    text = str(caught.value) + " ".join(getattr(caught.value, "__notes__", ()))
    assert "sample 5 of shard-000000.tar" in text


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_vanishes_stops_the_run(tmp_path, workers):
    folder = write(tmp_path / "s", (record(i) for i in range(30)))
    os.unlink(folder / "shard-000002.tar")
    data = config(folder, workers=workers, storage=StorageConfig(attempts=2))
    with pytest.raises(StorageError, match="shard-000002.tar"):
        list(loader(data, limit_samples=28))


def test_fingerprint_changes_with_everything_that_changes_the_order(folders, tmp_path):
    def fingerprint(data):
        return first_phase(data, open_sources(data)).fingerprint

    base = fingerprint(config(*folders))
    assert fingerprint(config(*folders, weights=(6, 4), workers=5, augment=False)) == base
    copy = write(tmp_path / "copy", (record(i, "b") for i in range(25)), samples_per_shard=10)
    assert fingerprint(config(folders[0], copy)) == base  # the same data elsewhere
    other = write(tmp_path / "other", (record(i, "b") for i in range(25)), samples_per_shard=9)
    changed = [
        config(*folders, weights=(0.5, 0.5)),
        config(*folders, seed=4),
        config(*folders[::-1]),
        config(folders[0]),
        config(folders[0], other),
        config(*folders, phase=2),
    ]
    assert len({base, *map(fingerprint, changed)}) == 7


def test_batches_say_where_their_rows_come_from(folders):
    for batch in loader(config(*folders), limit_samples=100):
        assert [("a", "b")[i] for i in batch.sources.tolist()] == [key[0] for key in batch.keys]
        assert batch.measurements["bytes"] > 0 and batch.measurements["read_seconds"] > 0
        assert batch.image.is_contiguous(memory_format=torch.channels_last)


def test_data_may_change_only_in_a_new_phase(folders):
    data, other = config(*folders), config(*folders, weights=(0.5, 0.5))
    datasets = open_sources(data)
    recorded = to_json([first_phase(data, datasets)])
    assert resume(recorded, data, datasets, 96, "checkpoint") == [first_phase(data, datasets)]
    with pytest.raises(ConfigError, match=r"data.sources .* data.phase=2 .* from sample 96 on"):
        resume(recorded, other, datasets, 96, "checkpoint")
    other.phase = 2
    first, second = resume(recorded, other, datasets, 96, "checkpoint")
    assert (first.start_sample, second.start_sample, second.number) == (0, 96, 2)
    assert [source["weight"] for source in second.sources] == [0.5, 0.5]
    assert [source["samples"] for source in second.sources] == [60, 25]
    again = to_json([first, second])
    assert resume(json.loads(json.dumps(again)), other, datasets, 192, "checkpoint") == [
        first,
        second,
    ]
    for phase in (1, 4):
        other.phase = phase
        with pytest.raises(ConfigError, match=f"data.phase is {phase}.*made in phase 2"):
            resume(again, other, datasets, 192, "checkpoint")


def test_the_log_of_bad_samples_forgets_what_a_resumed_run_will_meet_again(tmp_path):
    for rank, sample_indices in ((0, (1, 5, 9)), (3, (2, 6))):
        lines = [json.dumps({"slot": sample_index}) + "\n" for sample_index in sample_indices]
        path_of(tmp_path, rank).write_text("".join(lines) + "\0\0\0\n" + '{"slot": 3')  # a crash
    drop_after(tmp_path, 6)
    assert path_of(tmp_path, 0).read_text() == '{"slot": 1}\n{"slot": 5}\n'
    assert path_of(tmp_path, 3).read_text() == '{"slot": 2}\n'
