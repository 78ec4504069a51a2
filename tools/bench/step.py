"""Cost of a training step on one GPU: the paper's two stages under every kernel and recipe.

python tools/bench/step.py --layers 4 --json FILE

Model and batch are those of examples/7b, but with a few decoder layers: ViT-L, abstractor,
embedding and output layer are whole. One step is so many full micro-batches through the code that
trains (forward and backward passes, then the update of AdamW), as a single data-parallel rank does
it: every micro-batch comes from page-locked memory of the host, and what is done once in a step,
such as casting the weights to FP8, is done once.
TFLOP/s and MFU are those of forward and backward pass by the mathematics of the model, so what is
computed again counts as time and not as work. A combination that this machine cannot run, or that
fails, is a row that says why; the file has every row as soon as it is there. Needs a CUDA device;
`--tiny` shows the tool at work without one.
"""

import argparse
import gc
import itertools
import json
import math
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from megatron_owl2.config.fp8 import FP8_RECIPES
from megatron_owl2.config.load import load_config
from megatron_owl2.config.machine import check_machine
from megatron_owl2.config.schema import RunConfig
from megatron_owl2.config.validate_model import validate_model
from megatron_owl2.config.validate_parallel import validate_parallel
from megatron_owl2.data.batch import Batch, collate
from megatron_owl2.data.conversation import Sample
from megatron_owl2.errors import ConfigError
from megatron_owl2.mcore import setup
from megatron_owl2.mcore.parallel import ParallelContext
from megatron_owl2.model.flops import Load, training_flops
from megatron_owl2.model.owl2 import build
from megatron_owl2.training import optimizer as optim
from megatron_owl2.training import parameter_groups
from megatron_owl2.training.metrics.device import peak_tflops
from megatron_owl2.training.step import forward_backward, gradient_norm, update

RECIPES = Path(__file__).parent.parent.parent / "examples" / "7b"
STAGES = {"1": RECIPES / "pretrain.yaml", "2": RECIPES / "finetune.yaml"}
KERNELS = {
    "local": ("local", "none"),
    "te": ("transformer_engine", "none"),
    **{f"te-{fp8}": ("transformer_engine", fp8) for fp8 in FP8_RECIPES},
}
RECOMPUTE = ("none", "selective", "full")
TINY = [
    *("model.vision.image_size=28", "model.vision.hidden_size=32", "model.vision.num_layers=1"),
    *("model.vision.num_heads=4", "model.vision.ffn_size=64", "model.abstractor.num_queries=4"),
    *("model.abstractor.num_layers=1", "model.abstractor.num_heads=4"),
    *("model.abstractor.ffn_size=48", "model.decoder.hidden_size=64", "model.decoder.num_heads=4"),
    *("model.decoder.num_kv_heads=4", "model.decoder.ffn_size=96", "model.decoder.vocab_size=128"),
    *("data.sequence_length=32", "train.micro_batch_size=2"),
]


def settings(
    stage: str, kernels: str, recompute: str, layers: int, *, micro_batches: int = 4, tiny: bool
) -> RunConfig:
    """The recipe of a stage on one device, with `layers` decoder layers and so many micro-batches
    a step."""
    backend, fp8 = KERNELS[kernels]
    overrides = ["parallel.tensor=1", "parallel.sequence=false", f"parallel.recompute={recompute}"]
    overrides += [f"kernels.backend={backend}", f"kernels.fp8={fp8}"]
    overrides += [f"model.decoder.num_layers={layers}", *(TINY if tiny else [])]
    config = load_config(STAGES[stage], overrides)
    config.train.global_batch_size = micro_batches * config.train.micro_batch_size
    return config


def full_batch(config: RunConfig, seed: int = 0) -> Batch:
    """A micro-batch on the host without padding: an image, then text, in every row."""
    length, images = config.data.sequence_length, config.model.tokens_per_image
    chance = np.random.default_rng(seed)
    size = config.model.vision.image_size
    positions = np.arange(4, 4 + images)
    samples = []
    for _ in range(config.train.micro_batch_size):
        tokens = chance.integers(3, config.model.decoder.vocab_size, length)
        labels, modality = np.roll(tokens, -1), np.zeros(length, np.int64)
        labels[: positions[-1]], modality[positions] = -100, 1
        pixels = torch.from_numpy(chance.integers(0, 256, (3, size, size), np.uint8))
        samples.append([Sample(tokens, labels, modality, image_count=1, images=[pixels])])
    batch = collate(
        samples,
        row_indices=range(len(samples)),
        image_size=size,
        row_alignment=length,
        sequence_length=length,
        packed=False,
    )
    return batch if setup.on_cpu() else batch.pin_memory()


