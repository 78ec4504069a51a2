"""Global batches with a fixed number of samples of every group, however a run is cut."""

import hashlib
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from http_server import HttpServer
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import EXAMPLES
from streams import config, loader, pairs, rows_of
from tiny_data import encoded, make_image, write

from megatron_owl2.config.load import load_config
from megatron_owl2.config.schema import DataConfig, SourceConfig, StorageConfig
from megatron_owl2.config.validate import validate_settings
from megatron_owl2.data.sampling.grouped_order import GroupedOrder, SampleGroup
from megatron_owl2.data.sampling.phases import first_phase, resume, to_json
from megatron_owl2.data.shards.dataset import open_sources
from megatron_owl2.data.shards.records import Record, Turn
from megatron_owl2.data.training_order import TrainingOrder
from megatron_owl2.errors import ConfigError

TEXT, MULTIMODAL, BATCH, STEPS = 8, 16, 24, 12


def texts(source: str, count: int):
    return (Record(f"{source}{i:04d}", turns=(Turn(f"say {i}", source),)) for i in range(count))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> DataConfig:
    """Text of 24 and 40 samples that come alike, and 100 samples with images."""
    root = tmp_path_factory.mktemp("groups")
    write(root / "a", texts("a", 24), samples_per_shard=7)
    write(root / "b", texts("b", 40), samples_per_shard=16)
    write(root / "c", pairs("c", 100), samples_per_shard=30)
    found = config(groups={"text": TEXT, "multimodal": MULTIMODAL})
    found.sources = [
        SourceConfig(str(root / "a"), 0.5, "text"),
        SourceConfig(str(root / "c"), 3, "multimodal"),
        SourceConfig(str(root / "b"), 0.5, "text"),
    ]
    return found


def stretch(data: DataConfig, first: int, steps: int, ranks: int, micro: int, workers: int = 0):
    """The rows of some global batches as fresh loaders of all ranks give them, by index."""
    data.workers = workers
    found: dict[int, tuple] = {}
    for rank in range(ranks):
        limit, start = steps * BATCH, first * BATCH
        batches = loader(data, start, rank, ranks, micro, limit_samples=limit)
        found |= rows_of(batches)
    data.workers = 0
    return found


@pytest.fixture(scope="module")
def expected(data):
    rows = stretch(data, 0, STEPS, 1, BATCH)
    assert sorted(rows) == list(range(BATCH * STEPS))
    return rows


def keys_of_step(rows: dict[int, tuple], step: int) -> list[str]:
    return [rows[index][0] for index in range(step * BATCH, (step + 1) * BATCH)]


def test_every_step_has_the_counts_of_its_groups(expected):
    for step in range(STEPS):
        assert Counter(key[0] == "c" for key in keys_of_step(expected, step)) == {
            False: TEXT,
            True: MULTIMODAL,
        }


def test_a_group_has_its_own_epochs_and_weights(expected):
    """96 texts are one epoch of 40 of each, whose 24 come twice in part, and the begin of another;
    192 samples with images nearly two of 100."""
    keys = [key for step in range(STEPS) for key in keys_of_step(expected, step)]
    text, multimodal = ([k for k in keys if (k[0] == "c") == c] for c in (False, True))
    epoch = Counter(text[:80])
    of_a, of_b = ({k: n for k, n in epoch.items() if k[0] == source} for source in "ab")
    assert of_b == {f"b{i:04d}": 1 for i in range(40)}
    assert of_a.keys() == {f"a{i:04d}" for i in range(24)} and set(of_a.values()) == {1, 2}
    assert sum(of_a.values()) == 40
    assert sorted(multimodal[:100]) == [f"c{i:04d}" for i in range(100)]
    assert len(set(multimodal[100:])) == 92 and multimodal[:92] != multimodal[100:]


@pytest.mark.parametrize(
    ("ranks", "micro", "workers"), [(1, 3, 1), (2, 4, 0), (3, 8, 0), (4, 2, 2), (8, 3, 0)]
)
def test_every_layout_has_the_same_global_batches(data, expected, ranks, micro, workers):
    assert stretch(data, 0, STEPS, ranks, micro, workers) == expected


def test_layouts_may_change_at_every_stop(data, expected):
    found: dict[int, tuple] = {}
    for first, (ranks, micro) in enumerate([(1, 24), (2, 3), (8, 1), (4, 6), (3, 2), (12, 2)]):
        found |= stretch(data, 2 * first, 2, ranks, micro)
    assert found == expected


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_ranks_have_as_much_of_a_group_in_every_micro_batch(data, ranks):
    """So none waits for another that has the images."""
    found = []
    for rank in range(ranks):
        batches = loader(data, 0, rank, ranks, 1, limit_samples=2 * BATCH)
        found.append([key[0] == "c" for batch in batches for key in batch.keys])
    assert all(mine == found[0] for mine in found)


