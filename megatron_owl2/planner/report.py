"""Text report of a plan."""

from megatron_owl2.planner import search
from megatron_owl2.planner.plan import Plan
from megatron_owl2.planner.row_images import mean_images, most_images
from megatron_owl2.planner.timing import StepTime

_GIB = 2**30

_CAUSES = {  # of StepTime: in words, and the setting that changes it most
    "gemm": ("GEMMs and attention", "kernels.fp8"),
    "elementwise": ("elementwise operations", "kernels.elementwise"),
    "recompute": ("recomputation of both", "parallel.recompute"),
    "accumulate": ("gradients added to their buffers", "kernels.backend"),
    "layers": ("communication of layers", "parallel.tensor, tensor_overlap"),
    "bubble": ("pipeline bubble", "parallel.virtual_pipeline"),
    "data": ("gradients and parameters sent", "parallel.overlap"),
    "update": ("update of the parameters", "kernels.backend"),
}


def text(plan: Plan) -> str:
    """The whole plan, for a terminal 100 characters wide."""
    sections = (_head, _memory, _work, _time, _traffic, _recompute, _candidates, _notes)
    return "\n\n".join("\n".join(section(plan)) for section in sections)


def verdict(plan: Plan) -> str:
    """One line on whether the config itself fits, by how much, and else what to set."""
    rank, machine = plan.fullest, plan.machine
    need = plan.memory[rank].total / _GIB
    have = machine.usable / _GIB
    where = f" on pipeline rank {rank}" if len(plan.memory) > 1 else ""
    sizes = f"{need:.1f} GiB{where} of {machine.memory_gib:g} - {machine.reserve_gib:g} GiB reserve"
    if plan.fits:
        return f"this configuration fits: {sizes}, {have - need:.1f} GiB are left"
    remedy = f"; set {plan.remedy}" if plan.remedy else ""
    return f"this configuration does NOT fit: {sizes}, {need - have:.1f} GiB are missing{remedy}"


def _head(plan: Plan) -> list[str]:
    config, machine = plan.config, plan.machine
    parallel = config.parallel
    data_parallel = machine.gpus // (parallel.tensor * parallel.pipeline * parallel.context)
    count = config.train.global_batch_size // (config.train.micro_batch_size * data_parallel)
    sizes = f"tensor {parallel.tensor}" + " with sequence" * parallel.sequence
    sizes += f", pipeline {parallel.pipeline}, virtual pipeline {parallel.virtual_pipeline}, "
    sizes += f"context {parallel.context}, recompute {parallel.recompute}"
    what = "rows" if config.data.packing else "samples"
    steps = "steps follow from the data" if plan.steps is None else f"{plan.steps:,} steps"
    return [
        f"stage {config.stage.name}: {plan.trained:,} of {plan.parameters:,} parameters train",
        f"{machine.gpus:,} GPUs: {sizes}",
        f"{data_parallel:,} data-parallel ranks x {count:,} "
        f"micro-batches x {config.train.micro_batch_size} {what} = "
        f"{config.train.global_batch_size:,} {what} a step, {steps}",
        plan.sharding,
    ]


def _memory(plan: Plan) -> list[str]:
    lines = [
        "memory of the fullest rank by pipeline rank, GiB (activations are not yet verified on a "
        "GPU)",
    ]
    for number, rank in enumerate(plan.memory):
        held = rank.held
        sizes = {
            "parameters": held.parameters,
            "gradients": held.gradients,
            "optimizer": held.optimizer,
            **({"FP8 copies": held.copies} if plan.config.kernels.fp8 != "none" else {}),
            "activations": rank.activations,
            "update": rank.update,
            "total": rank.total,
        }
        if number == 0:
            lines.append("rank" + "".join(f"{name:>13}" for name in sizes))
        lines.append(f"{number:>4}" + "".join(f"{size / _GIB:>13.2f}" for size in sizes.values()))
    return [*lines, verdict(plan)]


def _work(plan: Plan) -> list[str]:
    total, machine = sum(plan.model_flops.values()), plan.machine
    parts = ", ".join(f"{name} {n / total:.0%}" for name, n in plan.model_flops.items())
    return [
        f"model FLOPs of a step: {total:.3g} ({parts}),",
        f"{_content(plan)}; recomputation adds {plan.again_flops / total:.0%}",
        f"at {machine.mfu:.0%} MFU of {machine.peak_tflops:g} TFLOP/s: {_span(plan.days)}",
    ]


def _time(plan: Plan) -> list[str]:
    time = plan.time
    lines = [
        "time of a step by cause (on paper; not measured on a GPU)",
        f"{'cause':<34}{'s':>8}{'share':>7}  set by",
    ]
    for name, (cause, setting) in _CAUSES.items():
        seconds = getattr(time, name)
        lines.append(f"{cause:<34}{seconds:>8.3f}{seconds / time.total:>7.0%}  {setting}".rstrip())
    span = _span(_days(plan, time)) + " in all" * (plan.steps is not None)
    return [
        *lines,
        f"{'step':<34}{time.total:>8.3f}{'':>7}  {plan.mfu(time):.0%} MFU, {span}",
        f"{'of it on padding':<34}{time.padding:>8.3f}{time.padding / time.total:>7.0%}  "
        f"{plan.tokens:,} of {plan.mean_length:,} positions are tokens",
        _dominant(plan),
    ]


