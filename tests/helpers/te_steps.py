"""te_steps.py RUN.YAML FOLDER, alone or in two ranks of torchrun: steps by the kernels of torch and
by Transformer Engine with its stand-in (te_stand_in.py); rank 0 prints the differences as JSON."""

import itertools
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import te_stand_in

te_stand_in.install()

import tiny_run  # noqa: E402
import torch  # noqa: E402
from transformer_engine.pytorch.optimizers import FusedAdam  # noqa: E402

from megatron_owl2.config.load import load_config  # noqa: E402
from megatron_owl2.errors import ConfigError  # noqa: E402
from megatron_owl2.mcore import setup  # noqa: E402
from megatron_owl2.mcore.parallel import ParallelContext  # noqa: E402
from megatron_owl2.model.kernels.user_buffers import user_buffers  # noqa: E402
from megatron_owl2.model.owl2 import build  # noqa: E402
from megatron_owl2.training import optimizer as optim  # noqa: E402
from megatron_owl2.training import parameter_groups  # noqa: E402
from megatron_owl2.training.checkpoint import save_load  # noqa: E402
from megatron_owl2.training.step import forward_backward, gradient_norm, update  # noqa: E402

RUN, FOLDER = map(Path, sys.argv[1:])
BF16 = ["train.precision=bf16", "train.micro_batch_size=1"]
TE = ["kernels.backend=transformer_engine"]
FROZEN = "stage.trainable=['vision_model.*','abstractor.*','*.linear_kv_vision.weight','*vision']"
STAGES = {
    "all": [],
    "frozen": [FROZEN],
    "decoder": ["stage.trainable=['decoder.layers.*']"],  # its first layer's input has no gradient
}
RECOMPUTE = ("none", "selective", "full")


class Model:
    """A model of the run with `overrides`, its gradient buffers and its optimizer."""

    def __init__(self, overrides: Sequence[str], *, fuses: bool = False, seed: int = 0):
        self.config = config = load_config(RUN, [*BF16, *overrides])
        groups = setup.initialize(config.parallel)
        self.context = ParallelContext(config, groups, fuses_gradients=fuses)
        torch.manual_seed(seed)
        self.chunks = build(self.context, config.model, 1)
        parameter_groups.freeze(config, self.chunks)
        self.wrapped = optim.wrap_ddp(self.chunks, overlap=config.parallel.overlap)
        self.optimizer, self.scheduler = optim.build_optimizer(config, self.wrapped)
        self.batches = list(tiny_run.batches(config, 1, limit_samples=4))

    def named_parameters(self):
        return dict(self.chunks[0].named_parameters())

    def gradients(self) -> "Gradients":
        self.wrapped[0].zero_grad_buffer()
        sums = forward_backward(self.config, self.wrapped, iter(self.batches), len(self.batches))
        trained = {n: p for n, p in self.named_parameters().items() if p.requires_grad}
        return Gradients(sums, {name: p.main_grad.clone() for name, p in trained.items()})

    def step(self) -> None:
        self.gradients()
        self.scheduler.step(1)
        update(self.optimizer, gradient_norm(self.optimizer))
        optim.sync_params(self.wrapped)


@dataclass
class Gradients:
    """What a step of several micro-batches leaves."""

    sums: torch.Tensor
    by_name: dict[str, torch.Tensor]

    def against(self, expected: "Gradients") -> dict:
        """Relative differences of sums and gradients, the names of those that differ at all."""
        assert self.by_name.keys() == expected.by_name.keys()
        errors = {
            name: float((self.by_name[name] - gradient).norm() / (gradient.norm() or 1))
            for name, gradient in expected.by_name.items()
        }
        return {
            "loss": float(((self.sums - expected.sums).abs() / expected.sums).max()),
            "worst": max(errors.values()),
            "largest": max(float(g.norm()) for g in expected.by_name.values()),
            "count": len(errors),
            "differ": sorted(name for name, error in errors.items() if error > 0),
        }


