"""The benchmark of rows: what it counts is what batches have, and stage 1 has less of it."""

import numpy as np
import pytest
import tool
from tiny_data import one_per_row

from megatron_owl2.config.load import load_config
from megatron_owl2.data.conversation import Sample
from megatron_owl2.data.row_length import row_alignment


@pytest.fixture(scope="module")
def bench():
    return tool.load("bench/rows.py")


@pytest.fixture(scope="module")
def config(bench):
    return load_config(bench.RECIPE)


def test_captions_are_as_long_as_they_are_said_to_be(bench, config):
    for sigma in bench.SIGMAS:
        rows = bench.caption_rows(config, sigma, 100_000)
        assert rows.mean() == pytest.approx(65 + 2 + bench.MEAN_TOKENS, rel=0.01)
        assert rows.min() >= 65 + 2 + 3 and rows.max() <= 256


def test_lengths_are_those_of_batches(bench, config):
    rows = bench.caption_rows(config, 0.7, 16 * 6)
    columns = [np.zeros(row, np.int64) for row in rows]
    samples = [Sample(column, column, column) for column in columns]
    groups = [samples[first : first + 16] for first in range(0, len(samples), 16)]
    found = [one_per_row(group, 0, 256, row_alignment(config)).length for group in groups]
    assert bench.padded_lengths(config, rows).tolist() == found and len(set(found)) > 1
    together = bench.padded_lengths(config, rows, 3).tolist()
    assert together == [max(found[:3])] * 3 + [max(found[3:])] * 3


def test_stage_1_has_far_fewer_positions(bench, config):
    for sigma in bench.SIGMAS:
        found = bench.figures(config, sigma, 2000)
        assert found["fewer positions"] > 1.6
        assert found["shapes"] <= 12