@pytest.mark.parametrize("workers", [0, 2])
def test_remote_groups_are_read_ahead(data, expected, tmp_path, workers):
    """The images from a server, texts from a folder: each of the four blocks comes once."""
    with HttpServer(Path(data.sources[1].path)) as server:
        sources = [data.sources[0], SourceConfig(server.url, 3, "multimodal"), data.sources[2]]
        storage = StorageConfig(cache=str(tmp_path / "cache"), attempts=4, timeout=5.0)
        remote = DataConfig(**vars(data) | {"sources": sources, "storage": storage})
        assert stretch(remote, 0, STEPS, 2, 4, workers) == expected
        tars = [server.ranges(f"shard-{number:06d}.tar") for number in range(4)]
        assert [len(ranges) for ranges in tars] == [1] * 4


def test_a_substitute_is_of_the_same_group(data, tmp_path):
    broken = Record("d0000", images=(encoded(make_image(9, 200, 100))[:-300],), caption="d")
    records = [broken, *pairs("c", 3)]
    write(tmp_path / "d", records)
    sources = [data.sources[0], SourceConfig(str(tmp_path / "d"), 1, "multimodal")]
    changed = DataConfig(**vars(data) | {"sources": sources})
    batches = list(loader(changed, micro=BATCH, limit_samples=2 * BATCH))
    for batch in batches:
        assert Counter(key[0] for key in batch.keys) == {"a": TEXT, "c": MULTIMODAL}
    assert sum(batch.bad for batch in batches) >= 8


def test_a_resumed_run_goes_on_with_the_same_groups_or_is_told_why_not(data):
    datasets = open_sources(data)
    recorded = to_json([first_phase(data, datasets)])
    assert resume(recorded, data, datasets, 48, "ckpt") == [first_phase(data, datasets)]
    shares = [source["weight"] for source in recorded[0]["sources"]]
    assert shares == pytest.approx([1 / 6, 2 / 3, 1 / 6])

    def other(**changes) -> DataConfig:
        return DataConfig(**vars(data) | changes)

    renamed = [SourceConfig(s.path, s.weight, s.group[::-1]) for s in data.sources]
    groups = {name[::-1]: count for name, count in data.groups.items()}
    same = other(sources=renamed, groups=groups)
    assert resume(recorded, same, datasets, 48, "ckpt")[0].number == 1
    alone = [SourceConfig(s.path, share) for s, share in zip(data.sources, shares, strict=True)]
    for changed in (
        other(groups={"text": 12, "multimodal": 12}),
        other(groups={"multimodal": MULTIMODAL, "text": TEXT}),
        other(groups={}, sources=alone),
    ):
        with pytest.raises(ConfigError, match=r"data.sources \(with data.groups\).* data.phase=2"):
            resume(recorded, changed, datasets, 48, "ckpt")
        changed.phase = 2
        assert resume(recorded, changed, datasets, 48, "ckpt")[1].start_sample == 48


group = st.tuples(
    st.lists(st.lists(st.integers(1, 400), min_size=1, max_size=4), min_size=1, max_size=2),
    st.integers(1, 12),
)


