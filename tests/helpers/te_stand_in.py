"""Stand-in for the CUDA kernels of Transformer Engine 2.x on a CPU, in bf16; its Python runs as is.

Real: all Python of Transformer Engine and of megatron-core's wrappers (`te.Linear` with its
autograd function and its tensor-parallel collectives, `general_gemm`, `te.checkpoint`,
`initialize_ub`, FusedAdam). Replaced by torch, where Python meets compiled code: `generic_gemm`,
the body of `DotProductAttention.forward`, `multi_tensor_adam`, `multi_tensor_l2norm`,
`multi_tensor_scale`, the user buffers (`CommOverlap`, `CommOverlapP2P`, `CommOverlapHelper`: their
collectives run, nothing overlaps), and questions about the GPU. Arguments are bound against the
real signatures first. No FP8 code, no CUDA kernel and no NCCL runs.
"""

import ast
import inspect
import os
import sys
from functools import wraps
from types import SimpleNamespace

import torch
from torch.nn import functional as F

from megatron_owl2.mcore import cpu
from megatron_owl2.mcore.setup import setup

gemm_rows: list[int] = []  # rows of every GEMM since it was last cleared
overlapped: list[str] = []  # collectives that were given to a GEMM since it was last cleared


def install() -> None:
    """Replace the kernels, once per process and before megatron.core is imported."""
    import transformer_engine.pytorch as te
    import transformer_engine_torch as tex
    from transformer_engine.pytorch import distributed, optimizers
    from transformer_engine.pytorch.cpp_extensions import gemm
    from transformer_engine.pytorch.module import linear

    os.environ["UB_SKIPMC"] = "1"  # asked for where the GPU has no multicast
    tex.generic_gemm = _bound(tex.generic_gemm, _generic_gemm)
    tex.multi_tensor_adam = _bound(tex.multi_tensor_adam, _adam)
    for name, function in (("multi_tensor_l2norm", _norm), ("multi_tensor_scale", _scale)):
        replaced = _bound(getattr(tex, name), function)
        setattr(tex, name, replaced)
        setattr(optimizers, name, replaced)
    for name in ("CommOverlap", "CommOverlapP2P"):
        setattr(tex, name, _bound(getattr(tex, name).__init__, _UserBuffer, skip=1))
    tex.CommOverlapHelper = _Helper
    tex.device_supports_multicast = lambda: False
    tex.get_stream_priority_range = lambda: (0, -1)
    forward = te.DotProductAttention.forward
    te.DotProductAttention.forward = _with_signature(inspect.signature(forward), _attention)
    gemm.get_cublas_workspace = lambda *_: torch.empty(0, dtype=torch.uint8)
    linear.get_dummy_wgrad = _on_cpu(linear.get_dummy_wgrad)
    distributed._get_cuda_rng_state = lambda *_, **__: None
    distributed._set_cuda_rng_state = lambda *_, **__: None

    setup()
    torch.cuda.is_available = _told(True, torch.cuda.is_available)
    torch.cuda.get_device_properties = lambda *_: SimpleNamespace(major=9, minor=0)
    on_gpu = torch.Tensor.is_cuda
    torch.Tensor.is_cuda = property(_told(True, on_gpu.__get__))  # pyright: ignore


def _told(answer, ask):
    """A question that modules of Transformer Engine get `answer` to, and others the truth."""

    def asked(*args):
        module = sys._getframe(1).f_globals.get("__name__", "")
        return answer if module.startswith("transformer_engine.") else ask(*args)

    return asked


def _on_cpu(function):
    """A function that a backward pass calls, where torch takes away the mode of mcore/cpu.py."""

    def call(*args, **kwargs):
        with cpu._CudaMeansCpu():
            return function(*args, **kwargs)

    return call


def _documented(function) -> inspect.Signature:
    """The signature that pybind11 writes into the first line of a docstring."""
    line = function.__doc__.splitlines()[0]
    definition = ast.parse(f"def {line}: pass").body[0]
    assert isinstance(definition, ast.FunctionDef)
    names = [argument.arg for argument in definition.args.args]
    defaults = [ast.literal_eval(default) for default in definition.args.defaults]
    first = len(names) - len(defaults)
    return inspect.Signature(
        inspect.Parameter(
            name,
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
            default=defaults[n - first] if n >= first else inspect.Parameter.empty,
        )
        for n, name in enumerate(names)
    )


def _bound(real, stand_in, skip: int = 0):
    """`stand_in`, called with the arguments by the names that the compiled function has."""
    signature = _documented(real)
    parameters = list(signature.parameters.values())[skip:]
    return _with_signature(signature.replace(parameters=parameters), stand_in)


def _with_signature(signature: inspect.Signature, stand_in):
    @wraps(stand_in)
    def call(*args, **kwargs):
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return stand_in(**bound.arguments)

    return call