class Step:
    """One optimizer step after another on the same micro-batches, by the code that trains."""

    def __init__(self, config: RunConfig):
        self.config = config
        count = config.train.global_batch_size // config.train.micro_batch_size
        self.batches = [full_batch(config, number) for number in range(count)]
        torch.manual_seed(0)
        groups = setup.initialize(config.parallel)
        context = ParallelContext(config, groups, fuses_gradients=True, device=setup.device())
        # Values are drawn on the device; on the CPU that takes longer than all the rest.
        chunks = build(context, config.model, 1, initialize=False)
        for name, parameter in chunks[0].named_parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=config.model.init_std)
            else:
                torch.nn.init.constant_(parameter, 0.0 if name.endswith("bias") else 1.0)
        plan = parameter_groups.freeze(config, chunks)
        self.trained = {parameter.name for parameter in plan if parameter.trained}
        self.wrapped = optim.wrap_ddp(chunks, overlap=config.parallel.overlap)
        self.optimizer, self.scheduler = optim.build_optimizer(config, self.wrapped)

    def flops(self) -> float:
        """Operations of forward and backward pass."""
        rows, length = self.config.train.global_batch_size, self.config.data.sequence_length
        images = sum(len(batch.image) for batch in self.batches)
        vision = images * self.config.model.tokens_per_image
        targets = sum(int(batch.loss_mask.sum()) for batch in self.batches)
        pairs = rows * length * (length + 1) // 2
        load = Load(images, rows * length, vision, targets, pairs)
        return sum(
            training_flops(self.config.model, load, self.trained, self.config.stage.lora).values()
        )

    def run(self, mark: Callable[[], None]) -> None:
        """A step; `mark` is called before, between forward and backward pass and update, after."""
        mark()
        for chunk in self.wrapped:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        on_device = (batch.to(setup.device()) for batch in self.batches)
        forward_backward(self.config, self.wrapped, on_device, len(self.batches))
        mark()
        self.scheduler.step(1)
        norm = gradient_norm(self.optimizer)
        if not math.isfinite(norm):
            raise FloatingPointError(f"the gradient norm is {norm}; figures would mean nothing")
        update(self.optimizer, norm)
        mark()

    def milliseconds(self) -> tuple[float, float]:
        """Of forward and backward pass, and of the update; CUDA events where there is a GPU."""
        marks = []
        if setup.on_cpu():
            self.run(lambda: marks.append(time.perf_counter()))
            return 1e3 * (marks[1] - marks[0]), 1e3 * (marks[2] - marks[1])

        def mark():
            marks.append(torch.cuda.Event(enable_timing=True))
            marks[-1].record()

        self.run(mark)
        torch.cuda.synchronize()
        return marks[0].elapsed_time(marks[1]), marks[1].elapsed_time(marks[2])


def refusal(config: RunConfig) -> str | None:
    """Why these kernels cannot run here, if they cannot."""
    try:
        validate_model(config.model)
        validate_parallel(config, world_size=1)
        check_machine(config)
    except ConfigError as error:
        return str(error)
    return None


def measure(config: RunConfig, seconds: float, peak: float | None) -> dict:
    """Figures of one combination."""
    step = Step(config)
    for _ in range(3):  # kernels are chosen, caches filled, the optimizer's state made
        step.milliseconds()
    if not setup.on_cpu():
        torch.cuda.reset_peak_memory_stats()
    times, begin = [], time.monotonic()
    while len(times) < 3 or time.monotonic() - begin < seconds:
        times.append(step.milliseconds())
    forward_backward, updates = ([*part] for part in zip(*times, strict=True))
    flops = step.flops()
    tflops = flops / statistics.median(forward_backward) / 1e9
    return {
        "forward_backward_milliseconds": forward_backward,
        "update_milliseconds": updates,
        "flops": flops,
        "tflops": tflops,
        "mfu": tflops / peak if peak else None,
        "peak_gib": None if setup.on_cpu() else torch.cuda.max_memory_allocated() / 1024**3,
    }


