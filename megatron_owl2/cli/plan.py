"""Plan of a run before it is queued: memory, time, and better configurations.

owl2 plan --config examples/7b/pretrain.yaml --gpus 64 --gpu-memory 80 \\
    [section.key=value ...]

Shows memory, operations, traffic and days. Needs no GPU, no data and no checkpoint. Exit codes: 0
the config fits; 1 it does not; 2 the config cannot run on so many GPUs.
"""

import argparse
import gc
import json
from pathlib import Path

from megatron_owl2.cli.command import Command
from megatron_owl2.cli.options import count, positive
from megatron_owl2.planner.machine import Machine

# Options for what is assumed of the machine, with the defaults of `Machine`.
_MACHINE = {
    "gpus_per_node": ("--gpus-per-node", count, None, None),
    "reserve_gib": (
        "--reserve",
        float,
        "GIB",
        "of every GPU for CUDA, NCCL and fragments (default %(default)s)",
    ),
    "mfu": (
        "--mfu",
        positive,
        None,
        "share of the peak for the days at a given MFU; no other time follows from it "
        "(default %(default)s)",
    ),
    "peak_tflops": (
        "--peak-tflops",
        positive,
        None,
        "of a GPU in bf16 (default %(default)s, an H100)",
    ),
    "gemm_efficiency": (
        "--gemm-efficiency",
        positive,
        None,
        "share of the peak that GEMMs and attention reach (default %(default)s)",
    ),
    "fp8_speedup": (
        "--fp8-speedup",
        positive,
        None,
        "of the decoder's GEMMs, casts included (default %(default)s)",
    ),
    "hbm": ("--hbm", positive, "GB/S", "of a GPU's memory (default %(default)s, an H100)"),
    "hbm_efficiency": (
        "--hbm-efficiency",
        positive,
        None,
        "share of it that elementwise kernels reach (default %(default)s)",
    ),
    "intra_node": (
        "--intra-node",
        positive,
        "GB/S",
        "a GPU sends at inside its node (default %(default)s)",
    ),
    "inter_node": (
        "--inter-node",
        positive,
        "GB/S",
        "a GPU's network card sends at to other nodes (default %(default)s)",
    ),
    "overlap_efficiency": (
        "--overlap-efficiency",
        positive,
        None,
        "share of tensor-parallel communication that parallel.tensor_overlap hides "
        "(default %(default)s)",
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, help="YAML file of the run")
    parser.add_argument("--gpus", required=True, type=count, help="of the whole job")
    parser.add_argument("--gpu-memory", required=True, type=positive, metavar="GIB")
    for field, (option, kind, unit, meaning) in _MACHINE.items():
        default = getattr(Machine, field)
        parser.add_argument(
            option, dest=field, type=kind, default=default, metavar=unit, help=meaning
        )
    parser.add_argument(
        "--tokens-per-sample",
        type=count,
        metavar="N",
        help="that are not padding, with the image's (default: full rows)",
    )
    parser.add_argument(
        "--mean-length",
        type=count,
        metavar="N",
        help="positions of a row as it is computed, padding included (default: "
        "data.sequence_length)",
    )
    parser.add_argument("--json", metavar="FILE", help="the whole plan, in bytes and seconds")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")


def run(options: argparse.Namespace) -> int:
    """Returns 0 if the config fits, 1 if it does not."""
    from megatron_owl2.mcore.setup import setup

    setup()
    from megatron_owl2.config.load import load_config
    from megatron_owl2.planner import plan, report

    gc.freeze()  # the collector need not look at all of torch again and again

    assumed = {field: getattr(options, field) for field in _MACHINE}
    machine = Machine(gpus=options.gpus, memory_gib=options.gpu_memory, **assumed)
    config = load_config(options.config, options.overrides)
    found = plan.plan_run(
        config, machine, tokens=options.tokens_per_sample, mean_length=options.mean_length
    )
    if options.json:
        Path(options.json).write_text(json.dumps(found.to_json(), indent=1) + "\n")
    print(report.text(found))
    return 0 if found.fits else 1


main = Command(
    verb="plan", help=__doc__, add_arguments=add_arguments, run=run, intermixed=True
).main
