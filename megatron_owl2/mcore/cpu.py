"""Stand-in for CUDA on machines without a GPU.

megatron-core allocates on the current CUDA device, keeps CUDA streams and random states, and
compares tensor types with CUDA names. `apply()` answers those calls with the CPU, so that the
same training code runs over gloo (mcore/setup.py calls it where there is no GPU).
"""

import contextlib

import torch
from torch.overrides import TorchFunctionMode

_CUDA_TYPES = {
    torch.float32: "torch.cuda.FloatTensor",
    torch.float16: "torch.cuda.HalfTensor",
    torch.bfloat16: "torch.cuda.BFloat16Tensor",
}


class _CudaMeansCpu(TorchFunctionMode):
    """Function mode that sends `device="cuda"` to the CPU, and names tensor types as CUDA's.

    The optimizers of megatron-core sort parameters by that name.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs = {**kwargs, "device": torch.device("cpu")}
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return _CUDA_TYPES.get(args[0].dtype) or func(*args)
        return func(*args, **kwargs)


class _Inert:
    """A CUDA stream or event that has nothing to wait for."""

    def __init__(self, *args, **kwargs):
        pass

    def __getattr__(self, name):
        return lambda *args, **kwargs: None


def _not_compiled(function=None, **options):
    return (lambda decorated: decorated) if function is None else function


def apply(*, compiled_already: bool) -> None:
    """Replace the CUDA surface that megatron-core uses, once per process.

    megatron-core decorates small functions with torch.compile at import; compiling would take
    seconds, and at the first call ask for a C++ compiler. `compiled_already` says that it was
    imported before, so that these functions are made to run as they are. Raises RuntimeError inside
    a context such as `with torch.device("meta")`.
    """
    if torch._C._len_torch_function_stack():
        # On leaving such a context torch would take away this one's mode instead.
        raise RuntimeError("call mcore.setup.setup before entering torch.device or another mode")
    cuda = torch.cuda
    cpu = torch.device("cpu")
    inert = _Inert()
    cuda.current_device = lambda: cpu
    cuda.device_count = lambda: 1
    cuda.set_device = lambda device: None
    cuda.synchronize = lambda device=None: None
    cuda.empty_cache = lambda: None
    cuda.Stream = cuda.Event = _Inert
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.current_stream = cuda.default_stream = lambda device=None: inert
    cuda.is_current_stream_capturing = lambda: False
    for counter in ("memory_allocated", "max_memory_allocated", "memory_reserved"):
        setattr(cuda, counter, lambda device=None: 0)
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    torch.compile = _not_compiled
    if compiled_already:
        torch.compiler.set_stance("force_eager")
    _CudaMeansCpu().__enter__()
