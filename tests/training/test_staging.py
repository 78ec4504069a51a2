"""Copies of a save's tensors: exact, independent, and in memory that the next save uses again."""

import io
import types

import pytest
import torch

from megatron_owl2.mcore import setup
from megatron_owl2.training.checkpoint.staging import Staging


def tensors(seed: int) -> list[torch.Tensor]:
    """Of several dtypes and shapes, a view that is not contiguous among them."""
    random = torch.Generator().manual_seed(seed)
    matrix = torch.randn(7, 5, generator=random)
    return [
        matrix.t(),
        torch.randn(1000, generator=random).bfloat16(),
        matrix[2:3, 1:4],
        torch.randn((), generator=random, dtype=torch.float64),
        torch.empty(0, 3),
    ]


def saved_size(tensor: torch.Tensor) -> int:
    stream = io.BytesIO()
    torch.save(tensor, stream)
    return stream.tell()


def test_copies_are_equal_and_do_not_change_with_what_they_are_of():
    originals = tensors(1)
    copies = Staging().copy(originals)
    for tensor in originals:
        tensor.zero_()
    for copy, expected in zip(copies, tensors(1), strict=True):
        assert copy.dtype == expected.dtype and copy.shape == expected.shape
        assert torch.equal(copy, expected)
        # A file gets the numbers of one tensor, not the whole buffer that it lies in.
        assert saved_size(copy) == saved_size(expected.clone(memory_format=torch.contiguous_format))


def test_the_next_save_uses_the_same_memory_again():
    staging = Staging()
    addresses = [[c.data_ptr() for c in staging.copy(tensors(seed))[:-1]] for seed in (1, 2, 3)]
    assert addresses[0] == addresses[1] == addresses[2]
    rounded = [-(-t.nbytes // 64) * 64 for t in tensors(1)]
    assert staging.nbytes == sum(rounded)
    staging.copy(tensors(1)[:1])
    assert staging.nbytes == sum(rounded)
    (large,) = staging.copy([torch.ones(5000)])
    assert staging.nbytes == large.nbytes + -large.nbytes % 64 and large.sum() == 5000


@pytest.fixture
def registered(monkeypatch):
    """Address and size of the memory that CUDA has pinned, by a stand-in for its run time."""
    pinned: dict[int, int] = {}

    def register(start, size, flags):
        assert start not in pinned and flags == 0
        pinned[start] = size

    runtime = types.SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=pinned.pop)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "check_error", lambda result: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(setup, "on_cpu", lambda: False)
    return pinned


def test_memory_is_pinned_once_and_let_go_with_its_owner(registered):
    staging = Staging()
    for seed in (1, 2):
        copies = staging.copy(tensors(seed))
        assert registered == {copies[0].data_ptr(): staging.nbytes}
    (large,) = staging.copy([torch.ones(5000)])
    assert registered == {large.data_ptr(): staging.nbytes}, "what was too small is pinned no more"
    del staging
    assert not registered
    assert large.sum() == 5000
