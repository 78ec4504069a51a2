"""Elementwise traffic of layers under any parallel configuration, each counted once."""

from collections.abc import Mapping
from dataclasses import replace

from megatron_owl2.config.schema import RunConfig
from megatron_owl2.planner.memory_traffic import LayerTraffic, layer_traffic

PassBytes = tuple[float, float]  # of a forward and of a backward pass


class ElementwiseTraffic:
    """Bytes that elementwise kernels of a layer move in a micro-batch, by stack, and of the "head".

    All configs asked for differ in nothing but `parallel` and the micro-batch. Bytes are counted
    with `rows` rows and grow evenly with them, which weights and their gradients do not: exact for
    so many rows, and a few percent off for others.
    """

    def __init__(self, rows: int):
        self._rows = rows
        self._counted: dict[tuple, Mapping[str, LayerTraffic]] = {}

    def __call__(self, config: RunConfig) -> dict[str, PassBytes]:
        """The bytes on one rank; the backward pass has what is computed again."""
        parallel = config.parallel
        key = parallel.tensor, parallel.sequence, parallel.context, parallel.recompute
        if key not in self._counted:
            train = replace(config.train, micro_batch_size=self._rows)
            self._counted[key] = layer_traffic(replace(config, train=train))
        share = config.train.micro_batch_size / self._rows
        return {
            name: (moved.forward.bytes * share, moved.backward.bytes * share)
            for name, moved in self._counted[key].items()
        }

    def least(self, config: RunConfig) -> dict[str, PassBytes]:
        """A lower bound: the bytes on one rank if all were split evenly over the ranks."""
        parallel = config.parallel
        alone = replace(parallel, tensor=1, sequence=False, tensor_overlap=False, context=1)
        ranks = parallel.tensor * parallel.context
        whole = self(replace(config, parallel=alone))
        return {name: (there / ranks, back / ranks) for name, (there, back) in whole.items()}
