"""Progress of a run, as its checkpoints keep it."""

import dataclasses
from dataclasses import dataclass, field

from megatron_owl2.data.sampling import phases
from megatron_owl2.data.sampling.phases import Phase

_STORED_NAMES = {"consumed_samples": "slots"}  # of fields in progress.json


@dataclass
class TrainState:
    """Position of a run between two steps (progress.json of a checkpoint).

    `consumed_samples` are the samples of the training order that the steps so far have taken,
    `phases` those of its data, `stage_fingerprint` is of what trains, `counts` are the totals of
    the loader metrics since the first step, `health` is the state of the GradientSpikeGuard.
    """

    step: int = 0
    consumed_samples: int = 0
    phases: list[Phase] = field(default_factory=list)
    stage_fingerprint: str = ""
    counts: dict[str, int] = field(default_factory=dict)
    health: dict | None = None

    def to_json(self) -> dict:
        """The keys and values of progress.json."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values["phases"] = phases.to_json(self.phases)
        return {_STORED_NAMES.get(name, name): value for name, value in values.items()}
