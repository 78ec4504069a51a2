"""Placeholders expanded to vision rows, and the index of those rows, checked by hand."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_owl2.data.image_tokens import (
    IGNORE_INDEX,
    IMAGE_TOKEN_ID,
    TEXT,
    VISION,
    expand_placeholders,
    vision_token_index,
)


def test_the_ids_of_the_official_code():
    assert (IMAGE_TOKEN_ID, IGNORE_INDEX, TEXT, VISION) == (-200, -100, 0, 1)


def test_a_placeholder_becomes_the_rows_of_its_images():
    row = expand_placeholders([1, -200, 7, -200], 3, [10, 11, 12, 13], [1, 2])
    assert row.tokens.tolist() == [1, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0]
    assert row.labels.tolist() == [10, -100, -100, -100, 12, *[-100] * 6]
    assert row.modality.tolist() == [0, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1]
    assert row.origin.tolist() == [0, 1, 1, 1, 2, 3, 3, 3, 3, 3, 3]
    assert {a.dtype for a in vars(row).values()} == {np.dtype("int64")}


def test_without_labels_all_are_ignored_and_without_placeholder_nothing_moves():
    row = expand_placeholders(torch.tensor([1, 5, 6]), 3)
    assert row.tokens.tolist() == [1, 5, 6] and row.labels.tolist() == [-100] * 3
    assert row.origin.tolist() == [0, 1, 2] and not row.modality.any()


def test_the_index_counts_rows_of_flattened_sequence_first_hidden_states():
    modality = torch.tensor([[0, 1, 1, 0], [0, 0, 0, 0], [1, 0, 0, 1]])
    index = vision_token_index(modality)
    assert index.tolist() == [1 * 3 + 0, 2 * 3 + 0, 0 * 3 + 2, 3 * 3 + 2]
    assert index.dtype == torch.int64
    assert modality.t().flatten()[index].all()
    assert vision_token_index(torch.zeros(2, 3, dtype=torch.int64)).shape == (0,)


@given(
    st.lists(st.sampled_from([-200, 1, 5, 9]), min_size=1, max_size=12),
    st.integers(1, 4),
    st.data(),
)
def test_expansion_equals_one_id_after_the_other(ids, size, data):
    counts = [data.draw(st.integers(1, 3)) for _ in range(ids.count(-200))]
    labels = list(range(len(ids)))
    wanted, remaining = [], iter(counts)
    for i, token in enumerate(ids):
        if token == -200:
            wanted += [(0, -100, 1, i)] * (size * next(remaining))
        else:
            wanted.append((token, labels[i], 0, i))
    row = expand_placeholders(ids, size, labels, counts)
    assert [*zip(row.tokens, row.labels, row.modality, row.origin, strict=True)] == wanted
