"""The same global batches, keys and pixels, however the run is cut into ranks, workers, resumes."""

import hashlib
import itertools
import json
import os
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from streams import config, loader, pairs, rows_of
from tiny_data import write

from megatron_owl2.data.sampling.phases import first_phase
from megatron_owl2.data.shards.dataset import open_sources

pytestmark = pytest.mark.slow

BATCH, STEPS = 24, 40  # 960 samples of 300 samples: more than three epochs
RANKS, WORKERS = (1, 2, 3, 4, 8), (0, 1, 2, 3)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("exact")
    folders = [
        write(root / "a", pairs("a", 200), samples_per_shard=37),
        write(root / "b", pairs("b", 100), samples_per_shard=64),
    ]
    return config(*folders, weights=(3, 2))


@pytest.fixture(scope="module")
def expected(data):
    """Sample index to (key, tokens, labels, pixels), by one process without workers."""
    rows = rows_of(loader(data, micro=8, limit_samples=BATCH * STEPS))
    assert len(rows) == BATCH * STEPS
    return rows


def stretch(data, first: int, steps: int, ranks: int, workers: int) -> dict[int, tuple]:
    """The rows of some global batches as `ranks` fresh loaders with `workers` workers give them."""
    data.workers = workers
    found: dict[int, tuple] = {}
    for rank in range(ranks):
        batches = loader(
            data,
            start=first * BATCH,
            rank=rank,
            ranks=ranks,
            micro=BATCH // ranks,
            limit_samples=steps * BATCH,
        )
        found |= rows_of(batches)
    data.workers = 0
    return found


def test_ranks_and_workers_may_change_at_every_stop(data, expected):
    """One run whose every two steps have another number of ranks and workers."""
    found: dict[int, tuple] = {}
    for index, (ranks, workers) in enumerate(itertools.product(RANKS, WORKERS)):
        found |= stretch(data, 2 * index, 2, ranks, workers)
    assert found == expected


@settings(max_examples=40)
@given(
    cuts=st.lists(st.integers(1, STEPS - 1), max_size=5),
    ranks=st.lists(st.sampled_from(RANKS), min_size=6, max_size=6),
)
def test_any_schedule_of_stops_gives_the_same_run(data, expected, cuts, ranks):
    stops = [0, *sorted(set(cuts)), STEPS]
    found: dict[int, tuple] = {}
    for (first, end), number in zip(itertools.pairwise(stops), ranks, strict=False):
        found |= stretch(data, first, end - first, number, workers=0)
    assert found == expected


def test_every_sample_comes_exactly_once_in_an_epoch(data, expected):
    alone = config(data.sources[0].path, weights=(1,))
    epochs = rows_of(loader(alone, micro=10, limit_samples=600))
    for epoch in range(3):
        keys = sorted(
            epochs[sample_index][0] for sample_index in range(epoch * 200, epoch * 200 + 200)
        )
        assert keys == [f"a{i:04d}" for i in range(200)]
    orders = {
        tuple(epochs[sample_index][0] for sample_index in range(e * 200, e * 200 + 200))
        for e in range(3)
    }
    assert len(orders) == 3


def digest(rows: dict[int, tuple]) -> str:
    whole = hashlib.sha256()
    for sample_index in sorted(rows):
        key, tokens, labels, pixels = rows[sample_index]
        whole.update(json.dumps([sample_index, key, tokens, labels]).encode() + pixels)
    return whole.hexdigest()


@pytest.mark.parametrize("step", [1, 17, STEPS - 1])
def test_a_fresh_process_continues_from_any_step(data, expected, step):
    paths = [source.path for source in data.sources]
    program = (
        "import test_exactness as t;"
        f"d = t.config(*{paths!r}, weights=(3, 2));"
        f"print(t.digest(t.stretch(d, {step}, {STEPS - step}, 2, 1)))"
    )
    here = os.path.dirname(__file__)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([here, os.environ["PYTHONPATH"]]),
        "PYTHONHASHSEED": str(step),
    }
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    rest = {
        sample_index: row for sample_index, row in expected.items() if sample_index >= step * BATCH
    }
    assert done.stdout.strip() == digest(rest)


def test_a_later_phase_starts_its_own_order_at_its_sample(data, expected):
    """Sample index 100 of a phase that starts there is drawn like sample index 0 of one that starts
    at 0."""
    phase = first_phase(data, open_sources(data))
    phase.start_sample = 100
    rows = rows_of(loader(data, start=100, micro=10, limit_samples=200, phase=phase))
    for sample_index in range(200):
        assert rows[100 + sample_index][0] == expected[sample_index][0]
        assert rows[100 + sample_index][1:3] == expected[sample_index][1:3]
    # The crops belong to the sample index of the run, so that no phase repeats them.
    assert (
        sum(rows[100 + sample_index][3] == expected[sample_index][3] for sample_index in range(200))
        < 5
    )
    data.phase = 2
    other = rows_of(loader(data, micro=10, limit_samples=200))
    data.phase = 1
    assert (
        sum(other[sample_index][0] == expected[sample_index][0] for sample_index in range(200)) < 20
    )
