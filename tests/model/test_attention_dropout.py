"""Dropout of the abstractor's attention: masks by a hash, the same in every layout."""

import pytest
import torch
from small_configs import run_config

from megatron_owl2.config.schema import ParallelConfig
from megatron_owl2.mcore import setup
from megatron_owl2.mcore.parallel import ParallelContext
from megatron_owl2.model.attention import attend, attend_dropping
from megatron_owl2.model.dropout import image_keys, keep_probabilities


@pytest.fixture
def context():
    yield ParallelContext(run_config(), setup.initialize(ParallelConfig()))
    setup.shutdown()


def test_masks_keep_their_share_and_are_not_alike(context):
    index = torch.arange(0, 40 * 16, 16) * 3  # rows 0, 0, ... of 3, at growing positions
    keys = image_keys(context, torch.tensor([5, 6, 7]), index, 1, 40)
    shape = torch.Size([40, 4, 16, 81])
    kept = keep_probabilities(keys, shape, 0, "abstractor.0", 0.1)
    other = keep_probabilities(keys, shape, 0, "abstractor.1", 0.1)
    for axis in range(4):  # no image, head, query or key is dropped more than others
        share = kept.double().mean([d for d in range(4) if d != axis])
        count = kept.numel() / kept.shape[axis]
        assert (share - 0.9).abs().max() < 5 * (0.09 / count) ** 0.5
    both = (~kept & ~other).double().mean()
    assert both == pytest.approx(0.01, abs=5 * (0.01 / kept.numel()) ** 0.5)
    dropped = (~kept).double().flatten(0, 2)
    pairs = (dropped[:-1] * dropped[1:]).mean()  # of neighbouring queries
    assert pairs == pytest.approx(0.01, abs=5 * (0.01 / dropped[1:].numel()) ** 0.5)


def test_ranks_drop_what_one_process_drops(context):
    keys = torch.arange(3, dtype=torch.int32)
    whole = keep_probabilities(keys, torch.Size([3, 4, 5, 9]), 0, "a", 0.5)
    ranks = [keep_probabilities(keys, torch.Size([3, 2, 5, 9]), h, "a", 0.5) for h in (0, 2)]
    assert torch.equal(whole, torch.cat(ranks, dim=1))


def test_keys_are_those_of_the_sample_and_the_place(context):
    """Whatever else is in the micro-batch; images without rows come last."""
    positions = torch.tensor([3, 20, 3])
    rows = torch.tensor([0, 0, 1])
    index = (positions.unsqueeze(1) + torch.arange(2)) * 2 + rows.unsqueeze(1)
    together = image_keys(context, torch.tensor([8, 9]), index.flatten(), 2, 4)
    alone = image_keys(context, torch.tensor([9]), torch.tensor([3, 4]), 2, 1)
    assert together[2] == alone[0] and len(set(together.tolist())) == 4


def test_attention_without_a_drop_is_plain_and_kept_probabilities_grow():
    generator = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(n, 2, 3, 8, generator=generator) for n in (5, 9, 9))
    plain = attend(query, key, value)
    every = attend_dropping(query, key, value, lambda shape: torch.ones(shape).bool(), 0.0)
    torch.testing.assert_close(every, plain, atol=1e-6, rtol=0)
    half = attend_dropping(query, key, value, lambda shape: torch.ones(shape).bool(), 0.5)
    torch.testing.assert_close(half, 2 * plain, atol=2e-6, rtol=0)
