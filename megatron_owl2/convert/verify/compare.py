"""Comparison of a checkpoint with a Hugging Face directory: names, weights, and computations.

The other side of the computation is the modelling code that an export carries (`remote_code`),
which shares nothing with the Megatron model but the mapping table; code that lies in the directory
itself is never run.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import torch

from megatron_owl2.config.model_differences import RUN_ONLY, model_differences
from megatron_owl2.config.schema import ModelConfig
from megatron_owl2.convert import hf_config
from megatron_owl2.convert.expand import expand
from megatron_owl2.convert.hf_weights import read_hf
from megatron_owl2.convert.layouts import check_layout
from megatron_owl2.convert.lazy_tensor import LazyTensor
from megatron_owl2.convert.mapping import rules, shared_branches
from megatron_owl2.convert.megatron_io import read_checkpoint
from megatron_owl2.convert.remote_files import model_class
from megatron_owl2.convert.safetensors_io import TensorReader
from megatron_owl2.convert.verify.verify import Verification
from megatron_owl2.data.image_tokens import IGNORE_INDEX, IMAGE_TOKEN_ID
from megatron_owl2.errors import ConversionError
from megatron_owl2.mcore import setup

# Of fp32 on both sides; logits and losses where they are above 1, gradients of each parameter in
# proportion to their size.
LOGITS, LOSS, GRADIENT = 1e-4, 1e-5, 1e-4
_TEXT = 24  # ids in an input, beside its images
_SETTINGS = ("vision", "abstractor", "decoder", "image_mean", "image_std", "image_mode")
_PROMPTS = ("template", "tokenization")  # which a released directory leaves to the run


@dataclass(frozen=True)
class CheckResult:
    """Result of one check: its name, whether both sides agree, and by how much."""

    check: str
    passed: bool
    detail: str

    def __str__(self) -> str:
        return f"{'ok' if self.passed else 'FAILED':<7} {self.check}: {self.detail}"


def compare(
    directory: str | Path, hf_directory: str | Path, overrides: Sequence[str] = ()
) -> Iterator[CheckResult]:
    """Checks of a checkpoint against a directory in a released layout; every rank exhausts them.

    They cover settings, keys and shapes, every weight, then logits, loss and every gradient for a
    text, one image and two images in fp32 on seeded random inputs, with the weights rounded to the
    narrower of the two files. Results come on rank 0, none elsewhere. If names or shapes differ,
    nothing is computed. Takes 16 bytes of memory for every parameter on rank 0. `overrides` are
    those of `verify`. Raises CheckpointError for a damaged checkpoint and ConversionError for
    a directory that is none in a released layout or cannot be read, or without transformers.
    """
    verification = Verification(directory, [*overrides, "train.precision=fp32"])
    model, first = verification.config.model, verification.rank == 0
    stored = read_checkpoint(verification.directory)
    layout = hf_config.find_layout(hf_directory)
    has_processor = (Path(hf_directory) / "processor_config.json").exists()
    compared = _SETTINGS + _PROMPTS if has_processor else _SETTINGS
    settings = _differing(compared, model, hf_config.read_model(hf_directory, layout))
    TensorReader(hf_directory)  # an error if they cannot be read, a failed check if they misfit
    try:
        check_layout(layout, model)
        shapes = {name: tensor.shape for name, tensor in stored.items()}
        theirs = read_hf(hf_directory, layout, model, shapes)
        if missing := shapes.keys() - theirs.keys():
            raise ConversionError(f"the checkpoint has more: {', '.join(sorted(missing))}")
    except ConversionError as error:
        if first:
            yield CheckResult("keys", False, str(error))
        return
    if first:
        yield CheckResult("settings", not settings, "; ".join(settings) or "equal")
        yield CheckResult("keys", True, f"{len(theirs)} weights, names and shapes agree")
        yield _compare_weights(stored, theirs)
    common = {name: _common(stored[name].dtype, theirs[name].dtype) for name in theirs}
    _round(verification.model, common)
    if first:
        other = _load_other(hf_directory, layout, model)
        rows = [rule for rule in rules(layout, model) if rule.ours in common]
        _round(other, {name: common[rule.ours] for rule in rows for name in rule.theirs})
    for name, inputs in _inputs(model):
        # Ours first, since it refuses parallel sizes that the processes cannot carry.
        ours = verification.run(inputs, gradients=True)
        if first:
            theirs = _compute(other, model, layout, inputs)
            yield from _compare_computations(name, ours, theirs)
    if model.vision.temporal and verification.model.pre_process:
        frames = _frames(model)
        with torch.no_grad():
            tokens = verification.model.encode_images(frames.to(setup.device()), len(frames))
        if first:
            video = frames.transpose(0, 1).unsqueeze(0)
            with torch.no_grad():
                theirs = cast(Any, other).get_video_features(video)
            yield _close("video, visual tokens", tokens.cpu(), theirs, LOGITS)


def _differing(names: Sequence[str], ours: ModelConfig, theirs: ModelConfig) -> list[str]:
    """What differs of these settings and sections; how branches are split shows in the weights."""
    found = model_differences(ours, theirs)
    free = RUN_ONLY | {"model.decoder.modality_split"}
    short = {n.removeprefix("model."): pair for n, pair in found.items() if n not in free}
    return [
        f"{name} is {a} in the checkpoint, {b} there"
        for name, (a, b) in short.items()
        if name.split(".")[0] in names
    ]


def _compare_weights(ours: dict[str, LazyTensor], theirs: dict[str, LazyTensor]) -> CheckResult:
    """Bit by bit, in the narrower of the two dtypes."""
    different, dtypes = [], set()
    for name, tensor in theirs.items():
        dtype = _common(ours[name].dtype, tensor.dtype)
        dtypes.add(str(dtype).removeprefix("torch."))
        a, b = ours[name].read().to(dtype), tensor.read().to(dtype)
        if not torch.equal(a, b):
            different.append(f"{name} (by {(a.double() - b.double()).abs().max():.2g})")
    if different:
        return CheckResult("weights", False, f"{len(different)} differ: {', '.join(different)}")
    return CheckResult(
        "weights", True, f"all {len(theirs)} equal bit by bit in {', '.join(sorted(dtypes))}"
    )


def _common(ours: torch.dtype, theirs: torch.dtype) -> torch.dtype:
    """The narrower one, or theirs if both have 16 bits: an export is a cast of the checkpoint."""
    return ours if ours.itemsize < theirs.itemsize else theirs


def _round(model: torch.nn.Module, dtypes: dict[str, torch.dtype]) -> None:
    """Rounding of every parameter, in place, to what the narrower of the two files holds."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in dtypes:
                parameter.copy_(parameter.to(dtypes[name]))


