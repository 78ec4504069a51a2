"""Live memory and collectives of passes through a model on torch's meta device.

Tensors of the meta device have shapes, dtypes and storages of a size, but no data, so a model of
any size runs in milliseconds. Every storage that an operation returns counts from its first tensor
to its last, as an allocator would count it.
"""

import itertools
import weakref
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from torch._C._distributed_c10d import FakeWork, ProcessGroup
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_owl2.planner.meta_device import META

_aten = torch.ops.aten
_UNARY = {_aten.neg.default, _aten.pow.Tensor_Scalar, _aten.rsqrt.default, _aten.silu.default}
_BINARY = {_aten.add.Tensor, _aten.sub.Tensor, _aten.mul.Tensor, _aten.div.Tensor}

# Which argument of a collective is the whole, and how often a rank sends its share of it.
RING = {"allreduce_": (0, 2), "_allgather_base_": (0, 1), "_reduce_scatter_base_": (1, 1)}


@dataclass(frozen=True)
class Moment:
    """Bytes alive at a moment, the most since the moment before, and bytes sent so far."""

    kept: int
    peak: int
    sent: Counter[str]


class LiveMemory(TorchDispatchMode):
    """Dispatch mode that counts the bytes of live storages beside the model's, and of collectives.

    All results are on the meta device, whichever device was asked for. `sent` is by process group,
    "tensor" or "context".
    """

    def __init__(self, model: torch.nn.Module, groups: ProcessGroupCollection):
        super().__init__()
        self._groups = {groups.tp.group_name: "tensor", groups.cp.group_name: "context"}
        held = itertools.chain(model.parameters(), model.buffers())
        self._alive: dict[int, object] = {t.untyped_storage()._cdata: None for t in held}
        self._now = self._peak = 0
        self.sent: Counter[str] = Counter()

    @property
    def shared(self) -> int:
        """Bytes of megatron-core's gather buffer, which stays."""
        buffers = parallel_state.get_global_memory_buffer().buffer.values()
        return sum(buffer.untyped_storage().nbytes() for buffer in buffers)

    @property
    def kept(self) -> int:
        """Bytes alive now, without `shared`."""
        return self._now - self.shared

    def take(self) -> Moment:
        """The present moment, without `shared`; the next peak begins here."""
        moment = Moment(self.kept, self._peak - self.shared, Counter(self.sent))
        self._peak = self._now
        return moment

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function.namespace == "c10d":
            self._send(function._opname, args)
            return args[0], FakeWork().boxed()  # outputs stay as they are
        if "device" in kwargs:
            kwargs = {**kwargs, "device": META}
        results = _shortcut(function, args)
        if results is None:
            results = function(*args, **kwargs)
        self._add_all(results)
        return results

    def _add_all(self, results: Any) -> None:
        for result in tree_leaves(results):
            if isinstance(result, torch.Tensor):
                self._add(result.untyped_storage())

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return

        def drop(_):
            del self._alive[key]
            self._now -= size

        self._alive[key] = weakref.ref(storage, drop)
        self._now += size
        self._peak = max(self._peak, self._now)

    def _send(self, name: str, args: tuple) -> None:
        """Count what a ring sends per rank: all but its own share, twice that for an all-reduce."""
        if name not in RING:
            raise RuntimeError(f"the planner cannot count the collective {name}")
        argument, times = RING[name]
        group = next(ProcessGroup.unbox(a) for a in args if isinstance(a, torch.ScriptObject))
        tensors = tree_leaves(args[argument])
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        self.sent[self._groups[group.group_name]] += (
            size * times * (group.size() - 1) // group.size()
        )


def _shortcut(function: OpOverload, args: tuple) -> Any:
    """Results of the operations whose meta kernels are written in Python and take most of the time.

    None where the sizes of the results need more thought than here. Layer norms keep their
    statistics in the dtype of the input, as on a CPU; torch's meta kernel has them in fp32.
    """
    if function in _UNARY and args[0].is_floating_point():
        return torch.empty_like(args[0])
    if function in _BINARY:
        large, small = args[:2]
        if not isinstance(large, torch.Tensor):
            return None
        if isinstance(small, torch.Tensor) and large.numel() < small.numel():
            large, small = small, large
        return torch.empty_like(large) if _shapes_result(large, small) else None
    if function is _aten.native_layer_norm.default:
        x, normalized = args[0], len(args[1])
        rows = (*x.shape[:-normalized], *[1] * normalized)
        return torch.empty_like(x), x.new_empty(rows), x.new_empty(rows)
    if function is _aten.native_layer_norm_backward.default:
        gradient, _, _, _, _, weight, bias, wanted = args
        return tuple(
            torch.empty_like(tensor) if asked else None
            for tensor, asked in zip((gradient, weight, bias), wanted, strict=True)
        )
    return None


def _shapes_result(large: torch.Tensor, small: torch.Tensor | float) -> bool:
    """Whether a sum of both has the shape, strides and dtype of `large`."""
    if not large.is_floating_point():
        return False
    if not isinstance(small, torch.Tensor):
        return not isinstance(small, complex)
    if small.dim() == 0 and large.dim() > 0:
        return not small.is_complex()
    wider = torch.promote_types(large.dtype, small.dtype)
    if wider is not large.dtype or small.dim() > large.dim():
        return False
    if small.shape == large.shape and small.stride() == large.stride():
        return True
    trailing = large.shape[large.dim() - small.dim() :]
    spread = all(m in (1, n) for m, n in zip(small.shape, trailing, strict=True))
    return spread and large.is_contiguous() and small.is_contiguous()
