"""Memory traffic and kernel launches of the elementwise operations of a layer, in both passes.

The model's own layers run on torch's meta device, and every operation that is no GEMM, attention,
collective or view counts with the bytes that its kernel reads and writes. Sizes are exact; caches
are not modelled, so a tensor that is read twice counts twice. Where torch decomposes an operation
on the meta device that is one kernel on a GPU (RMSNorm), the GPU's is put in its place. Traffic of
the optimizer and of gradient buffers is none of a layer's.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch._ops import OpOverload
from torch.library import Library, _scoped_library
from torch.utils._pytree import tree_leaves

from megatron_owl2.config.schema import RunConfig
from megatron_owl2.mcore.parallel import ParallelContext
from megatron_owl2.model.decoder import rotary_tables
from megatron_owl2.model.dropout import token_keys
from megatron_owl2.model.kernels import plain
from megatron_owl2.model.modality import Modality
from megatron_owl2.model.owl2 import Owl2
from megatron_owl2.planner.fake_process_groups import fake_process_groups
from megatron_owl2.planner.live_memory import LiveMemory
from megatron_owl2.planner.meta_device import (
    META,
    build_on_meta_device,
    run_on_meta_device,
)
from megatron_owl2.planner.row_images import mean_images
from megatron_owl2.planner.static_memory import with_local_kernels
from megatron_owl2.training import parameter_groups

THIN = 16  # products with fewer rows, columns or terms wait for memory, and count as elementwise

_GEMMS = {"mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward"}
_ATTENTION = {
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention_for_cpu_backward",
}
_WRITE_ONLY = {"zeros_like", "ones_like", "full_like", "new_zeros", "new_full", "fill_", "zero_"}
_ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
# Operations that launch more than one kernel on a GPU.
_KERNELS = {
    "index_copy": 2,
    "index_fill": 2,
    "slice_backward": 2,
    "native_layer_norm_backward": 2,
    "split_qkv": 2,
    "split_qkv_backward": 2,
}


@dataclass(frozen=True)
class Traffic:
    """Bytes read and written by elementwise kernels, and their number."""

    bytes: int = 0
    kernels: int = 0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(self.bytes + other.bytes, self.kernels + other.kernels)


@dataclass(frozen=True)
class LayerTraffic:
    """Elementwise traffic of a layer by pass; the backward pass has what is computed again."""

    forward: Traffic
    backward: Traffic

    @property
    def total(self) -> Traffic:
        return self.forward + self.backward


def layer_traffic(config: RunConfig) -> dict[str, LayerTraffic]:
    """The traffic on one rank, for a micro-batch with the mean of images in every row, of one layer
    of each of `parts.STACKS` (by its name) and of the "head": final norm, output layer's output,
    loss.

    It follows `kernels.elementwise`, the config's parallelism and what its training stage trains.
    Raises RuntimeError in a process that is in a process group already.
    """
    model, parallel = config.model, config.parallel
    small = replace(
        with_local_kernels(config),
        model=replace(
            model,
            vision=replace(model.vision, num_layers=1),
            abstractor=replace(model.abstractor, num_layers=1),
            decoder=replace(model.decoder, num_layers=1),
        ),
        parallel=replace(parallel, pipeline=1, virtual_pipeline=1, layers=[]),
    )
    with fake_process_groups(small.parallel, parallel.tensor * parallel.context, 0) as groups:
        context = ParallelContext(small, groups)
        with build_on_meta_device():
            built = Owl2(context, small.model)
        for name, parameter in built.named_parameters():
            parameter.requires_grad = parameter_groups.is_trainable(name, small.stage)
        with run_on_meta_device(), _torch_norm_on_meta_device():
            return {
                name: _measure(built, context, function, inputs)
                for name, (function, inputs) in _passes(built, context, small).items()
            }


def _passes(
    built: Owl2, context: ParallelContext, config: RunConfig
) -> dict[str, tuple[Callable, tuple]]:
    """Functions that run one layer, by name, and their inputs."""
    model, parallel = config.model, config.parallel
    rows, length = config.train.micro_batch_size, config.data.sequence_length // parallel.context
    split, images = parallel.tensor if parallel.sequence else 1, rows * mean_images(config)
    trained = [name for name, p in built.named_parameters() if p.requires_grad]

    def states(*shape: int, trains: bool) -> torch.Tensor:
        return torch.empty(shape, dtype=context.dtype, device=META).requires_grad_(trains)

    vision = any(name.startswith("vision_model.") for name in trained)
    before = vision or any(name.startswith(("abstractor.", "embedding.")) for name in trained)
    size, tokens = model.vision.hidden_size, model.vision.grid_size**2 + 1
    queries = states(model.abstractor.num_queries, images, size, trains=before)
    positions = image_keys = None
    if model.abstractor.positions == "sincos":
        positions = states(model.abstractor.num_queries + tokens, 1, size, trains=False)
    if model.abstractor.attention_dropout:
        image_keys = torch.empty(images, dtype=torch.int32, device=META)
    x = states(length // split, rows, model.decoder.hidden_size, trains=before)
    places = torch.empty(rows, length, dtype=torch.int64, device=META)
    index = places.new_empty(-(-images * model.tokens_per_image // parallel.context))
    keys = token_keys(context, places[:, 0], length)
    modality = Modality.of(places, index, context, keys)
    rotary = rotary_tables(places, model.decoder, context.dtype)
    labels = places.t().contiguous()

    def head(x: torch.Tensor) -> torch.Tensor:
        return built.elementwise.cross_entropy(built.head(x), labels, context.groups.tp)

    image = states(tokens, images, size, trains=vision)
    return {
        "vision_model": (_layer(built.vision_model.layers), (image,)),
        "abstractor": (_layer(built.abstractor.layers), (queries, image, positions, image_keys)),
        "decoder": (_layer(built.decoder.layers), (x, modality, rotary, None, None)),
        "head": (head, (x,)),
    }


def _layer(stack: torch.nn.Module) -> Callable:
    (layer,) = stack.children()
    return lambda *inputs: stack(layer, *inputs)


def _measure(
    built: Owl2, context: ParallelContext, function: Callable, inputs: tuple
) -> LayerTraffic:
    with TrafficCounter(built, context.groups) as forward:
        output = function(*inputs)
    with TrafficCounter(built, context.groups) as backward:
        if output.requires_grad:
            torch.autograd.backward(output, torch.empty_like(output))
    for given in (*built.parameters(), *tree_leaves(inputs)):
        if _is_tensor(given):
            given.grad = None  # no sums with the gradients of other layers
    return LayerTraffic(forward.moved, backward.moved)


class TrafficCounter(LiveMemory):
    """Dispatch mode that counts elementwise traffic, and the GEMMs and attentions apart."""

    def __init__(self, model: torch.nn.Module, groups: ProcessGroupCollection):
        super().__init__(model, groups)
        self.moved = Traffic()
        self.gemms = self.attentions = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = super().__torch_dispatch__(function, types, args, kwargs)
        name = function._opname
        if function.namespace == "c10d":
            return results
        call = _Call(function, args, kwargs or {}, results)
        if name in _ATTENTION:
            self.attentions += 1
        elif name in _GEMMS and call.least_extent() >= THIN:
            self.gemms += 1
        elif size := call.bytes():
            self.moved += Traffic(size, _KERNELS.get(name, 1))
        return results


class _Call:
    """One call of an operation: its tensors by what becomes of them.

    `read` are arguments whose numbers it needs, in their order, `written` those that it changes and
    `results` what it returns beside them.
    """

    def __init__(self, function: OpOverload, args: tuple, kwargs: dict, results: Any):
        self.name = function._opname
        self.read: list[torch.Tensor] = []
        self.written: list[torch.Tensor] = []
        schema = function._schema.arguments
        for argument, value in [
            *zip(schema, args, strict=False),
            *((argument, kwargs[argument.name]) for argument in schema if argument.name in kwargs),
        ]:
            tensors = [t for t in tree_leaves(value) if _is_tensor(t)]
            changed = argument.alias_info is not None and argument.alias_info.is_write
            self.written += tensors if changed else []
            self.read += [] if argument.is_out else tensors
        mutable = function._schema.is_mutable
        self.results = [] if mutable else [t for t in tree_leaves(results) if _is_tensor(t)]

    def least_extent(self) -> int:
        """The least of rows, terms and columns of a product."""
        return min(size for factor in self.read[-2:] for size in factor.shape[-2:])

    def bytes(self) -> int:
        """Bytes read and written; zero for allocations and views."""
        name, read, out = self.name, self.read, self.written + self.results
        if name in _ALLOCATIONS or self._is_view():
            return 0
        if name in _WRITE_ONLY:
            return _bytes(out)
        if name == "copy_":
            return _bytes(read[1:]) + _bytes(out)
        if name in ("index_select", "embedding", "index"):  # as many numbers as are taken
            return 2 * _bytes(out) + _bytes(read[1:])
        if name == "index_put_":
            return _bytes(read[1:]) + _bytes(read[-1:])
        if name in ("index_add", "index_add_"):  # rows are read, added and written
            return _bytes(read[1:]) + 2 * _bytes(read[-1:])
        if name == "index_copy":  # a copy of all, then the rows
            return _bytes(read) + _bytes(out) + _bytes(read[-1:])
        if name == "index_fill":
            row = _bytes(out) // max(1, len(out[0]))
            return _bytes(read) + _bytes(out) + row * len(read[1])
        if name == "slice_backward":  # zeros, then the rows
            return _bytes(out) + 2 * _bytes(read)
        if name == "split_qkv":  # all rows, then those of vision over again
            return _bytes(read) + _bytes(out) + _bytes(read[1:2])
        if name == "split_qkv_backward":  # likewise, and zeros for them
            return _bytes(read) + _bytes(out) + 2 * _bytes(out[1:])
        return _bytes(read) + _bytes(out)

    def _is_view(self) -> bool:
        given = {tensor.untyped_storage()._cdata for tensor in self.read}
        return any(tensor.untyped_storage()._cdata in given for tensor in self.results)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _bytes(tensors: list[torch.Tensor]) -> int:
    """Bytes of the tensors; what is expanded counts once."""
    total = 0
    for tensor in tensors:
        numbers = 1
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
            numbers *= size if stride or not size else 1
        total += numbers * tensor.element_size()
    return total


# torch's RMSNorm as a GPU has it: one kernel each way.
_library = Library("megatron_owl2_planner", "DEF")
_library.define("torch_rms_norm(Tensor x) -> (Tensor, Tensor)")
_library.define("torch_rms_norm_backward(Tensor grad, Tensor x, Tensor inverse_rms) -> Tensor")
_library.impl(
    "torch_rms_norm",
    lambda x: (torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)),
    "Meta",
)
_library.impl("torch_rms_norm_backward", lambda grad, x, inverse_rms: torch.empty_like(x), "Meta")


class _TorchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        y, inverse_rms = torch.ops.megatron_owl2_planner.torch_rms_norm(x)
        ctx.save_for_backward(x, inverse_rms)
        return y

    @staticmethod
    def backward(ctx, *grads):
        return torch.ops.megatron_owl2_planner.torch_rms_norm_backward(grads[0], *ctx.saved_tensors)


@contextmanager
def _torch_norm_on_meta_device() -> Iterator[None]:
    """Context in which RMSNorm without a weight is one kernel each way on the meta device, and the
    plain norm's backward pass the one of a GPU."""

    def norm(x, normalized_shape, weight=None, eps=None):
        return _TorchNorm.apply(x)

    with _scoped_library("aten", "IMPL") as library:
        library.impl("rms_norm", norm, "AutogradMeta")
        formula, plain.renormalize_by_formula = (
            plain.renormalize_by_formula,
            plain.renormalize_fused,
        )
        try:
            yield
        finally:
            plain.renormalize_by_formula = formula
