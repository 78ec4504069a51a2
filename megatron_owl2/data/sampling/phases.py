"""Data phases of a run: stretches over the same data sources, recorded in every checkpoint.

A data cursor is one integer and means something only over the data it was made with. When data sets
are added, or their weights change, `data.phase` is raised by one: a new order starts at the sample
index that the run has reached, and the checkpoint keeps the list of what was trained on until
where."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_owl2.config.schema import DataConfig
from megatron_owl2.data.sampling.keyed_random import combine
from megatron_owl2.data.sampling.packed_order import Packing
from megatron_owl2.data.sampling.shuffle import BLOCK_SIZE, SHUFFLE_BLOCK_SIZE, STREAMS
from megatron_owl2.data.shards.dataset import ShardedDataset
from megatron_owl2.errors import ConfigError

_PHASE = 32  # keeps the keys of later phases apart from others
_STORED_NAMES = {"start_sample": "start_slot"}  # of fields in progress.json


@dataclass
class Phase:
    """One data phase: number from 1 on, first sample index, fingerprint of its data, sources."""

    number: int
    start_sample: int
    fingerprint: str
    sources: list[dict]  # path, weight, samples and the fingerprint of the manifest
    group: int = 0  # of rows that are balanced over the ranks, if rows are packed
    epochs: int = 0  # after which rows are empty; 0: none

    def describe(self) -> str:
        """The data sets and where each begins, for the log."""
        unit = "row" if self.group else "sample"
        lines = [f"data: phase {self.number} from {unit} {self.start_sample:,}"]
        for source in self.sources:
            share = f"{source['weight']:7.2%} of the samples"
            lines.append(f"  {share}  {source['samples']:>13,} samples  {source['path']}")
        return "\n".join(lines)


def first_phase(
    config: DataConfig, datasets: Sequence[ShardedDataset], packing: Packing | None = None
) -> Phase:
    """The phase of a run that starts now, from sample index 0."""
    return _phase(config, datasets, 0, packing)


def resume(
    recorded: list[dict],
    config: DataConfig,
    datasets: Sequence[ShardedDataset],
    consumed_samples: int,
    where: str,
    packing: Packing | None = None,
) -> list[Phase]:
    """The phases of a resumed run, given those recorded in its checkpoint `where`.

    The last one is in force: the recorded one, or a new one if `data.phase` is one more than its
    number. Raises ConfigError if the data changed without that, or the number skips or goes back.
    """
    phases = [_from_json(phase) for phase in recorded]
    last = phases[-1]
    if config.phase == last.number + 1:
        return [*phases, _phase(config, datasets, consumed_samples, packing)]
    if config.phase != last.number:
        raise ConfigError(
            f"data.phase is {config.phase}, but {where} was made in phase {last.number}; use "
            f"{last.number} to go on with the same data or {last.number + 1} to change it"
        )
    if _phase(config, datasets, last.start_sample, packing).fingerprint != last.fingerprint:
        packed = " (or, as rows are packed, the samples' lengths or the limits of a row)"
        raise ConfigError(
            "data.sources (with data.groups) or "
            f"data.seed{packed if packing or last.group else ''} is not what "
            f"{where} was made with; go on with the same, "
            f"or say data.phase={last.number + 1} to go on with other data from sample "
            f"{consumed_samples} on, or start another run from the weights with "
            "stage.initial_checkpoint"
        )
    return phases


def order_seed(seed: int, phase: int) -> int:
    """The seed of a phase's order, so that the same data come in another order in the next."""
    return seed if phase == 1 else combine(seed, _PHASE, phase)


def to_json(phases: list[Phase]) -> list[dict]:
    """The phases as progress.json has them and `resume` takes them."""
    trees = map(dataclasses.asdict, phases)
    return [{_STORED_NAMES.get(name, name): v for name, v in tree.items()} for tree in trees]


def _from_json(tree: dict[str, Any]) -> Phase:
    names = {stored: name for name, stored in _STORED_NAMES.items()}
    fields: dict[str, Any] = {names.get(name, name): value for name, value in tree.items()}
    return Phase(**fields)


def source_weights(config: DataConfig, datasets: Sequence[ShardedDataset]) -> list[float]:
    """The weights of the sources, where 0 stands for the number of a source's samples."""
    pairs = zip(config.sources, datasets, strict=True)
    return [source.weight or float(len(dataset)) for source, dataset in pairs]


def _shares(config: DataConfig, weights: list[float]) -> list[float]:
    """The part of all samples that each source has, by its weight within its group."""
    if not config.groups:
        return [weight / sum(weights) for weight in weights]
    shares, batch_size = [], sum(config.groups.values())
    for source, weight in zip(config.sources, weights, strict=True):
        pairs = zip(config.sources, weights, strict=True)
        of_group = sum(other for member, other in pairs if member.group == source.group)
        shares.append(weight / of_group * config.groups[source.group] / batch_size)
    return shares


def _phase(
    config: DataConfig,
    datasets: Sequence[ShardedDataset],
    start_sample: int,
    packing: Packing | None,
) -> Phase:
    """The phase with its fingerprint: SHA-256 over everything that decides which samples an index
    is, the manifests' fingerprints in order, the weights, seed, phase, the order's constants, and
    the groups without their names."""
    shares = _shares(config, source_weights(config, datasets))
    sources = []
    for source, share, dataset in zip(config.sources, shares, datasets, strict=True):
        sources.append(
            {
                "path": source.path,
                "weight": share,
                "samples": len(dataset),
                "fingerprint": dataset.fingerprint,
            }
        )
    identity = [
        [[source["fingerprint"], repr(source["weight"])] for source in sources],
        config.seed,
        config.phase,
        [STREAMS, BLOCK_SIZE, SHUFFLE_BLOCK_SIZE],
    ]
    if packing is not None:
        identity.append(packing.identity)
    if config.groups:
        names = list(config.groups)
        members = [names.index(source.group) for source in config.sources]
        identity.append([[*config.groups.values()], members])
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    group = 0 if packing is None else packing.group
    return Phase(config.phase, start_sample, digest, sources, group)