def measured(overrides: Sequence[str], *, fuses: bool) -> tuple[Gradients, dict]:
    """Gradients by Transformer Engine, and what its GEMMs were given."""
    te_stand_in.gemm_rows.clear()
    te_stand_in.overlapped.clear()
    model = Model([*TE, *overrides], fuses=fuses)
    with user_buffers(model.config, model.context):
        found = model.gradients()
    rows = te_stand_in.gemm_rows
    seen = {"gemms": len(rows), "fewest_rows": min(rows)}
    return found, seen | {kind: te_stand_in.overlapped.count(kind) for kind in OVERLAPPED}


OVERLAPPED = ("gather", "reduce-scatter")


def one_rank() -> list[dict]:
    """Every stage and recomputation, with gradients fused and not."""
    results = []
    for stage, options in STAGES.items():
        local, fused = Model(options).gradients(), None
        for recompute, fuses in itertools.product(RECOMPUTE, (False, True)):
            overrides = [*options, f"parallel.recompute={recompute}"]
            found, seen = measured(overrides, fuses=fuses)
            result = {"stage": stage, "recompute": recompute, "fuses": fuses, **seen}
            result["local"] = found.against(local)
            if not fuses:
                unfused = found
            else:
                fused = fused or found
                result["unfused"] = found.against(unfused)
                result["fused without recomputation"] = found.against(fused)
            results.append(result)
    return results


def refusal(overrides: Sequence[str]) -> str:
    """What a run with user buffers ends with on a GPU without multicast."""
    config = load_config(RUN, [*BF16, *TE, *overrides])
    context = ParallelContext(config, setup.initialize(config.parallel))
    os.environ["UB_SKIPMC"] = "0"
    try:
        with user_buffers(config, context):
            return "nothing"
    except ConfigError as error:
        return str(error)


def two_ranks() -> dict:
    """Tensor and sequence parallelism, with user buffers and without."""
    parallel = ["parallel.tensor=2", "parallel.sequence=true"]
    local, results = Model(parallel).gradients(), []
    for recompute, overlap in itertools.product(("none", "full"), ("false", "true")):
        options = [f"parallel.recompute={recompute}", f"parallel.tensor_overlap={overlap}"]
        found, seen = measured([*parallel, *options], fuses=True)
        result = {"recompute": recompute, "overlap": overlap == "true", **seen}
        results.append(result | {"local": found.against(local)})
    refused = refusal([*parallel, "parallel.tensor_overlap=true"])
    return {"steps": results, "refused": refused}


def continued() -> list[dict]:
    """Three steps by Transformer Engine's AdamW, and two, a checkpoint, and the third by others."""
    results = []
    for stage in ("all", "frozen"):
        options = [*TE, *STAGES[stage], "optimizer.lr=1e-2"]
        first = Model(options, fuses=True)
        for part in first.optimizer.chained_optimizers:
            assert isinstance(part.optimizer, FusedAdam)
        first.step()
        first.step()
        saved = FOLDER / stage
        state = {"optimizer": first.optimizer, "scheduler": first.scheduler}
        save_load.save(saved, first.chunks, first.config, progress={"step": 2}, **state)
        second = Model(options, fuses=True, seed=1)
        save_load.load_training(saved, second.chunks, second.optimizer, second.scheduler)
        before = {name: p.detach().clone() for name, p in second.named_parameters().items()}
        first.step()
        second.step()
        ours, moved = second.named_parameters(), 0
        for name, expected in first.named_parameters().items():
            assert torch.equal(ours[name], expected), name
            moved += not torch.equal(before[name], expected)
        results.append({"stage": stage, "moved": moved})
    return results


def main() -> None:
    if os.environ.get("WORLD_SIZE", "1") == "1":
        print(json.dumps({"steps": one_rank(), "continued": continued()}))
    else:
        results = two_ranks()
        if torch.distributed.get_rank() == 0:
            print(json.dumps(results))
    setup.shutdown()


if __name__ == "__main__":
    main()
