"""Verification of a checkpoint: its logits, loss and gradients under any parallel sizes.

Loss and gradients come from the training step itself, so agreement with the released code's
numbers covers the pipeline schedule and the gradient buffers too.
"""

import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from safetensors import SafetensorError
from safetensors.torch import load_file

from megatron_owl2.config.load import load_config
from megatron_owl2.config.schema import RunConfig
from megatron_owl2.config.validate_model import validate_model
from megatron_owl2.config.validate_parallel import validate_parallel
from megatron_owl2.convert.expand import Expanded, expand
from megatron_owl2.convert.layouts import layout_of, text_takes_an_image
from megatron_owl2.convert.lazy_tensor import LazyTensor
from megatron_owl2.convert.mapping import rules
from megatron_owl2.convert.partition import unshard
from megatron_owl2.convert.safetensors_io import write_safetensors
from megatron_owl2.data.batch import Batch
from megatron_owl2.data.image_tokens import IGNORE_INDEX, IMAGE_TOKEN_ID, VISION, target_index
from megatron_owl2.errors import ConfigError, ConversionError
from megatron_owl2.mcore import setup
from megatron_owl2.mcore.parallel import ParallelContext
from megatron_owl2.model.owl2 import Owl2, build
from megatron_owl2.training import optimizer as optim
from megatron_owl2.training.checkpoint import directories, save_load
from megatron_owl2.training.step import forward_backward
from megatron_owl2.utils.files import replaced_atomically

_ONE_PROCESS = [
    "parallel.tensor=1",
    "parallel.pipeline=1",
    "parallel.sequence=false",
    "parallel.tensor_overlap=false",
    "parallel.recompute=none",
    "parallel.layers=[]",
    "parallel.virtual_pipeline=1",
    "parallel.context=1",
    "kernels.backend=local",
    "kernels.fp8=none",
]


def verify(
    directory: str | Path,
    inputs: dict[str, torch.Tensor],
    overrides: Sequence[str] = (),
    *,
    gradients: bool = False,
) -> dict[str, torch.Tensor]:
    """Results of a checkpoint on raw inputs of the released model; every rank calls it.

    inputs: input_ids int64 [b, s] with -200 for an image, normalised float images [n, 3, H, W]
    (see `expand` for their order; absent if there is no placeholder), and if wanted
    attention_mask and labels [b, s] and images_per_placeholder [placeholders]; whole numbers may be
    int32. `overrides` are `section.key=value`, of which parallel.* and train.precision matter.

    Returns on rank 0, fp32 on the CPU: logits [b, s expanded, vocab] (those of padding mean
    nothing), with labels the mean loss [1], and with `gradients` its `grad.<name in the released
    model>` for every parameter; elsewhere {}. Raises ConversionError for inputs that do not fit
    and ConfigError for parallel sizes that the processes cannot carry.
    """
    return Verification(directory, overrides).run(inputs, gradients=gradients)


class Verification:
    """A checkpoint under one set of parallel sizes, loaded at the first of any number of runs."""

    def __init__(self, directory: str | Path, overrides: Sequence[str] = ()):
        self.directory = directories.resolve(directory)
        self.config = load_config(self.directory / "run.yaml", [*_ONE_PROCESS, *overrides])
        validate_model(self.config.model)
        if self.config.stage.lora.targets:
            raise ConfigError(
                f"{self.directory} has adapters (stage.lora), which a directory in the released "
                "layout has not; verify their merge: owl2 convert-to-hf, then convert-from-hf"
            )
        parallel, world = self.config.parallel, _processes()
        if world != parallel.tensor * parallel.pipeline:
            raise ConfigError(
                f"{world} processes, but parallel.tensor ({parallel.tensor}) x parallel.pipeline "
                f"({parallel.pipeline}) = {parallel.tensor * parallel.pipeline}; start that many"
            )
        if parallel.virtual_pipeline > 1 or parallel.context > 1:
            raise ConfigError(
                "a verification runs one micro-batch with whole sequences; leave "
                "parallel.virtual_pipeline and parallel.context at 1"
            )

    @property
    def rank(self) -> int:
        """The rank of this process, known before there is a process group."""
        return int(os.environ.get("RANK", "0"))

    @cached_property
    def model(self) -> Owl2:
        """This rank's pipeline stage and tensor-parallel shards of the model."""
        parallel = self.config.parallel
        groups = setup.initialize(parallel)
        context = ParallelContext(self.config, groups, device=setup.device())
        (model,) = build(context, self.config.model, initialize=False)
        save_load.load_weights(self.directory, [model])
        return model.eval()  # without dropout, which no other code draws alike

    @cached_property
    def _wrapped(self) -> DistributedDataParallel:
        (wrapped,) = optim.wrap_ddp([self.model], overlap=False)
        return wrapped

    def run(
        self, inputs: dict[str, torch.Tensor], *, gradients: bool = False
    ) -> dict[str, torch.Tensor]:
        """The results that `verify` returns for these inputs."""
        if gradients and "labels" not in inputs:
            raise ConversionError("gradients need labels among the inputs")
        config = self.config
        multiple = config.parallel.tensor if config.parallel.sequence else 1
        expanded, length = _expand(inputs, config, multiple)
        _fit_config(config, expanded)
        batch = _batch(inputs, expanded, config).to(setup.device())

        results = {}
        logits = _forward(config, self.model, batch, with_labels=False)
        if logits is not None:
            results["logits"] = logits[:, :length]
        if "labels" in inputs:
            losses = _forward(config, self.model, batch, with_labels=True)
            if losses is not None:
                results["loss"] = losses.mean().reshape(1)
        if gradients:
            self._wrapped.zero_grad_buffer()
            forward_backward(config, [self._wrapped], iter([batch]), 1)
            results |= _gradients(self.model)
        return _collect(results, self.model)


