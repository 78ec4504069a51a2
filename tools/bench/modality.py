"""Cost of split norms, keys and values: one decoder layer, forward and backward, three ways.

python tools/bench/modality.py --shape 65/256 65/2048 --json FILE

`ours` is the decoder's own layer, `unsplit` the same with modality_split=[], and `gather-scatter`
works as the released code does: for each modality its rows are gathered by a mask, projected and
scattered, norm by norm and projection by projection. All run in one process, one after the other
in every round, so that a busy machine slows them alike; compare the ratios, not the times.
Status 1 if ours and gather-scatter disagree.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import time
import warnings
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from megatron_owl2.config.schema import (
    DecoderConfig,
    ModelConfig,
    ParallelConfig,
    Precision,
    RunConfig,
    TrainConfig,
)
from megatron_owl2.config.validate_model import validate_model
from megatron_owl2.errors import ConfigError
from megatron_owl2.mcore import setup
from megatron_owl2.mcore.parallel import ParallelContext
from megatron_owl2.model.attention import attend
from megatron_owl2.model.decoder import DecoderLayer, rotary_tables
from megatron_owl2.model.kernels import build_kernels
from megatron_owl2.model.kernels.plain import rotate
from megatron_owl2.model.modality import Modality

PRECISION: dict[str, Precision] = {"float32": "fp32", "bfloat16": "bf16"}
AGREE = {"float32": 1e-4, "bfloat16": 0.03}  # greatest difference over the greatest value
TARGETS = {  # what ours may cost more than the other at so many tokens
    ("unsplit", 256): 0.08,
    ("unsplit", 2048): 0.03,
    ("gather-scatter", 256): 0.03,
    ("gather-scatter", 2048): 0.03,
}


@dataclasses.dataclass(frozen=True)
class Shape:
    """One sequence of `tokens`, `vision` of them visual and in one block."""

    vision: int
    tokens: int

    @classmethod
    def parse(cls, text: str) -> "Shape":
        """From "65/256"; raises ArgumentTypeError for anything else."""
        vision, _, tokens = text.partition("/")
        if vision.isdecimal() and tokens.isdecimal() and int(vision) <= int(tokens) > 0:
            return cls(int(vision), int(tokens))
        raise argparse.ArgumentTypeError(f"{text!r} is not VISION/TOKENS, like 65/256")

    def __str__(self) -> str:
        return f"{self.vision}/{self.tokens}"


class GatherScatterLayer(nn.Module):
    """The layer in the manner of the released code, on copies of the weights of `ours`.

    Output, MLP and norm weights are those of `ours` themselves.
    """

    def __init__(self, ours: DecoderLayer, config: DecoderConfig):
        super().__init__()
        self.ours, self.head_size = ours, config.hidden_size // config.num_heads
        qkv = ours.attention.qkv
        shape = (config.num_kv_heads, -1, self.head_size, config.hidden_size)
        shared = qkv.linear_qkv.weight.detach().view(shape)
        vision = qkv.linear_kv_vision.weight.detach().view(shape)

        def rows(weight: torch.Tensor) -> nn.Parameter:
            return nn.Parameter(weight.reshape(-1, config.hidden_size).clone())

        self.query = rows(shared[:, :-2])
        self.key = nn.ParameterList([rows(shared[:, -2]), rows(vision[:, 0])])
        self.value = nn.ParameterList([rows(shared[:, -1]), rows(vision[:, 1])])

    def forward(self, x, modality, rotary, attention_mask, cache):
        masks = [~modality.is_vision.squeeze(-1), modality.is_vision.squeeze(-1)]
        normed = self.norm(self.ours.input_norm, x, masks)
        query, key, value = (
            part.view(*x.shape[:2], -1, self.head_size)
            for part in (
                F.linear(normed, self.query),
                apart(normed, masks, F.linear, self.key),
                apart(normed, masks, F.linear, self.value),
            )
        )
        context = attend(rotate(query, rotary), rotate(key, rotary), value, causal=True)
        x = x + self.ours.attention.linear_proj(context)
        return x + self.ours.mlp(self.norm(self.ours.pre_mlp_norm, x, masks))

    def norm(self, norm, x, masks):
        def llama(rows, weight):
            wide = rows.float()
            wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm.eps)
            return weight * wide.to(rows.dtype)

        return apart(x, masks, llama, [norm.weight_text, norm.weight_vision])


def apart(x, masks, function, weights):
    """function(rows, weight) on the rows of each mask, scattered into one empty buffer."""
    out = None
    for mask, weight in zip(masks, weights, strict=True):
        rows = function(x[mask], weight)
        if out is None:
            out = x.new_empty(*x.shape[:2], rows.shape[-1])
        out[mask] = rows
    return out


def build(decoder: DecoderConfig, dtype: str) -> dict[str, nn.Module]:
    """The three layers by name, on the random weights of the first."""
    layers = {}
    for name, split in (("ours", decoder.modality_split), ("unsplit", [])):
        config = RunConfig(train=TrainConfig(precision=PRECISION[dtype]))
        config.model.decoder = dataclasses.replace(decoder, modality_split=split)
        context = ParallelContext(config, setup.initialize(ParallelConfig()))
        layers[name] = DecoderLayer(context, build_kernels(context), config.model, 0).to(
            setup.device()
        )
    ours, unsplit = layers.values()
    for norm in (ours.input_norm, ours.pre_mlp_norm):
        for weight in norm.parameters():
            nn.init.normal_(weight, mean=1.0, std=0.1)
    for name, _ in list(unsplit.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        setattr(unsplit.get_submodule(owner), leaf, ours.get_parameter(name))
    return layers | {"gather-scatter": GatherScatterLayer(ours, decoder)}


class Step:
    """Forward and backward of a layer on the fixed random input of one shape."""

    def __init__(self, shape: Shape, decoder: DecoderConfig, dtype: str):
        place = {"dtype": getattr(torch, dtype), "device": setup.device()}
        size = (shape.tokens, 1, decoder.hidden_size)
        self.x = torch.randn(size, **place).requires_grad_()
        self.grad = torch.randn(size, **place)
        start = min(16, shape.tokens - shape.vision)
        rows = torch.arange(start, start + shape.vision, device=setup.device())
        is_vision = torch.zeros(shape.tokens, 1, 1, dtype=torch.bool, device=setup.device())
        is_vision[rows] = True
        self.modality = Modality(is_vision, rows)
        positions = torch.arange(shape.tokens, device=setup.device()).unsqueeze(0)
        self.rotary = rotary_tables(positions, decoder, self.x.dtype)

    def clear(self, layer: nn.Module):
        layer.zero_grad(set_to_none=True)
        self.x.grad = None

    def run(self, layer: nn.Module) -> torch.Tensor:
        out = layer(self.x, self.modality, self.rotary, None, None)
        out.backward(self.grad)
        return out

    def milliseconds(self, layer: nn.Module) -> float:
        """The time of one `run`, by CUDA events where there is a GPU."""
        self.clear(layer)
        if setup.on_cpu():
            begin = time.perf_counter()
            self.run(layer)
            return 1e3 * (time.perf_counter() - begin)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        self.run(layer)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)


def disagreement(step: Step, layers: dict[str, nn.Module]) -> float:
    """The greatest difference of ours from gather-scatter over the greatest value.

    Compared are the output, its gradient to the input, and those to the norms' weights and the
    split projections'.
    """
    found = []
    for name in ("ours", "gather-scatter"):
        layer, ours = layers[name], layers["ours"]
        step.clear(layer)
        out = step.run(layer).detach()
        norms = [p.grad for m in (ours.input_norm, ours.pre_mlp_norm) for p in m.parameters()]
        found.append([out, step.x.grad, *norms, *projections(layer)])
        step.clear(layer)
    return max(
        ((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).item()
        for a, b in zip(*found, strict=True)
    )


def projections(layer: nn.Module) -> list[torch.Tensor]:
    """Gradients [groups, .., d, h] to the query, text key and value, vision key and value."""
    if isinstance(layer, GatherScatterLayer):
        weights = [layer.query, layer.key[0], layer.value[0], layer.key[1], layer.value[1]]
        groups = layer.ours.attention.qkv.groups
        return [w.grad.view(groups, -1, layer.head_size, w.shape[-1]) for w in weights]
    qkv = layer.attention.qkv
    shared, vision = (
        linear.weight.grad.view(qkv.groups, -1, qkv.head_size, linear.weight.shape[-1])
        for linear in (qkv.linear_qkv, qkv.linear_kv_vision)
    )
    split = [shared.shape[1] - 2, 1, 1]
    return [*shared.split(split, dim=1), *vision.split(1, dim=1)]


def measure(step: Step, layers: dict[str, nn.Module], seconds: float, label: str) -> dict:
    """Milliseconds of every layer in every round, the order turning from round to round."""
    times = {name: [] for name in layers}
    for layer in layers.values():
        step.milliseconds(layer)
    rounds, begin = 0, time.monotonic()
    while rounds < 3 or time.monotonic() - begin < seconds:
        turn = rounds % len(layers)
        for name in [*layers, *layers][turn : turn + len(layers)]:
            times[name].append(step.milliseconds(layers[name]))
            step.clear(layers[name])
        rounds += 1
        print(f"\r{label}: {rounds} rounds", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return times


def launches(step: Step, layer: nn.Module) -> dict[str, int]:
    """On a GPU the kernels of one `run` and how often it waited for the device."""
    step.clear(layer)
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        step.run(layer)
        torch.cuda.synchronize()
    kernels = sum(e.device_type == torch.profiler.DeviceType.CUDA for e in profile.events())
    step.clear(layer)
    with warnings.catch_warnings(record=True) as waits:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        step.run(layer)
        torch.cuda.set_sync_debug_mode("default")
    waits = [w for w in waits if "synchronizing" in str(w.message)]
    return {"kernels": kernels, "waits": len(waits)}


def summary(shape: Shape, decoder: DecoderConfig, times: dict[str, list[float]]) -> dict:
    """What is reported of one shape; `cost` is median, least and most of ours / other - 1."""
    width = decoder.hidden_size
    kv = width * decoder.num_kv_heads // decoder.num_heads
    arithmetic = 2 * width + 2 * kv + 3 * decoder.ffn_size  # weights per input channel
    cost = {}
    for other in ("unsplit", "gather-scatter"):
        ratios = [a / b - 1 for a, b in zip(times["ours"], times[other], strict=True)]
        cost[other] = [statistics.median(ratios), min(ratios), max(ratios)]
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "shape": str(shape),
        "rounds": len(times["ours"]),
        "milliseconds": {n: [medians[n], min(values)] for n, values in times.items()},
        "tokens_per_second": {n: 1e3 * shape.tokens / ms for n, ms in medians.items()},
        "cost": cost,
        "extra_arithmetic": 2 * kv * shape.vision / (arithmetic * shape.tokens),
        "target": {n: t for (n, tokens), t in TARGETS.items() if tokens == shape.tokens},
    }


def table(results: list[dict]) -> str:
    """Markdown, a row per shape and layer."""
    lines = [
        "| vision/tokens | layer | ms (least) | tokens/s | ours costs more, median (least .. most) "
        "| target | kernels | waits |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        for name, (ms, least) in result["milliseconds"].items():
            cost = target = ""
            if name in result["cost"]:
                cost = "{:+.1%} ({:+.1%} .. {:+.1%})".format(*result["cost"][name])
            if name in result["target"]:
                target = f"{result['target'][name]:+.0%}"
            counted = result.get("launches", {}).get(name, {})
            lines.append(
                f"| {result['shape']} | {name} | {ms:.2f} ({least:.2f}) | "
                f"{result['tokens_per_second'][name]:.0f} | {cost} | {target} | "
                f"{counted.get('kernels', '')} | {counted.get('waits', '')} |"
            )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    shapes = [Shape(65, 256), Shape(65, 2048)]
    parser.add_argument(
        "--shape", nargs="+", type=Shape.parse, default=shapes, metavar="VISION/TOKENS"
    )
    parser.add_argument("--hidden-size", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--ffn", type=int, default=11008)
    default = "float32" if setup.on_cpu() else "bfloat16"
    parser.add_argument("--dtype", choices=PRECISION, default=default)
    parser.add_argument("--seconds", type=float, default=120, help="per shape; 3 rounds at least")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)

    decoder = DecoderConfig(
        hidden_size=options.hidden_size,
        num_heads=options.heads,
        num_kv_heads=options.heads,
        ffn_size=options.ffn,
    )
    try:
        validate_model(ModelConfig(decoder=decoder))
    except ConfigError as error:
        parser.error(str(error))
    torch.manual_seed(0)
    layers = build(decoder, options.dtype)
    device = "CPU" if setup.on_cpu() else torch.cuda.get_device_name()
    setting = {
        "torch": torch.__version__,
        "device": device,
        "threads": torch.get_num_threads(),
        "dtype": options.dtype,
        "hidden_size": options.hidden_size,
        "heads": options.heads,
        "ffn": options.ffn,
    }
    print(", ".join(f"{key} {value}" for key, value in setting.items()), file=sys.stderr)
    results = []
    for shape in options.shape:
        step = Step(shape, decoder, options.dtype)
        off = disagreement(step, layers)
        if not off <= AGREE[options.dtype]:
            print(f"error: {shape}: ours and gather-scatter differ by {off:.1e}", file=sys.stderr)
            return 1
        times = measure(step, layers, options.seconds, str(shape))
        result = summary(shape, decoder, times) | {"disagreement": off, "times": times}
        if not setup.on_cpu():
            result["launches"] = {name: launches(step, layer) for name, layer in layers.items()}
        results.append(result)
    print(table(results))
    if options.json:
        options.json.write_text(json.dumps(setting | {"results": results}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
