"""What a stage trains, at which rate: patterns over parameter names, checked against the model.

A pattern is a shell glob, such as `vision_model.*` or `*.linear_kv_vision.weight`. Freezing must
happen before the gradient buffers are built, so another stage is another run.
"""

import hashlib
import itertools
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import nn

from megatron_owl2.config import ConfigError, RunConfig

PARTS = {  # where a parameter belongs, first match wins; the rows of the table at start
    "ViT": "vision_model.*",
    "abstractor": "abstractor.*",
    "vision branch": ("*.linear_kv_vision.weight", "*.weight_vision"),
    "embedding": "embedding.*",
    "output layer": "output_layer.*",
    "decoder": "*",
}


@dataclass(frozen=True)
class Parameter:
    """One whole parameter of the model, as the stage sees it."""

    name: str
    numel: int
    trained: bool
    factor: float  # on the learning rate


def apply(config: RunConfig, chunks: Sequence[nn.Module]) -> list[Parameter]:
    """Freeze what the stage does not train; returns the plan for the parameters of all ranks.

    Sets `requires_grad` and, for the optimizer, `rate_factor` on every local parameter. Raises
    ConfigError if a pattern of `stage.trainable` or `stage.rates` matches nothing.
    """
    local = []
    for name, parameter in itertools.chain.from_iterable(c.named_parameters() for c in chunks):
        trained = _matches(name, config.stage.trainable)
        parameter.requires_grad = trained
        parameter.rate_factor = rate_factor(name, config)
        split = getattr(parameter, "tensor_model_parallel", False)
        numel = parameter.numel() * (config.parallel.tensor if split else 1)
        local.append(Parameter(name, numel, trained, parameter.rate_factor))
    plan = _union_over_ranks(local)
    for key, patterns in (("trainable", config.stage.trainable), ("rates", config.stage.rates)):
        for pattern in patterns:
            if not any(fnmatchcase(p.name, pattern) for p in plan):
                raise ConfigError(
                    f"stage.{key}: pattern {pattern!r} matches no parameter; names look like "
                    f"{plan[0].name}, {plan[-1].name}"
                )
    if not any(p.trained for p in plan):
        raise ConfigError("stage.trainable is empty, so nothing would train")
    return plan


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


def table(plan: list[Parameter], config: RunConfig) -> str:
    """What trains, part by part: tensors, parameters, peak learning rates."""
    rows = defaultdict(list)
    for parameter in plan:
        rows[part_of(parameter.name)].append(parameter)
    lines = [f"stage {config.stage.name}", f"{'part':<14}{'tensors':>9}{'parameters':>16}  rate"]
    for part in PARTS:
        for trained in (True, False):
            members = [p for p in rows[part] if p.trained is trained]
            if members:
                rates = sorted({config.optimizer.lr * p.factor for p in members})
                span = f"{rates[0]:.3g}" + (f" to {rates[-1]:.3g}" if len(rates) > 1 else "")
                lines.append(
                    f"{part:<14}{len(members):>9}{sum(p.numel for p in members):>16,}  "
                    + (span if trained else "frozen")
                )
    trained, everything = sum(p.numel for p in plan if p.trained), sum(p.numel for p in plan)
    lines.append(f"{'trained':<14}{'':>9}{trained:>16,}  of {everything:,}")
    return "\n".join(lines)


def part_of(name: str) -> str:
    """The part of the model, one of PARTS, that a parameter belongs to."""
    return next(part for part, patterns in PARTS.items() if _matches(name, patterns))


def _matches(name: str, patterns: str | list[str] | tuple[str, ...]) -> bool:
    patterns = [patterns] if isinstance(patterns, str) else patterns
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _union_over_ranks(local: list[Parameter]) -> list[Parameter]:
    shares = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(shares, local)
    return list({p.name: p for share in shares for p in share}.values())
