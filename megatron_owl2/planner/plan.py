"""The plan of one run on given GPUs: memory, FLOPs, traffic, time, parallel configurations."""

import dataclasses
from dataclasses import dataclass

from megatron_owl2.config.load import to_dict
from megatron_owl2.config.require import require
from megatron_owl2.config.schema import RunConfig
from megatron_owl2.config.validate import validate_settings
from megatron_owl2.model import flops
from megatron_owl2.planner import memory, search, timing, traffic
from megatron_owl2.planner.costs import RunCosts, full_load
from megatron_owl2.planner.machine import Machine
from megatron_owl2.planner.memory import RankMemory
from megatron_owl2.planner.row_images import mean_images
from megatron_owl2.planner.search import Candidate
from megatron_owl2.planner.static_memory import check_sharding
from megatron_owl2.planner.timing import StepTime
from megatron_owl2.planner.traffic import RankTraffic
from megatron_owl2.training import parameter_groups


@dataclass(frozen=True)
class Plan:
    """The plan of one run; lists go by pipeline rank.

    `model_flops` is of one step over all GPUs, by part; `again_flops` what recomputation adds.
    Of the `mean_length` positions of a row as it is computed, `tokens` are not padding.
    `days` is at `machine.mfu` of the peak under any parallel configuration; `by_recompute` is the
    config with every kind of recomputation; `candidates` are the fastest of the `valid` parallel
    configurations that fit.
    """

    config: RunConfig
    machine: Machine
    sharding: str
    parameters: int
    trained: int
    memory: list[RankMemory]
    traffic: list[RankTraffic]
    model_flops: dict[str, float]
    again_flops: float
    tokens: int
    mean_length: int
    time: StepTime
    by_recompute: dict[str, Candidate]
    candidates: list[Candidate]
    valid: int

    @property
    def fullest(self) -> int:
        """The pipeline rank that needs most memory."""
        return max(range(len(self.memory)), key=lambda rank: self.memory[rank].total)

    @property
    def fits(self) -> bool:
        return self.memory[self.fullest].total <= self.machine.usable

    @property
    def remedy(self) -> str | None:
        """Overrides with which a config fits that does not: the least recomputation that is
        enough, else the fastest parallel configuration; None if there are none."""
        kinds = self.by_recompute.values()
        fitting = [c for c in kinds if c.memory.total <= self.machine.usable] or self.candidates
        return search.overrides(fitting[0].config, self.config) if fitting else None

    def mfu(self, time: StepTime) -> float:
        """Model FLOPs per second of a step over the peak of all GPUs."""
        peak = self.machine.gpus * self.machine.peak_tflops * 1e12
        return sum(self.model_flops.values()) / (time.total * peak)

    @property
    def steps(self) -> int | None:
        """Steps of the run; None where `train.epochs` is set and they follow from the data."""
        return None if self.config.train.epochs else self.config.train.steps

    @property
    def days(self) -> float | None:
        """For all steps, if all GPUs did model FLOPs at `machine.mfu` all the time; None where the
        steps are unknown."""
        rate = self.machine.gpus * self.machine.peak_tflops * 1e12 * self.machine.mfu
        seconds = sum(self.model_flops.values()) / rate
        return None if self.steps is None else seconds * self.steps / 86400

    def to_json(self) -> dict:
        """The plan as plain dicts, lists and numbers; sizes in bytes, times in seconds."""
        tree = dataclasses.asdict(self)
        tree["config"] = to_dict(self.config)
        tree["fits"], tree["days"] = self.fits, self.days
        tree["usable"] = self.machine.usable
        for shown, rank in zip(tree["memory"], self.memory, strict=True):
            shown["total"] = rank.total
        del tree["candidates"]
        tree["layouts"] = [  # the name that readers of the JSON know
            {"overrides": search.overrides(c.config, self.config), **self._candidate_json(c)}
            for c in self.candidates
        ]
        tree["by_recompute"] = {
            kind: {"fits": c.memory.total <= self.machine.usable, **self._candidate_json(c)}
            for kind, c in self.by_recompute.items()
        }
        tree["time"] = _time_json(self.time)
        tree["mfu"] = self.mfu(self.time)
        return tree

    def _candidate_json(self, candidate: Candidate) -> dict:
        memory, time = candidate.memory, candidate.time
        return {
            "memory": dataclasses.asdict(memory) | {"total": memory.total},
            "time": _time_json(time),
            "mfu": self.mfu(time),
        }


def _time_json(time: StepTime) -> dict[str, float]:
    return dataclasses.asdict(time) | {"compute": time.compute, "total": time.total}


def plan_run(
    run: RunConfig,
    machine: Machine,
    *,
    tokens: int | None = None,
    mean_length: int | None = None,
    count: int = 15,
) -> Plan:
    """The plan of a run, with the `count` fastest parallel configurations.

    Rows are computed with `mean_length` positions on average, `data.sequence_length` without it,
    and `tokens` of these are not padding, all without it. Raises ConfigError for a run that cannot
    work on so many GPUs, or for `tokens` that hold no image or do not fit. Files need not exist.
    """
    validate_settings(run, machine.gpus)
    length = run.data.sequence_length
    image = mean_images(run) * run.model.tokens_per_image
    require(
        mean_length is None or image <= mean_length <= length,
        f"rows of {mean_length} positions on average cannot be: their images take {image}, and "
        f"data.sequence_length is {length}",
    )
    computed = mean_length or length
    require(
        tokens is None or image <= tokens <= computed,
        f"rows of {tokens} tokens cannot be: their images take {image}, and "
        + (
            f"rows have {computed} positions"
            if mean_length
            else f"data.sequence_length is {length}"
        ),
    )
    costs = RunCosts(run, machine.gpus, tokens=tokens, mean_length=mean_length)
    parameters = costs.weights
    parameter_groups.check_patterns(run.stage, [weight.name for weight in parameters])
    rows = run.train.global_batch_size
    padded, own = (full_load(run, rows, n) for n in (computed, tokens or computed))
    again = flops.forward_again(
        run.model, padded, costs.trained, run.parallel.recompute, run.stage.lora
    )
    candidates, valid = search.ranked(run, machine, costs, count)
    return Plan(
        config=run,
        machine=machine,
        sharding=check_sharding(run, machine.gpus, parameters),
        parameters=sum(weight.numel for weight in parameters),
        trained=sum(weight.numel for weight in parameters if weight.trained),
        memory=memory.per_pipeline_rank(run, costs),
        traffic=traffic.per_pipeline_rank(run, costs),
        model_flops=flops.training_flops(run.model, own, costs.trained, run.stage.lora),
        again_flops=sum(again.values()),
        tokens=tokens or computed,
        mean_length=computed,
        time=timing.step_time(run, machine, costs),
        by_recompute=search.by_recompute(run, machine, costs),
        candidates=candidates,
        valid=valid,
    )
