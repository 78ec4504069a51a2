"""Dropout without random state: masks by a hash of what is dropped.

A mask is a function of train.seed, the sample, the place in it and the channel, so it is the same
when computed again, after a resume, and in every parallel configuration.
"""

import hashlib

import torch

from megatron_owl2.mcore import context_parallel
from megatron_owl2.mcore.parallel import ParallelContext

# The finalizer of MurmurHash3 (Appleby, 2011), for numbers of 32 bits with a sign.
_MULTIPLIERS = (0x85EBCA6B - 2**32, 0xC2B2AE35 - 2**32)


def token_keys(
    context: ParallelContext, sample_indices: torch.Tensor, length: int
) -> torch.Tensor | None:
    """Keys of the tokens for the masks of adapters, int32 [s, b, 1], s being this rank's `length`
    under context parallelism; None where `stage.lora` asks for no dropout.

    A key depends on train.seed, the sample and the place in it. So masks need no random state: they
    are the same when computed again, after a resume, and in every parallel configuration.
    sample_indices int64 [b] are those of the training order.
    """
    if not (context.lora.targets and context.lora.dropout):
        return None
    group, device = context.groups.cp, sample_indices.device
    places = context_parallel.positions(length * group.size(), group.rank(), group.size(), device)
    samples = _samples(context, sample_indices)
    return _mix(samples ^ _mix(places.to(torch.int32)).unsqueeze(1)).unsqueeze(-1)


def image_keys(
    context: ParallelContext,
    sample_indices: torch.Tensor,
    vision_token_index: torch.Tensor,
    tokens_per_image: int,
    count: int,
) -> torch.Tensor:
    """Keys of `count` images for the masks of the abstractor, int32 [count]: of train.seed, the
    sample and the place of the image in its row, as those of tokens.

    sample_indices int64 [b]; vision_token_index int64 [images * tokens per image] of whole rows, as
    `data.batch.Batch` has it. Images behind those that own rows have equal keys.
    """
    row_count = len(sample_indices)
    first = vision_token_index[::tokens_per_image]
    samples = _samples(context, sample_indices)[first % row_count]
    keys = _mix(samples ^ _mix((first // row_count).to(torch.int32)))
    return torch.nn.functional.pad(keys, (0, count - len(keys)))


def keep_probabilities(
    keys: torch.Tensor, shape: torch.Size, first_head: int, name: str, dropout: float
) -> torch.Tensor:
    """Attention probabilities that dropout keeps, bool [b, heads, queries, keys], which is `shape`,
    by the key of each sequence, int32 [b], head, query and key; the heads are those from
    `first_head` on, of the layer that `name` tells from others."""
    _, heads, queries, attended = shape
    places = torch.arange(heads * queries, dtype=torch.int32, device=keys.device)
    places = (places + first_head * queries).view(1, heads, queries, 1)
    channels = torch.arange(attended, dtype=torch.int32, device=keys.device)
    return keep_mask(_mix(keys.view(-1, 1, 1, 1) ^ _mix(places)), channels, text_key(name), dropout)


def keep_mask(
    token_keys: torch.Tensor, channels: torch.Tensor, key: int, dropout: float
) -> torch.Tensor:
    """Elements that dropout keeps, bool [..., n], by a hash of the token's key int32 [..., 1], the
    channel int32 [n] and the key of the linear's input.

    The hash is a product modulo 2^32 of odd random numbers: of what is done for every element, one
    multiplication and one comparison.
    """
    channels = _mix(_mix(channels) ^ _signed(key)) | 1
    return (token_keys | 1) * channels >= round(dropout * 2**32) - 2**31


def _samples(context: ParallelContext, sample_indices: torch.Tensor) -> torch.Tensor:
    """Keys of samples, int32 [b]."""
    return _mix(sample_indices.to(torch.int32) ^ _signed(text_key(f"{context.seed} dropout")))


def text_key(text: str) -> int:
    """A key below 2^63 of a text."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 1


def _signed(key: int) -> int:
    """The lowest 32 bits of a key as a number with a sign."""
    return (key + 2**31) % 2**32 - 2**31


def _mix(x: torch.Tensor) -> torch.Tensor:
    """A bijection of int32 numbers, every bit of which depends on every bit of x."""
    x = (x ^ (x >> 16 & 0xFFFF)) * _MULTIPLIERS[0]  # the sign is shifted in, and masked away
    x = (x ^ (x >> 13 & 0x7FFFF)) * _MULTIPLIERS[1]
    return x ^ (x >> 16 & 0xFFFF)
