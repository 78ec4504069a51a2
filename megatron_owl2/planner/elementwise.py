"""Elementwise traffic of layers under any parallel configuration, each counted once."""

from collections.abc import Mapping
from dataclasses import replace

from megatron_owl2.config.schema import RunConfig
from megatron_owl2.planner.memory_traffic import LayerTraffic, layer_traffic

_FEW, _MANY = 2, 16  # rows that are counted; between and beyond them bytes grow evenly

PassBytes = tuple[float, float]  # of a forward and of a backward pass


class ElementwiseTraffic:
    """Bytes that elementwise kernels of a layer move in a micro-batch, by stack, and of the "head".

    All configs asked for differ in nothing but `parallel` and the micro-batch.
    """

    def __init__(self):
        self._counted: dict[tuple, Mapping[str, LayerTraffic]] = {}

    def __call__(self, config: RunConfig) -> dict[str, PassBytes]:
        """The bytes on one rank; the backward pass has what is computed again."""
        rows = config.train.micro_batch_size
        if rows == 1:  # needs fewer copies
            return {name: _bytes(moved) for name, moved in self._count(config, 1).items()}
        few, many = self._count(config, _FEW), self._count(config, _MANY)
        share = (rows - _FEW) / (_MANY - _FEW)
        found = {}
        for name in few:
            (forward, backward), ends = _bytes(few[name]), _bytes(many[name])
            found[name] = (
                forward + (ends[0] - forward) * share,
                backward + (ends[1] - backward) * share,
            )
        return found

    def least(self, config: RunConfig) -> dict[str, PassBytes]:
        """A lower bound: the bytes on one rank if all were split evenly over the ranks."""
        parallel = config.parallel
        alone = replace(parallel, tensor=1, sequence=False, tensor_overlap=False, context=1)
        ranks = parallel.tensor * parallel.context
        whole = self(replace(config, parallel=alone))
        return {name: (there / ranks, back / ranks) for name, (there, back) in whole.items()}

    def _count(self, config: RunConfig, rows: int) -> Mapping[str, LayerTraffic]:
        parallel = config.parallel
        key = parallel.tensor, parallel.sequence, parallel.context, parallel.recompute, rows
        if key not in self._counted:
            train = replace(config.train, micro_batch_size=rows)
            self._counted[key] = layer_traffic(replace(config, train=train))
        return self._counted[key]


def _bytes(moved: LayerTraffic) -> PassBytes:
    return moved.forward.bytes, moved.backward.bytes