def _dominant(plan: Plan) -> str:
    """What costs most beside the GEMMs of the model, and what next."""
    (first, most), (second, next_most), *_ = plan.time.overheads.items()
    names = {name: cause for name, (cause, _) in _CAUSES.items()} | {"padding": "padding"}
    share, next_share = most / plan.time.total, next_most / plan.time.total
    found = f"what dominates beside the GEMMs: {names[first]} ({share:.0%})"
    return f"{found}, then {names[second]} ({next_share:.0%})" if next_share >= 0.01 else found


def _content(plan: Plan) -> str:
    """What a row of the counted load holds."""
    images = mean_images(plan.config)
    if not plan.config.data.packing:
        return f"an image and {plan.tokens:,} tokens a sample"
    return f"{images} image{'s' * (images > 1)} and {plan.tokens:,} tokens a packed row"


def _days(plan: Plan, time: StepTime) -> float | None:
    return None if plan.steps is None else time.total * plan.steps / 86400


def _span(days: float | None) -> str:
    if days is None:
        return "steps follow from the data"
    return f"{days:.2g} days" if days >= 1 else f"{24 * days:.2g} hours"


def _traffic(plan: Plan) -> list[str]:
    columns = ("tensor", "context", "pipeline", "gradients", "parameters")
    lines = [
        "sent by one rank in a step by pipeline rank, GB",
        "rank" + "".join(f"{name:>13}" for name in columns),
    ]
    for number, rank in enumerate(plan.traffic):
        sizes = (getattr(rank, name) for name in columns)
        lines.append(f"{number:>4}" + "".join(f"{size / 1e9:>13.2f}" for size in sizes))
    return lines


def _recompute(plan: Plan) -> list[str]:
    usable, own = plan.machine.usable, plan.config.parallel.recompute
    lines = [
        "this configuration by parallel.recompute, the first that fits is the fastest",
        f"{'recompute':<10}{'GiB':>6}{'fits':>6}{'step s':>8}{'MFU':>6}",
    ]
    for kind, candidate in plan.by_recompute.items():
        need, time = candidate.memory.total, candidate.time
        lines.append(
            f"{kind:<10}{need / _GIB:>6.1f}{'yes' if need <= usable else 'no':>6}"
            f"{time.total:>8.2g}{plan.mfu(time):>6.0%}" + "  (as the config has it)" * (kind == own)
        )
    return lines


def _candidates(plan: Plan) -> list[str]:
    machine = plan.machine
    if not plan.candidates:
        return [
            f"none of {plan.valid:,} valid parallel configurations fits {machine.memory_gib:g} "
            "GiB; take more GPUs or a shorter data.sequence_length"
        ]
    lines = [
        f"the fastest of {plan.valid:,} valid configurations in powers of two that fit, one a "
        "shape",
        f"{'tp':>3}{'pp':>3}{'vp':>3}{'cp':>3}{'rows':>5} {'recompute':<10}"
        f"{'GiB':>6}{'step s':>8}{'bubble':>8}{'MFU':>6}" + (f"{'days':>7}" if plan.steps else ""),
    ]
    for candidate in plan.candidates:
        parallel, time = candidate.config.parallel, candidate.time
        days = _days(plan, time)
        lines.append(
            f"{parallel.tensor:>3}{parallel.pipeline:>3}{parallel.virtual_pipeline:>3}"
            f"{parallel.context:>3}{candidate.config.train.micro_batch_size:>5} "
            f"{parallel.recompute:<10}{candidate.memory.total / _GIB:>6.1f}{time.total:>8.2g}"
            f"{time.bubble_share:>8.0%}{plan.mfu(time):>6.0%}"
            + ("" if days is None else f"{days:>7.2g}")
        )
    lines.append("on the command line, in the same order:")
    for candidate in plan.candidates:
        changed = search.overrides(candidate.config, plan.config)
        lines.append(f"  {changed or '(as the config has it)'}")
    return lines


def _notes(plan: Plan) -> list[str]:
    machine, backend = plan.machine, plan.config.kernels.backend
    images = "an image in every sample"
    if plan.config.data.packing:
        images = f"{most_images(plan.config)} images in every row"
    lines = [
        "Parameters, gradients and optimizer states are exact. Activations come from running the",
        f"model without storage on torch's kernels with flash attention, {images}.",
        "'update' is what torch's AdamW works with when no activations are there, a fused one not.",
        f"Times assume {machine.gemm_efficiency:.0%} of {machine.peak_tflops:g} TFLOP/s for "
        f"GEMMs of any size (x {machine.fp8_speedup:g} in FP8), {machine.hbm_efficiency:.0%} of",
        f"{machine.hbm:g} GB/s for elementwise kernels, whose bytes are counted, "
        f"{machine.intra_node:g} GB/s a GPU in a node of",
        f"{machine.gpus_per_node} and {machine.inter_node:g} through its network card; "
        f"parallel.tensor_overlap hides {machine.overlap_efficiency:.0%}. Launches of kernels,",
        "data and checkpoints are not in them.",
    ]
    if plan.config.data.packing:
        lines += [
            "Packed rows: times and operations are those of the paper's mixture with "
            f"{mean_images(plan.config)} of these images",
            "on average, and of attention over whole rows, more than that of their samples.",
        ]
    if backend != "local":
        lines += [
            f"kernels.backend={backend} keeps other tensors, inputs of linears in FP8 if told so:",
            "the activations here are those of kernels.backend=local in bf16.",
        ]
    if plan.config.kernels.fp8 != "none":
        lines += [
            "'FP8 copies' are two bytes for every weight of the decoder's linears, the most that",
            "Transformer Engine keeps of it but for scales; they are not yet verified on a GPU.",
        ]
    return lines
