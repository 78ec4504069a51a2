"""Sharded state of the distributed optimizer, in place of megatron-core's own way.

Its own way gathers the whole state of the model on every rank, for each save anew. Here a rank
writes and reads what it holds, a run of the numbers of each flattened parameter, as blocks of the
whole parameter. Names and shapes are those of megatron-core's `fully_reshardable` format, so a
checkpoint can be read under any parallel configuration.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer import ChainedOptimizer, distrib_optimizer

from megatron_owl2.mcore import setup
from megatron_owl2.training.checkpoint.reader import stored_parts

_MOMENTS = ("exp_avg", "exp_avg_sq")

# What tells the groups of the optimizer apart in a checkpoint, which a resumed run may not change.
# megatron-core 0.19 takes the rates and the decay too, and refuses a checkpoint that has others.
_GROUP_KEYS = ("wd_mult", "lr_mult", "is_expert_parallel", "is_decoupled_lr")


def _sharded_state(self, model_sharded_state_dict, is_loading=False, metadata=None):
    """In place of DistributedOptimizer's `sharded_param_state_fully_reshardable`: of every
    parameter that this rank holds numbers of, the blocks of main parameter and moments, which are
    views of what the optimizer works on. Nothing is sent."""
    shares = {share.data: share for share in nested_values(model_sharded_state_dict)}
    state = {}
    for buffer in self.gbuf_ranges:
        for bucket in (bucket for buckets in buffer.values() for bucket in buckets):
            for parameter, held in bucket["param_map"].items():
                share, numbers = shares[parameter], _numbers(self, parameter)
                state[share.key] = {
                    kind: dict(enumerate(_blocks(share, kind, flat, held["param"].start)))
                    for kind, flat in numbers.items()
                }
    return state


def _numbers(optimizer, parameter) -> dict[str, torch.Tensor]:
    """The main parameter and its moments, which are 0 before the first step."""
    found = optimizer._get_main_param_and_optimizer_states(parameter)
    main = found["param"]
    moments = {k: found[k] if k in found else torch.zeros_like(main) for k in _MOMENTS}
    return {"param": main, **moments}


def _blocks(
    share: ShardedTensor | ShardedTensorFactory, kind: str, numbers: torch.Tensor, start: int
) -> Iterator[ShardedTensor]:
    """The numbers [n] of a rank's flattened share of a parameter, from `start` on, as blocks of the
    whole parameter."""
    numbers, begin = numbers.detach(), 0
    for part in stored_parts(share):
        end = begin + math.prod(part.local_shape)
        place, stop = max(start, begin), min(start + len(numbers), end)
        for offset, shape in blocks(part.local_shape, place - begin, stop - begin):
            block = numbers[place - start :][: math.prod(shape)]
            place += len(block)
            yield dataclasses.replace(
                part,
                key=f"optimizer.state.{kind}.{part.key}",
                data=block.view(shape),
                dtype=block.dtype,
                local_shape=shape,
                global_offset=tuple(map(sum, zip(part.global_offset, offset, strict=True))),
                axis_fragmentations=None,  # no regular grid
                replica_id=(*part.replica_id[:2], 0),  # the data-parallel ranks hold no copies
            )
        begin = end


def blocks(
    shape: Sequence[int], start: int, stop: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Offset and shape of the blocks, in their order, that hold the numbers from `start` to `stop`
    of a flattened tensor of `shape`: at most 2 n - 1 of them for n dimensions."""
    if start >= stop:
        return
    if len(shape) == 1:
        yield (start,), (stop - start,)
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # the rows that are whole
    if first > last:
        yield from _within(shape, last, start, stop)
        return
    yield from _within(shape, first - 1, start, first * row)
    if first < last:
        yield (first, *[0] * (len(shape) - 1)), (last - first, *shape[1:])
    yield from _within(shape, last, last * row, stop)


def _within(shape: Sequence[int], index: int, start: int, stop: int):
    """The blocks of a part of one row."""
    before = index * math.prod(shape[1:])
    for offset, size in blocks(shape[1:], start - before, stop - before):
        yield (index, *offset), (1, *size)


def _optimizer_state(self):
    """DistributedOptimizer's own `state_dict`, less its assertion that something trains on this
    rank; the step is that of the ranks that train. All ranks call it together."""
    groups = self.optimizer.state_dict()["param_groups"]
    kept = [*self.optimizer.state.values(), *(group for group in groups if group["params"])]
    step = max((int(holder["step"]) for holder in kept if "step" in holder), default=0)
    step = torch.tensor(step, device=setup.device())
    torch.distributed.all_reduce(step, torch.distributed.ReduceOp.MAX)
    for group in groups:
        del group["params"]
        group["step"] = int(step)  # torch's AdamW has it per parameter, the fused ones here
    return {"optimizer": {"param_groups": groups}}


def install() -> None:
    """Have megatron-core's distributed optimizer save and load as this module does."""
    optimizer = distrib_optimizer.DistributedOptimizer
    optimizer.state_dict = _optimizer_state
    optimizer.sharded_param_state_fully_reshardable = _sharded_state
    distrib_optimizer.param_group_identifier_keys = _GROUP_KEYS


def allocate_optimizer_state(optimizer: ChainedOptimizer) -> None:
    """Give torch's AdamW the state it would make in its first step, so that one can be loaded.

    The fused optimizers of Transformer Engine and apex need no such thing and are left alone.
    """
    if distrib_optimizer.HAVE_APEX_OR_TE:
        return
    for part in optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                zeros = {k: torch.zeros_like(parameter) for k in _MOMENTS}
                part.optimizer.state[parameter] = {"step": torch.tensor(0.0), **zeros}


def load_optimizer_state(optimizer: ChainedOptimizer, state: dict) -> None:
    """`optimizer.load_state_dict` of what is not sharded, with what the AdamW at hand needs beyond
    it; the blocks were views, so reading them has set the optimizer's own numbers.

    The settings of a group become those in the checkpoint, where another AdamW (torch's, apex's or
    Transformer Engine's) has not all that this one asks for. And torch's must count its steps per
    parameter: megatron-core hands one step tensor to all of them, and each would advance it.
    """
    # What is sharded is left, empty, where nothing trained on the rank that wrote the rest.
    optimizer.load_state_dict({key: value for key, value in state.items() if key != "param_state"})
    for part in optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            for key, value in part.optimizer.defaults.items():
                group.setdefault(key, value)
        if not distrib_optimizer.HAVE_APEX_OR_TE:
            for parameter_state in part.optimizer.state.values():
                parameter_state["step"] = parameter_state["step"].clone()
