"""The distributed optimizer's state in checkpoints: what megatron-core 0.16 needs mended there."""

import torch
from megatron.core.optimizer import MegatronOptimizer, distrib_optimizer

from megatron_owl2 import mcore


def _copy_optimizer_state(self, model_param, tensors):
    """DistributedOptimizer's own, less the step of torch's AdamW, which the checkpoint keeps per
    group: with it loading ends in a KeyError."""
    group, order = self.model_param_group_index_map[model_param]
    main_param = self.optimizer.param_groups[group]["params"][order]
    state = {"param": main_param, **self.optimizer.state[main_param]}
    for key in state.keys() - {"step"}:
        state[key].copy_(tensors[key])


def _optimizer_state(self):
    """DistributedOptimizer's own `state_dict`, less its assertion that something trains on this
    rank; the step is that of the ranks that train. All ranks call it together."""
    groups = self.optimizer.state_dict()["param_groups"]
    kept = [*self.optimizer.state.values(), *(group for group in groups if group["params"])]
    step = max((int(holder["step"]) for holder in kept if "step" in holder), default=0)
    step = torch.tensor(step, device=mcore.device())
    torch.distributed.all_reduce(step, torch.distributed.ReduceOp.MAX)
    for group in groups:
        del group["params"]
        group["step"] = int(step)  # torch's AdamW has it per parameter, the fused ones here
    return {"optimizer": {"param_groups": groups}}


DistributedOptimizer = distrib_optimizer.DistributedOptimizer
DistributedOptimizer.state_dict = _optimizer_state
if not distrib_optimizer.HAVE_APEX_OR_TE:
    DistributedOptimizer._set_main_param_and_optimizer_states = _copy_optimizer_state


def allocate_optimizer_state(optimizer: MegatronOptimizer) -> None:
    """Give torch's AdamW the state it would make in its first step, so that one can be loaded.

    The fused optimizers of Transformer Engine and apex need no such thing and are left alone.
    """
    if distrib_optimizer.HAVE_APEX_OR_TE:
        return
    for part in optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                zeros = {k: torch.zeros_like(parameter) for k in ("exp_avg", "exp_avg_sq")}
                part.optimizer.state[parameter] = {"step": torch.tensor(0.0), **zeros}


def load_optimizer_state(optimizer: MegatronOptimizer, state: dict) -> None:
    """`optimizer.load_state_dict`, with what the AdamW at hand needs beyond it.

    The settings of a group become those in the checkpoint, where another AdamW (torch's, apex's or
    Transformer Engine's) has not all that this one asks for. And torch's must count its steps per
    parameter: megatron-core hands one step tensor to all of them, and each would advance it.
    """
    optimizer.load_state_dict(state)
    for part in optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            for key, value in part.optimizer.defaults.items():
                group.setdefault(key, value)
        if not distrib_optimizer.HAVE_APEX_OR_TE:
            for parameter_state in part.optimizer.state.values():
                parameter_state["step"] = parameter_state["step"].clone()