@settings(max_examples=30)
@given(groups=st.lists(group, min_size=1, max_size=3), seed=st.integers(0, 2**32))
def test_any_groups_have_every_sample_once_in_their_epochs(groups, seed):
    sizes = [shards for sets, _ in groups for shards in sets]
    numbers = iter(range(len(sizes)))
    members = [tuple(next(numbers) for _ in sets) for sets, _ in groups]
    order = GroupedOrder(
        sizes,
        [
            SampleGroup(str(mine), mine, tuple(float(sum(sizes[i])) for i in mine), per_batch)
            for mine, (_, per_batch) in zip(members, groups, strict=True)
        ],
        seed,
    )
    batch = sum(per_batch for _, per_batch in groups)
    start = 0
    for mine, (_, per_batch) in zip(members, groups, strict=True):
        epoch = sum(map(sum, (sizes[i] for i in mine)))
        steps = range(-(-epoch // per_batch))
        indices = [step * batch + start + place for step in steps for place in range(per_batch)]
        found = [order.sample_at(index) for index in indices]
        assert len(set(found[:epoch])) == epoch and {sample[0] for sample in found} <= set(mine)
        for index in indices[:: max(1, len(indices) // 5)]:
            following = order.next_shuffle_block(index)
            assert following > index
            assert order.shuffle_block(following) != order.shuffle_block(index)
            assert order.shuffle_block(following)[1] == order.shuffle_block(index)[1]
            dataset, shard, sample = order.sample_at(index)
            read = {(d, s, first - first % 256) for d, s, first in order.blocks(index)}
            assert (dataset, shard, sample - sample % 256) in read
        start += per_batch


@pytest.mark.parametrize(("ranks", "on_node"), [(1, 1), (4, 2), (8, 4), (16, 8), (48, 8)])
def test_streams_of_nodes_are_those_that_their_ranks_read(ranks, on_node):
    groups = [SampleGroup("a", (0,), (1.0,), 16), SampleGroup("b", (1,), (1.0,), 32)]
    order = GroupedOrder([[1000] * 300, [1000] * 20], groups, 1)
    read: list[set] = [set() for _ in range(ranks // on_node)]
    for index in range(48 * 64):
        rank = next(r for r in range(ranks) if order.residue(r, ranks) == index % ranks)
        read[rank // on_node].add(order.shuffle_block(index)[1])
    assert order.streams_of_nodes(ranks, on_node) == [len(node) for node in read]


A, B = "{path: a, group: text}", "{path: b, group: multimodal}"
TINY = ["train.global_batch_size=8", "train.micro_batch_size=4", f"data.sources=[{A}, {B}]"]
GROUPS = "data.groups={text: 2, multimodal: 6}"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            [GROUPS, f"data.sources=[{A}, {{path: b, group: multi}}]"],
            "has text, multimodal; give it one of these",
        ),
        (
            [GROUPS, f"data.sources=[{A}, {{path: b}}]"],
            r"sources\[1\].group is '', and data.groups has text",
        ),
        ([f"data.sources=[{A}]"], "group is 'text', but data.groups is empty; say there how many"),
        ([GROUPS, f"data.sources=[{A}]"], "has 'multimodal', but none of data.sources; give one"),
        (["data.groups={text: 8, x: 0}", f"data.sources=[{A}]"], "data.groups.x is 0; it must be"),
        (["data.groups={text: 2, multimodal: 2}"], "adds up to 4 samples .*_batch_size is 8; ch"),
        ([GROUPS, "data.packing=true"], "a packed row has several; set data.packing=false"),
        ([GROUPS, "train.epochs=1"], "train.epochs is 1, but every group .* give train.steps"),
        (
            [GROUPS, f"data.sources=[{A}, {{path: c, group: text, weight: 0}}, {B}]"],
            "to all sources of the group text or to none",
        ),
    ],
)
def test_groups_that_are_no_batch_are_refused(overrides, message):
    changed = load_config(EXAMPLES / "tiny/pretrain.yaml", [*TINY, *overrides])
    with pytest.raises(ConfigError, match=message):
        validate_settings(changed, 2)


def test_groups_may_have_different_kinds_of_weights():
    sizes = "{path: b, group: multimodal, weight: 0}"
    changed = load_config(
        EXAMPLES / "tiny/pretrain.yaml", [*TINY, GROUPS, f"data.sources=[{A}, {sizes}]"]
    )
    validate_settings(changed, 2)


def test_an_empty_data_set_is_named_with_its_group(data):
    sets: list[Any] = [SimpleNamespace(sizes=[3], fingerprint="x") for _ in range(3)]
    sets[2].sizes = []
    with pytest.raises(ConfigError, match="data.sources: group text: data set 1 is empty"):
        TrainingOrder(data, sets, SimpleNamespace(number=1, start_sample=0))  # pyright: ignore


class _Stored:
    """What the order needs of a data set."""

    def __init__(self, fingerprint: str, sizes: list[int]):
        self.fingerprint, self.sizes = fingerprint, sizes

    def __len__(self) -> int:
        return sum(self.sizes)


def test_without_groups_order_and_fingerprint_are_those_of_earlier_versions():
    stored: list[Any] = [_Stored("f0", [700, 512, 3]), _Stored("f1", [2000])]
    earlier = DataConfig(sources=[SourceConfig("p", 2), SourceConfig("q", 1)], seed=7)
    phase = first_phase(earlier, stored)
    order = TrainingOrder(earlier, stored, phase)
    found = [order.samples.sample_at(*order.row(index)) for index in range(order.rows(2))]
    assert found[:5] == [(0, 1, 387), (1, 0, 0), (0, 0, 339), (0, 1, 224), (1, 0, 425)]
    assert hashlib.sha256(json.dumps(found).encode()).hexdigest() == (
        "56e046c97d43cf13e231e6274221f76f82da3832c49729b2223cc40773ddda6b"
    )
    assert phase.fingerprint == "24f52dddb8553909ac9f460b0bc671ca42796047f1dcadb32f2c69324c340cb9"
