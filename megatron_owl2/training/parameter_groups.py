"""Parameter groups of a training stage: what it freezes and trains, and at which learning rates.

A stage's patterns over parameter names are checked against the model. A pattern is a shell glob,
such as `vision_model.*` or `*.linear_kv_vision.weight`. Freezing must happen before the gradient
buffers are built, so another stage is another run.
"""

import hashlib
import itertools
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_owl2.config import lora
from megatron_owl2.config.schema import RunConfig, StageConfig
from megatron_owl2.errors import ConfigError
from megatron_owl2.model.owl2 import Owl2
from megatron_owl2.model.parts import PARAMETER_GROUPS, part_of


@dataclass(frozen=True)
class Parameter:
    """One whole parameter of the model, as the stage sees it."""

    name: str
    numel: int
    trained: bool
    factor: float  # on the learning rate
    decays: bool  # takes part in weight decay; biases and one-dimensional weights do not


def freeze(config: RunConfig, chunks: Sequence[Owl2]) -> list[Parameter]:
    """The plan of the stage for all parameters of the model; what it does not train is frozen.

    Sets `requires_grad` and, for the optimizer, `rate_factor` on every local parameter. Raises
    ConfigError if the stage's patterns are not those of a stage (`check_patterns`).
    """
    local = []
    for name, parameter in itertools.chain.from_iterable(c.named_parameters() for c in chunks):
        parameter.requires_grad = trained = is_trainable(name, config.stage)
        factor = rate_factor(name, config)
        # Tensors take any attribute, whatever their stubs say; build_optimizer reads this one.
        parameter.rate_factor = factor  # pyright: ignore[reportAttributeAccessIssue]
        split = getattr(parameter, "tensor_model_parallel", False)
        numel = parameter.numel() * (config.parallel.tensor if split else 1)
        # The rule of get_standard_config_overrides (megatron-core, optimizer/__init__.py).
        decays = not name.endswith(".bias") and parameter.ndim > 1
        local.append(Parameter(name, numel, trained, factor, decays))
    plan = _union_over_pipeline(local, chunks[0].context.groups.pp)
    check_patterns(config.stage, [parameter.name for parameter in plan])
    return plan


def check_patterns(stage: StageConfig, names: Sequence[str]) -> None:
    """A check of the stage's patterns against the names of the whole model's parameters.

    Raises ConfigError for a pattern that matches none of them, if none of them trains, and for a
    weight that trains although it has an adapter.
    """
    for key in ("trainable", "frozen", "rates"):
        for pattern in getattr(stage, key):
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ConfigError(
                    f"stage.{key}: pattern {pattern!r} matches no parameter; names look like "
                    f"{names[0]}, {names[-1]}"
                )
    if not any(is_trainable(name, stage) for name in names):
        raise ConfigError("stage.trainable less stage.frozen is empty, so nothing would train")
    for name in filter(lora.is_adapter, names):
        weight = lora.linear_weight(lora.target_of(name))
        if is_trainable(weight, stage):
            raise ConfigError(
                f"stage.trainable trains {weight}, which has an adapter (stage.lora.targets); name "
                "in stage.trainable what trains beside the adapters, [] for nothing"
            )


def is_trainable(name: str, stage: StageConfig) -> bool:
    """Whether the stage trains the parameter of this name, as it does every adapter that it does
    not freeze."""
    chosen = lora.is_adapter(name) or _matches(name, stage.trainable)
    return chosen and not _matches(name, stage.frozen)


def fingerprint(plan: list[Parameter]) -> str:
    """SHA-256 over what trains at which factor; an optimizer state fits only the same."""
    identity = sorted((p.name, p.trained, p.factor) for p in plan)
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()


def rate_factor(name: str, config: RunConfig) -> float:
    """The factor on the learning rate of a parameter: `stage.rates` times the ViT's layer decay.

    With decay d and L layers, layer i (from 0) has d^(L - i), the embeddings d^(L + 1), and the
    last norm 1 (paper, Table 6; numbering as in BEiT).
    """
    factor = 1.0
    for pattern, rate in config.stage.rates.items():
        if fnmatchcase(name, pattern):
            factor *= rate
    if name.startswith("vision_model.") and not name.startswith("vision_model.post_layernorm"):
        layers = config.model.vision.num_layers
        inside = name.startswith("vision_model.layers.")
        depth = layers - int(name.split(".")[2]) if inside else layers + 1
        factor *= config.optimizer.vision_layer_decay**depth
    return factor


def learning_rates(
    plan: list[Parameter], scheduler: OptimizerParamScheduler, config: RunConfig
) -> dict[str, float]:
    """The learning rates in force by PARAMETER_GROUPS, the lowest and the highest of a group that
    has several."""
    found = {}
    for group in PARAMETER_GROUPS:
        factors = {p.factor for p in plan if p.trained and part_of(p.name).parameter_group == group}
        low, high = min(factors, default=None), max(factors, default=None)
        names = {group: low} if low == high else {f"{group} lowest": low, f"{group} highest": high}
        found |= {name: factor for name, factor in names.items() if factor is not None}
    peak, least = config.optimizer.lr, config.optimizer.min_lr
    return {
        name: scheduler.get_lr({"max_lr": peak * factor, "min_lr": least * factor})
        for name, factor in found.items()
    }


def summary(plan: list[Parameter], config: RunConfig) -> str:
    """The table at the start of a run: tensors, parameters, peak learning rates and weight decay by
    PARAMETER_GROUPS."""
    groups = defaultdict(list)
    for parameter in plan:
        kind = parameter.decays if parameter.trained else None
        groups[part_of(parameter.name).parameter_group, kind].append(parameter)
    head = f"{'part':<14}{'tensors':>9}{'parameters':>16}  {'rate':<20}decay"
    lines = [f"stage {config.stage.name}", head]
    for group, kind in itertools.product(PARAMETER_GROUPS, (True, False, None)):
        members = groups[group, kind]
        if not members:
            continue
        line = f"{group:<14}{len(members):>9}{sum(p.numel for p in members):>16,}  "
        if kind is None:
            lines.append(f"{line}frozen")
            continue
        rates = sorted({config.optimizer.lr * p.factor for p in members})
        span = f"{rates[0]:.3g}" + (f" to {rates[-1]:.3g}" if len(rates) > 1 else "")
        lines.append(f"{line}{span:<20}{config.optimizer.weight_decay if kind else 0:g}")
    trained, everything = sum(p.numel for p in plan if p.trained), sum(p.numel for p in plan)
    lines.append(f"{'trained':<14}{'':>9}{trained:>16,}  of {everything:,}")
    return "\n".join(lines)


def _matches(name: str, patterns: str | list[str] | tuple[str, ...]) -> bool:
    patterns = [patterns] if isinstance(patterns, str) else patterns
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _union_over_pipeline(
    local: list[Parameter], pipeline: torch.distributed.ProcessGroup
) -> list[Parameter]:
    """The parameters of all pipeline ranks; other ranks have the same ones, or shards of them."""
    shares: list = [None] * pipeline.size()
    torch.distributed.all_gather_object(shares, local, group=pipeline)
    return list({p.name: p for share in shares for p in share}.values())