def attempt(config: RunConfig, seconds: float, peak: float | None) -> dict:
    """`measure`, or why it failed; leaves the device as it was, where the failure lets it."""
    try:
        found = measure(config, seconds, peak)
    except torch.cuda.OutOfMemoryError:
        found = {"refused": "out of memory"}
    except Exception as error:  # whatever it is, the other rows are worth having
        found = failure(error)
    try:
        gc.collect()
        setup.shutdown()
        torch.cuda.empty_cache()
    except Exception:  # a device that is lost; the rows to come say so
        traceback.print_exc()
    return found


def failure(error: Exception) -> dict:
    """What a row says of an error that nobody foresaw; where it came from goes to stderr."""
    traceback.print_exception(error)
    return {"refused": f"failed: {type(error).__name__}: {' '.join(str(error).split())}"}


def rows(options: argparse.Namespace, peak: float | None) -> Iterator[dict]:
    """One combination after the other, measured or refused."""
    for stage, kernels in itertools.product(options.stage, options.kernels):
        row = {"stage": stage, "kernels": kernels}
        for recompute in options.recompute:
            config = settings(
                stage,
                kernels,
                recompute,
                options.layers,
                micro_batches=options.micro_batches,
                tiny=options.tiny,
            )
            if reason := refusal(config):  # whatever is computed again
                yield row | {"recompute": "any", "refused": reason}
                break
            print(stage, kernels, recompute, "...", file=sys.stderr, flush=True)
            found = attempt(config, options.seconds, peak)
            yield row | {"recompute": recompute} | found


def write(path: Path, tree: dict) -> None:
    """JSON, whole at any moment."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(tree, indent=1) + "\n")
    os.replace(partial, path)


def table(results: list[dict]) -> str:
    """Markdown, a row per combination."""
    lines = [
        "| stage | kernels | recompute | forward and backward, ms (least) | update, ms | TFLOP/s "
        "| MFU | peak GiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        cells = [result["stage"], result["kernels"], result["recompute"]]
        if "refused" in result:
            cells += [result["refused"].replace("|", "\\|"), *[""] * 4]
        else:
            times = result["forward_backward_milliseconds"]
            cells += [
                f"{statistics.median(times):.1f} ({min(times):.1f})",
                f"{statistics.median(result['update_milliseconds']):.1f}",
                f"{result['tflops']:.3g}",
                "" if result["mfu"] is None else f"{result['mfu']:.1%}",
                "" if result["peak_gib"] is None else f"{result['peak_gib']:.1f}",
            ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stage", nargs="+", choices=STAGES, default=[*STAGES])
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=[*KERNELS])
    parser.add_argument("--recompute", nargs="+", choices=RECOMPUTE, default=[*RECOMPUTE])
    parser.add_argument("--layers", type=int, default=4, help="of the decoder")
    parser.add_argument("--micro-batches", type=int, default=4, metavar="N", help="of a step")
    parser.add_argument("--seconds", type=float, default=10, help="per row; 3 steps at least")
    parser.add_argument(
        "--peak-tflops",
        type=float,
        default=0,
        help="of the device in dense bf16, for MFU; also of FP8 rows (default: by its name)",
    )
    parser.add_argument("--tiny", action="store_true", help="toy sizes, on a CPU too")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    if setup.on_cpu() and not options.tiny:
        print(
            "error: torch sees no CUDA device here, and these sizes are for one; --tiny shows the "
            "tool at work without",
            file=sys.stderr,
        )
        return 1

    peak = peak_tflops(options.peak_tflops)
    device = "CPU" if setup.on_cpu() else torch.cuda.get_device_name()
    setting = {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "device": device,
        "layers": options.layers,
        "micro_batches": options.micro_batches,
        "tiny": options.tiny,
        "peak_tflops": peak,
    }
    print(", ".join(f"{key} {value}" for key, value in setting.items()))
    results = []
    for row in rows(options, peak):
        results.append(row)
        if options.json:
            write(options.json, setting | {"results": results})
    print(table(results))
    return 0 if any("flops" in result for result in results) else 1  # nothing was measured


if __name__ == "__main__":
    sys.exit(main())
