"""Gradient norms by part of the model."""

from collections.abc import Iterator, Sequence

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate

from megatron_owl2.config.schema import DecoderConfig
from megatron_owl2.model.parts import GRAD_NORM_GROUPS, REST, part_of

_TEXT_KV = "text KV"  # of linear_qkv only the keys and values; queries are the rest


class GradNormsByGroup:
    """Gradient norms by GRAD_NORM_GROUPS, of the gradients that the distributed optimizer holds.

    After the reduction a rank has the right gradients only for the piece of every buffer that it
    updates. Those pieces cover every parameter once over all ranks but for the copies that
    tensor-parallel ranks have of what is not split, of which the first counts, as in
    megatron-core's own norm.
    """

    def __init__(
        self,
        chunks: Sequence[DistributedDataParallel],
        optimizer: MegatronOptimizer,
        config: DecoderConfig,
    ):
        """`chunks` are those that `optimizer` was built from."""
        self._optimizer = optimizer
        buffer = chunks[0].module.image_mean
        assert isinstance(buffer, torch.Tensor)
        self._device = buffer.device
        group = config.num_heads // config.num_kv_heads + 2  # queries, a key, a value
        head = config.hidden_size // config.num_heads * config.hidden_size
        # In elements of the weight.
        self._head_group, self._queries = group * head, (group - 2) * head
        names: dict[torch.Tensor, str] = {
            parameter: name
            for chunk in chunks
            for name, parameter in chunk.module.named_parameters()
        }
        self._pieces = [
            (group, shard, piece)
            for parameter, shard, start in _shards(optimizer)
            for group, piece in self._split(names[parameter], start, start + shard.numel())
        ]
        self._groups = torch.tensor(
            [GRAD_NORM_GROUPS.index(group) for group, _, _ in self._pieces],
            dtype=torch.int64,
            device=self._device,
        )

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """The norms of the gradients as they are now; all ranks together.

        To be called after `prepare_grads` and before the clipping.
        """
        squares = torch.zeros(len(GRAD_NORM_GROUPS), dtype=torch.float64, device=self._device)
        if self._pieces:
            gradients = [_gradient(shard)[piece] for _, shard, piece in self._pieces]
            norms = torch._foreach_norm(gradients)  # pyright: ignore[reportPrivateImportUsage]
            squares.index_add_(0, self._groups, torch.stack(norms).double().square())
        torch.distributed.all_reduce(squares, group=self._optimizer.get_grad_stats_parallel_group())
        return dict(zip(GRAD_NORM_GROUPS, squares.sqrt().tolist(), strict=True))

    def _split(self, name: str, start: int, stop: int) -> Iterator[tuple[str, slice]]:
        """The groups of the elements from `start` to `stop` of a flattened parameter, and where
        they are, counted from `start`."""
        group = part_of(name).grad_norm_group
        if group != _TEXT_KV:
            yield group, slice(0, stop - start)
            return
        for head in range(start // self._head_group * self._head_group, stop, self._head_group):
            keys, end = head + self._queries, head + self._head_group
            for part, first, last in ((REST, head, keys), (_TEXT_KV, keys, end)):
                first, last = max(first, start), min(last, stop)
                if first < last:
                    yield part, slice(first - start, last - start)


def _gradient(shard: torch.Tensor) -> torch.Tensor:
    assert shard.grad is not None, "gradients are measured before prepare_grads"
    return shard.grad


def _shards(optimizer: MegatronOptimizer) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
    """Every parameter that this rank updates a piece of, that piece as the optimizer holds it
    (flat, with its gradient in fp32), and where in the flattened parameter it starts."""
    assert isinstance(optimizer, ChainedOptimizer)
    for chained in optimizer.chained_optimizers:
        assert isinstance(chained, DistributedOptimizer)
        if chained.is_stub_optimizer:  # nothing trains on this rank
            continue
        # get_megatron_optimizer sets it on the instance.
        tensor_ranks = chained.tp_group  # pyright: ignore[reportAttributeAccessIssue]
        for parameters, shards in (
            (chained.model_float16_groups, chained.shard_fp32_from_float16_groups),
            (chained.model_fp32_groups, chained.shard_fp32_groups),
        ):
            for group, shard_group in zip(parameters, shards, strict=True):
                for parameter, shard in zip(group, shard_group, strict=True):
                    if param_is_not_tensor_parallel_duplicate(shard, tensor_ranks):
                        place = chained._get_model_param_range_map(parameter)["param"]
                        yield parameter, shard, place.start