def _inputs(model: ModelConfig) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """A text, a text with one image and one with two, every word of them a target."""
    room = model.decoder.max_positions - 2 * model.tokens_per_image
    if room < 4:
        raise ConversionError(f"two images leave {room} of the decoder's positions; 4 are needed")
    generator = torch.Generator().manual_seed(1234)
    size, count = model.vision.image_size, min(_TEXT, room)
    for name, places in (("text", []), ("one image", [2]), ("two images", [2, count // 2 + 1])):
        ids = torch.randint(3, model.decoder.vocab_size, (count,), generator=generator).tolist()
        ids[0] = 1  # BOS
        for place in places:
            ids.insert(place, IMAGE_TOKEN_ID)
        input_ids = torch.tensor([ids])
        inputs = {
            "input_ids": input_ids,
            "labels": input_ids.masked_fill(input_ids == IMAGE_TOKEN_ID, IGNORE_INDEX),
        }
        if places:
            inputs["images"] = torch.randn(len(places), 3, size, size, generator=generator)
        yield name, inputs


def _frames(model: ModelConfig) -> torch.Tensor:
    """A video of four frames, [4, 3, H, W]."""
    size = model.vision.image_size
    return torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(1234))


def _load_other(directory: str | Path, layout: str, model: ModelConfig) -> torch.nn.Module:
    module, name = model_class(layout)
    try:
        code = import_module(f"megatron_owl2.convert.remote_code.{layout}.{module}")
    except ImportError as error:
        raise ConversionError(f"this needs transformers 5 ({error}); pip install .[hf]") from None
    kind = getattr(code, name)
    config = kind.config_class.from_pretrained(directory)
    if model.vision.temporal:  # which the released settings do not say
        config.vision_config["temporal"] = True
    return kind.from_pretrained(directory, config=config, dtype=torch.float32).eval()


def _compute(
    other: torch.nn.Module, model: ModelConfig, layout: str, inputs: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Logits, loss and `grad.*` of the other side, named as `verify` names them."""
    e = expand(inputs["input_ids"], model.tokens_per_image, labels=inputs["labels"])
    unshifted = torch.full_like(e.labels, IGNORE_INDEX)
    unshifted[:, 1:] = e.labels[:, :-1]
    other.zero_grad()
    found = other(
        input_ids=e.tokens,
        modality=e.modality,
        pixel_values=inputs.get("images"),
        labels=unshifted,
    )
    found.loss.backward()
    results = {"logits": found.logits.detach(), "loss": found.loss.detach().reshape(1)}
    for name, parameter in other.named_parameters():
        gradient = parameter.grad
        results[f"grad.{name}"] = torch.zeros_like(parameter) if gradient is None else gradient
    for name, same in shared_branches(layout, model).items():  # one parameter of ours reads both
        results[f"grad.{same}"] = results[f"grad.{same}"] + results.pop(f"grad.{name}")
    return results


def _close(check: str, ours: torch.Tensor, theirs: torch.Tensor, allowed: float) -> CheckResult:
    apart = (ours - theirs).abs().max().item()
    bound = allowed * max(1.0, theirs.abs().max().item())
    passed = apart <= bound < float("inf")
    return CheckResult(check, passed, f"apart by {apart:.2g}, allowed {bound:.2g}")


def _compare_computations(
    name: str, ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]
) -> Iterator[CheckResult]:
    for what, allowed in (("logits", LOGITS), ("loss", LOSS)):
        yield _close(f"{name}, {what}", ours[what], theirs[what], allowed)

    names = [n for n in theirs if n.startswith("grad.")]
    norms = {n: theirs[n].norm().item() for n in names}
    for n in names:  # softmax ignores the bias of a key: its gradient is nothing but rounding
        if n.endswith("attention.key.bias"):
            norms[n] = norms[n.replace("bias", "weight")]
    apart = {n: (ours[n] - theirs[n]).norm().item() / (norms[n] or 1.0) for n in names}
    worst = max(apart, key=lambda name: apart[name])
    over = sum(not value <= GRADIENT for value in apart.values())
    detail = f"{len(names)} parameters, apart by at most {apart[worst]:.2g} of their norm"
    detail += f" ({worst.removeprefix('grad.')}), allowed {GRADIENT:.0e}"
    yield CheckResult(
        f"{name}, gradients", over == 0, detail + (f"; {over} are over" if over else "")
    )
