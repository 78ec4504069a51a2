"""The parts of the model, one table for all that sorts parameters or work by part.

Learning rates and the table at the start of a run, gradient norms, FLOPs, activation memory and
the cut into pipeline stages are derived from it. Who adds a part to the model adds a row here.
"""

import functools
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

REST = "rest"  # group of the gradient norms for all that has none of its own


@dataclass(frozen=True, kw_only=True)
class ModelPart:
    """One row of PARTS.

    `patterns` are shell globs over parameter names. `parameter_group`, `grad_norm_group` and
    `flops_group` name the part, alone or with others, where learning rates, gradient norms and
    FLOPs are shown. `stack` is the module of the model whose `layers` are a stack of equal layers.
    `pipeline` tells the pipeline stages that have the part: the first, the last, or each some of
    its layers.
    """

    name: str
    patterns: tuple[str, ...]
    parameter_group: str
    grad_norm_group: str = REST
    flops_group: str
    stack: str | None = None
    pipeline: Literal["first", "layers", "last"]


# A parameter belongs to the first part that matches; groups are shown in the order of the rows.
PARTS = (
    ModelPart(
        name="ViT",
        patterns=("vision_model.*",),
        parameter_group="ViT",
        grad_norm_group="ViT",
        flops_group="ViT",
        stack="vision_model",
        pipeline="first",
    ),
    ModelPart(
        name="abstractor",
        patterns=("abstractor.*",),
        parameter_group="abstractor",
        grad_norm_group="abstractor",
        flops_group="abstractor",
        stack="abstractor",
        pipeline="first",
    ),
    ModelPart(
        name="vision keys and values",
        patterns=("*.linear_kv_vision.weight",),
        parameter_group="vision branch",
        grad_norm_group="vision KV",
        flops_group="decoder",
        pipeline="layers",
    ),
    ModelPart(
        name="vision norms",
        patterns=("*.weight_vision",),
        parameter_group="vision branch",
        flops_group="decoder",
        pipeline="layers",
    ),
    ModelPart(
        name="embedding",
        patterns=("embedding.*",),
        parameter_group="embedding",
        flops_group="decoder",
        pipeline="first",
    ),
    ModelPart(
        name="output layer",
        patterns=("output_layer.*",),
        parameter_group="output layer",
        flops_group="output layer",
        pipeline="last",
    ),
    ModelPart(
        name="final norm",
        patterns=("final_norm.*",),
        parameter_group="decoder",
        flops_group="output layer",
        pipeline="last",
    ),
    ModelPart(
        name="queries, text keys and values",  # queries count to the rest of the gradient norms
        patterns=("*.linear_qkv.weight",),
        parameter_group="decoder",
        grad_norm_group="text KV",
        flops_group="decoder",
        pipeline="layers",
    ),
    ModelPart(
        name="adapters",
        patterns=("*.lora_A", "*.lora_B"),
        parameter_group="adapters",
        flops_group="decoder",
        pipeline="layers",
    ),
    ModelPart(
        name="decoder",
        patterns=("decoder.*",),
        parameter_group="decoder",
        flops_group="decoder",
        stack="decoder",
        pipeline="layers",
    ),
)

PARAMETER_GROUPS = tuple(dict.fromkeys(part.parameter_group for part in PARTS))
GRAD_NORM_GROUPS = (
    *dict.fromkeys(p.grad_norm_group for p in PARTS if p.grad_norm_group != REST),
    REST,
)
# In the order of the forward pass. A group bears the name of the part that does its work.
FLOPS_GROUPS = tuple(dict.fromkeys(part.flops_group for part in PARTS))
STACKS = {part.stack: part for part in PARTS if part.stack is not None}


def find_part(name: str) -> ModelPart:
    """The part with this name; raises KeyError where there is none."""
    for part in PARTS:
        if part.name == name:
            return part
    raise KeyError(name)


@functools.cache
def part_of(parameter: str) -> ModelPart:
    """The part that the parameter of this name belongs to.

    Raises KeyError for a name that no part matches.
    """
    for part in PARTS:
        if any(fnmatchcase(parameter, pattern) for pattern in part.patterns):
            return part
    raise KeyError(f"{parameter} belongs to no part of the model; add it to model/parts.py")