def _generic_gemm(A, B, D, transA, transB, output_dtype, accumulate, **more):
    """D = op(B) op(A), row-major, as cuBLAS is used for it; products are summed in fp32."""
    import transformer_engine_torch as tex

    refused = ("quantizer", "bias", "gelu", "gelu_in", "bulk_overlap")
    assert not any(more[name] for name in refused), "not played"
    assert more["alpha"] == 1.0 and more["beta"] == (1.0 if accumulate else 0.0)
    gemm_rows.append(B.flatten(0, -2).shape[0])
    buffer, kind = more["comm_overlap"], more["comm_type"]
    if kind == tex.CommOverlapType.AG:
        buffer.gather()
        assert B.data_ptr() == buffer.get_buffer().data_ptr()
    if transB:  # a gradient of weights
        assert not transA and B.dtype == A.dtype
        product = B.flatten(0, -2).t().float() @ A.flatten(0, -2).float()
    else:
        product = F.linear(B, A if transA else A.t())
    if D is None:
        dtype = {tex.DType.kFloat32: torch.float32, tex.DType.kBFloat16: torch.bfloat16}
        D = product.to(dtype[output_dtype])
    elif accumulate:
        D.add_(product)
    else:
        D.copy_(product)
    if kind == tex.CommOverlapType.RS:
        buffer.reduce_scatter(D, more["extra_output"])
    return [D, None, None, more["extra_output"]]


def _attention(self, query_layer, key_layer, value_layer, **more):
    """Causal attention [s, b, heads, d] to [s, b, heads * d]."""
    assert more["attention_mask"] is None and more["attn_mask_type"] == "causal"
    assert self.qkv_format == "sbhd" and (more["window_size"] or (-1, 0))[0] == -1
    query, key, value = (x.permute(1, 2, 0, 3) for x in (query_layer, key_layer, value_layer))
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    return out.permute(2, 0, 1, 3).flatten(2)


def _adam(arg2, arg3, arg4, arg5, arg6, arg7, arg8, arg9, arg10, **_):
    """AdamW on lists of gradients, parameters and moments; the arguments have no names."""
    lr, beta1, beta2, eps, step, decoupled, corrected, decay = (
        arg3, arg4, arg5, arg6, arg7, arg8, arg9, arg10,
    )  # fmt: skip
    assert decoupled and corrected
    for gradient, parameter, first, second in zip(*arg2, strict=True):
        gradient = gradient.float()
        first.lerp_(gradient, 1 - beta1)
        second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        size = (second / (1 - beta2**step)).sqrt_().add_(eps)
        parameter.mul_(1 - lr * decay).addcdiv_(first / (1 - beta1**step), size, value=-lr)


def _norm(arg2, arg3, **_):
    assert not arg3, "norms of single tensors are not played"
    norms = [tensor.float().norm() for tensor in arg2[0]]
    return torch.stack(norms).norm().view(1), torch.empty(0)


def _scale(arg2, arg3, **_):
    for source, target in zip(*arg2, strict=True):
        target.copy_(source * arg3)


class _Helper:
    """The groups that user buffers talk in; the second is that of a tensor-parallel domain."""

    def __init__(self, world_group, intra_node_group=None):
        self.group = world_group if intra_node_group is None else intra_node_group


class _UserBuffer:
    """A communication buffer of fixed shape, whose chunks belong to the tensor-parallel ranks."""

    def __init__(self, buffer_shape, buffer_dtype, helper, tp_size, **_):
        assert helper.group.size() == tp_size
        self._whole = torch.zeros(buffer_shape, dtype=buffer_dtype)
        self._group = helper.group

    def is_fp8_ubuf(self):
        return self._whole.dtype == torch.uint8

    def _chunk(self) -> torch.Tensor:
        return self._whole.chunk(self._group.size())[self._group.rank()]

    def copy_into_buffer(self, input, local_chunk=False):
        (self._chunk() if local_chunk else self._whole).copy_(input.flatten(0, -2))

    def get_buffer(self, local_chunk=False, shape=None):
        part = self._chunk() if local_chunk else self._whole
        return part.view(shape or part.shape)

    def gather(self):
        overlapped.append("gather")
        torch.distributed.all_gather_into_tensor(self._whole, self._chunk().clone(), self._group)

    def reduce_scatter(self, whole, out):
        overlapped.append("reduce-scatter")
        assert whole.numel() == self._whole.numel(), "a buffer takes one shape"
        flat = whole.flatten(0, -2).contiguous()
        part = torch.empty_like(flat.chunk(self._group.size())[0])
        torch.distributed.reduce_scatter_tensor(part, flat, group=self._group)
        out.copy_(part.view_as(out))
