"""Plan of a run before it is queued: memory and time, and better configurations.

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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, help="YAML file of the run")
    parser.add_argument("--gpus", required=True, type=count, help="of the whole job")
    parser.add_argument("--gpu-memory", required=True, type=positive, metavar="GIB")
    parser.add_argument("--gpus-per-node", type=count, default=8)
    parser.add_argument(
        "--reserve",
        type=float,
        default=4.0,
        metavar="GIB",
        help="of every GPU for CUDA, NCCL and fragments (default %(default)s)",
    )
    parser.add_argument(
        "--mfu",
        type=positive,
        default=0.4,
        help="share of the peak for the days at a given MFU; no other time follows from it "
        "(default %(default)s)",
    )
    parser.add_argument(
        "--peak-tflops",
        type=positive,
        default=989.0,
        help="of a GPU in bf16 (default %(default)s, an H100)",
    )
    parser.add_argument(
        "--gemm-efficiency",
        type=positive,
        default=0.66,
        help="share of the peak that GEMMs and attention reach (default %(default)s)",
    )
    parser.add_argument(
        "--fp8-speedup",
        type=positive,
        default=1.6,
        help="of the decoder's GEMMs, casts included (default %(default)s)",
    )
    parser.add_argument(
        "--hbm",
        type=positive,
        default=3350.0,
        metavar="GB/S",
        help="of a GPU's memory (default %(default)s, an H100)",
    )
    parser.add_argument(
        "--hbm-efficiency",
        type=positive,
        default=0.84,
        help="share of it that elementwise kernels reach (default %(default)s)",
    )
    parser.add_argument(
        "--intra-node",
        type=positive,
        default=300.0,
        metavar="GB/S",
        help="a GPU sends at inside its node (default %(default)s)",
    )
    parser.add_argument(
        "--inter-node",
        type=positive,
        default=40.0,
        metavar="GB/S",
        help="a GPU's network card sends at to other nodes (default %(default)s)",
    )
    parser.add_argument(
        "--overlap-efficiency",
        type=positive,
        default=0.75,
        help="share of tensor-parallel communication that parallel.tensor_overlap hides "
        "(default %(default)s)",
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
    from megatron_owl2.planner.machine import Machine

    gc.freeze()  # the collector need not look at all of torch again and again

    machine = Machine(
        gpus=options.gpus,
        memory_gib=options.gpu_memory,
        gpus_per_node=options.gpus_per_node,
        reserve_gib=options.reserve,
        peak_tflops=options.peak_tflops,
        mfu=options.mfu,
        gemm_efficiency=options.gemm_efficiency,
        fp8_speedup=options.fp8_speedup,
        hbm=options.hbm,
        hbm_efficiency=options.hbm_efficiency,
        intra_node=options.intra_node,
        inter_node=options.inter_node,
        overlap_efficiency=options.overlap_efficiency,
    )
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
