"""Phases of a run: stretches of slots over the same data, recorded in every checkpoint.

A data cursor is one integer and means something only over the data it was made with. When data
sets are added, or their weights change, `data.phase` is raised by one: a new order starts at the
slot where the run stands, and the checkpoint keeps the list of what was trained on until where.
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_owl2.config.schema import DataConfig
from megatron_owl2.data.sampling.keyed_random import combine
from megatron_owl2.data.sampling.shuffle import BLOCK_SIZE, SHUFFLE_BLOCK_SIZE, STREAMS
from megatron_owl2.data.shards.dataset import ShardedDataset
from megatron_owl2.errors import ConfigError

_PHASE = 32  # keeps the keys of later phases apart from others


@dataclass
class Phase:
    """One phase: its number from 1 on, its first slot, the fingerprint of its data, its sources."""

    number: int
    start_slot: int
    fingerprint: str
    sources: list[dict]  # path, weight, samples and the fingerprint of the manifest

    def describe(self) -> str:
        """What is trained on from where, for the log."""
        lines = [f"data: phase {self.number} from slot {self.start_slot:,}"]
        for source in self.sources:
            share = f"{source['weight']:7.2%} of the slots"
            lines.append(f"  {share}  {source['samples']:>13,} samples  {source['path']}")
        return "\n".join(lines)


def first_phase(config: DataConfig, datasets: Sequence[ShardedDataset]) -> Phase:
    """The phase of a run that starts now, from slot 0."""
    return _phase(config, datasets, 0)


def resume(
    recorded: list[dict],
    config: DataConfig,
    datasets: Sequence[ShardedDataset],
    slot: int,
    where: str,
) -> list[Phase]:
    """The phases of a run that goes on at `slot`, given those in its checkpoint `where`.

    The last one is in force: the recorded one, or a new one if `data.phase` is one more than its
    number. Raises ConfigError if the data changed without that, or the number skips or goes back.
    """
    phases = [Phase(**phase) for phase in recorded]
    last = phases[-1]
    if config.phase == last.number + 1:
        return [*phases, _phase(config, datasets, slot)]
    if config.phase != last.number:
        raise ConfigError(
            f"data.phase is {config.phase}, but {where} was made in phase {last.number}; use "
            f"{last.number} to go on with the same data or {last.number + 1} to change it"
        )
    if _phase(config, datasets, last.start_slot).fingerprint != last.fingerprint:
        raise ConfigError(
            f"data.sources or data.seed is not what {where} was made with; go on with the same, "
            f"or say data.phase={last.number + 1} to go on with other data from slot {slot} on, or "
            "start another run from the weights with stage.initial_checkpoint"
        )
    return phases


def order_seed(seed: int, phase: int) -> int:
    """The seed of a phase's order, so that the same data come in another order in the next."""
    return seed if phase == 1 else combine(seed, _PHASE, phase)


def to_json(phases: list[Phase]) -> list[dict]:
    """What `go_on` takes back."""
    return [dataclasses.asdict(phase) for phase in phases]


def _phase(config: DataConfig, datasets: Sequence[ShardedDataset], start_slot: int) -> Phase:
    """SHA-256 over everything that decides which sample a slot holds: the manifests' fingerprints
    in order, the weights, the seed, the phase and the order's constants."""
    total = sum(source.weight for source in config.sources)
    sources = []
    for source, dataset in zip(config.sources, datasets, strict=True):
        sources.append(
            {
                "path": source.path,
                "weight": source.weight / total,
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
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    return Phase(config.phase, start_slot, digest, sources)