def read_inputs(path: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file; raises ConversionError if it cannot be read."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ConversionError(f"{path} cannot be read as safetensors: {error}") from None


def write_results(results: dict[str, torch.Tensor], path: str | Path) -> None:
    """A safetensors file of the tensors at `path`, which appears when complete.

    Raises ConversionError if it cannot be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replaced_atomically(path) as partial:
            write_safetensors(partial, {n: LazyTensor.of(t) for n, t in results.items()})
    except OSError as error:
        raise ConversionError(f"{path} cannot be written: {error.strerror}") from None


def _processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _expand(
    inputs: dict[str, torch.Tensor], config: RunConfig, multiple_of: int
) -> tuple[Expanded, int]:
    """The expanded inputs, and their length without what sequence parallelism adds."""
    vocab, limit = config.model.decoder.vocab_size, config.model.decoder.max_positions
    if "input_ids" not in inputs:
        raise ConversionError("the inputs must hold input_ids [b, s]")
    ids = _whole_numbers(inputs, "input_ids", "b", "s")
    labels = counts = None
    if "labels" in inputs:
        labels = _whole_numbers(inputs, "labels", "b", "s")
    if "images_per_placeholder" in inputs:
        counts = _whole_numbers(inputs, "images_per_placeholder", "placeholders")
    wrong = ids[((ids < 0) | (ids >= vocab)) & (ids != IMAGE_TOKEN_ID)]
    if len(wrong):
        raise ConversionError(
            f"input_ids holds {wrong[0]}, which is neither below {vocab} nor {IMAGE_TOKEN_ID}"
        )
    wrong = [] if counts is None else counts[(counts < 1) | (counts > limit)]
    if len(wrong):
        raise ConversionError(
            f"images_per_placeholder holds {wrong[0]}, which is not from 1 to {limit}"
        )
    for name in ("attention_mask", "labels"):
        if name in inputs and inputs[name].shape != ids.shape:
            raise ConversionError(
                f"{name} is {list(inputs[name].shape)}, input_ids {list(ids.shape)}"
            )
    try:
        expanded = expand(
            ids,
            config.model.tokens_per_image,
            attention_mask=inputs.get("attention_mask"),
            labels=labels,
            images_per_placeholder=None if counts is None else counts.tolist(),
            text_takes_an_image=text_takes_an_image(config.model),
            multiple_of=multiple_of,
        )
    except ValueError as error:
        raise ConversionError(str(error)) from None
    if labels is not None:
        if ((labels >= vocab) | (labels < 0) & (labels != IGNORE_INDEX)).any():
            raise ConversionError(f"labels must be below {vocab}, or {IGNORE_INDEX}")
        if not (expanded.labels != IGNORE_INDEX).any():
            raise ConversionError("labels leave nothing to predict: all of them are ignored")
    length = int(expanded.lengths.max())
    if length > limit:
        raise ConversionError(f"a row expands to {length} positions, the decoder has {limit}")
    return expanded, length


def _whole_numbers(inputs: dict[str, torch.Tensor], name: str, *axes: str) -> torch.Tensor:
    """An input of whole numbers as int64; raises ConversionError for any other dtype or shape."""
    found = inputs[name]
    whole = found.dtype in (torch.int64, torch.int32)
    if not whole or found.ndim != len(axes) or found.numel() == 0:
        raise ConversionError(
            f"{name} must be int64 or int32 [{', '.join(axes)}] and not empty; found "
            f"{found.dtype} {list(found.shape)}"
        )
    return found.long()


def _fit_config(config: RunConfig, expanded: Expanded) -> None:
    """Configuration with the sizes of the inputs, set in place and checked."""
    rows, length = expanded.tokens.shape
    config.data.sequence_length = length
    config.train.micro_batch_size = config.train.global_batch_size = rows
    validate_parallel(config, _processes())


def _batch(inputs: dict[str, torch.Tensor], expanded: Expanded, config: RunConfig) -> Batch:
    size, order = config.model.vision.image_size, expanded.image_order
    images = inputs.get("images")
    if len(expanded.vision_token_index) == 0 and (images is None or not len(order)):
        order = torch.arange(max(1, len(order)))
        images = torch.zeros(len(order), 3, size, size)  # of no effect, as no row is theirs
    wanted = [len(order), 3, size, size]
    if images is None or list(images.shape) != wanted or not images.is_floating_point():
        owners = "one for each placeholder"
        if text_takes_an_image(config.model):
            owners += " and one for each row without"
        found = "none" if images is None else f"{images.dtype} {list(images.shape)}"
        raise ConversionError(f"images must be normalised floats {wanted}: {owners}; found {found}")
    if not images.float().isfinite().all():
        raise ConversionError("images hold NaN or infinity")
    count = len(expanded.tokens)
    return Batch(
        tokens=expanded.tokens,
        labels=expanded.labels,
        loss_mask=(expanded.labels != IGNORE_INDEX).float(),
        modality=expanded.modality,
        position_ids=expanded.position_ids,
        image=images[order],
        vision_token_index=expanded.vision_token_index,
        target_index=target_index(expanded.labels),
        lengths=expanded.lengths,
        has_image=(expanded.modality == VISION).any(1, keepdim=True).expand_as(expanded.modality),
        sample_indices=torch.arange(count),
        sources=torch.zeros(count, dtype=torch.int64),
        keys=[*map(str, range(count))],
        sample_lengths=expanded.lengths.tolist(),
        samples_per_row=[1] * count,
    )


def _forward(
    config: RunConfig, model: Owl2, batch: Batch, *, with_labels: bool
) -> torch.Tensor | None:
    """Logits, or with labels the losses of the targets, on the last pipeline stage; None before."""

    def step(batches, model):
        b = next(batches)
        labelled = (b.labels, b.target_index) if with_labels else ()
        given = b.tokens, b.image, b.vision_token_index, b.modality, b.position_ids
        output = model(*given, *labelled)
        return output, lambda output, non_loss_data: output

    with torch.no_grad():
        results = get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=iter([batch]),
            model=[model],
            num_microbatches=1,
            seq_length=config.data.sequence_length,
            micro_batch_size=config.train.micro_batch_size,
            forward_only=True,
            collect_non_loss_data=True,
        )
    return results[0] if model.post_process else None


def _gradients(model: Owl2) -> dict[str, torch.Tensor]:
    """`grad.<name>` of this pipeline stage's parameters, whole."""
    parameters: dict[str, Any] = dict(model.named_parameters())
    found: dict[str, torch.Tensor] = {}
    for rule in rules(layout_of(model.model), model.model):
        if rule.ours in parameters:
            parameter = parameters[rule.ours]
            gradient = unshard(parameter.main_grad, parameter, model.context)
            split = rule.transform.split(gradient)
            found |= {f"grad.{n}": tensor for n, tensor in zip(rule.theirs, split, strict=True)}
    return found


def _collect(results: dict[str, torch.Tensor], model: Owl2) -> dict[str, torch.Tensor]:
    """The results of all pipeline stages, on rank 0; {} elsewhere."""
    results = {name: t.detach().float().cpu().contiguous() for name, t in results.items()}
    pipeline = model.context.groups.pp
    if pipeline.size() == 1:
        return results if torch.distributed.get_rank() == 0 else {}
    gathered: list[Any] = [None] * pipeline.size()
    torch.distributed.all_gather_object(gathered, results, group=pipeline)
    if torch.distributed.get_rank() != 0:
        return {}
    return {name: tensor for found in gathered for name, tensor in found.items()}
