"""The optimizer's state in checkpoints: a rank's numbers as blocks of whole parameters, and what an
AdamW must not take from another one that it goes on from."""

import math

import pytest
import tiny_run
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_owl2.config.load import load_config
from megatron_owl2.mcore import setup
from megatron_owl2.mcore.parallel import ParallelContext
from megatron_owl2.model.owl2 import build
from megatron_owl2.training import optimizer as optim
from megatron_owl2.training import parameter_groups
from megatron_owl2.training.checkpoint import optimizer_state


@pytest.fixture
def optimizer(tmp_path):
    config = load_config(tiny_run.make(tmp_path))
    torch.manual_seed(0)
    chunks = build(ParallelContext(config, setup.initialize(config.parallel)), config.model, 1)
    parameter_groups.freeze(config, chunks)
    yield optim.build_optimizer(config, optim.wrap_ddp(chunks, overlap=False))[0]
    setup.shutdown()


@pytest.mark.versions
def test_settings_that_only_this_one_has_stay(optimizer):
    (part,) = optimizer.chained_optimizers
    optimizer_state.allocate_optimizer_state(optimizer)
    stored = optimizer.state_dict()
    for group in stored["optimizer"]["param_groups"]:
        assert group["step"] == 0
        group["step"], group["eps"] = 7, 1e-5
    part.optimizer.defaults["bias_correction"] = True  # Transformer Engine's and apex's have it
    optimizer_state.load_optimizer_state(optimizer, stored)
    for group in part.optimizer.param_groups:
        assert group["bias_correction"] is True and group["eps"] == 1e-5
    steps = [state["step"] for state in part.optimizer.state.values()]
    assert steps and all(step == 7 for step in steps)
    assert len({id(step) for step in steps}) == len(steps)


@pytest.mark.versions
def test_a_group_is_found_though_its_rates_and_decay_have_changed(optimizer):
    """megatron-core 0.19 by itself tells groups apart by them and raises KeyError."""
    optimizer_state.allocate_optimizer_state(optimizer)
    stored = optimizer.state_dict()
    factors = [group["lr_mult"] for group in optimizer.param_groups]
    assert len(set(factors)) >= 3
    for number, group in enumerate(stored["optimizer"]["param_groups"]):
        for key in ("max_lr", "min_lr", "start_wd", "end_wd"):
            if key in group:
                group[key] = 7.0
        group["eps"] = 1e-3 * number
    stored["optimizer"]["param_groups"].reverse()
    optimizer_state.load_optimizer_state(optimizer, stored)
    assert [group["lr_mult"] for group in optimizer.param_groups] == factors
    found = [group["eps"] for group in optimizer.param_groups]
    assert found == [1e-3 * number for number in range(len(factors))], "each has its own again"


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.data())
def test_any_run_of_numbers_is_a_few_blocks_in_its_order(shape, data):
    size = math.prod(shape)
    start = data.draw(st.integers(0, size))
    stop = data.draw(st.integers(start, size))
    whole, found = torch.arange(size).view(shape), []
    for offset, lengths in optimizer_state.blocks(shape, start, stop):
        assert all(length > 0 for length in lengths)
        place = tuple(slice(o, o + n) for o, n in zip(offset, lengths, strict=True))
        assert whole[place].shape == lengths
        found.append(whole[place].flatten())
    assert len(found) <= 2 * len(shape) - 1
    assert torch.cat([torch.arange(0), *found]).tolist() == list(range(start, stop))
