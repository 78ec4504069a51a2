"""Set-up of a process for megatron-core: environment, warnings, CPU stand-in, process groups.

Importing this package changes nothing. Entry points call `setup` before anything imports
megatron.core, and `initialize` calls it for everybody else.
"""

import atexit
import functools
import importlib
import logging
import os
import sys
import warnings
from contextlib import AbstractContextManager, nullcontext, suppress
from datetime import timedelta
from importlib import metadata
from typing import TYPE_CHECKING, Any

import torch
from packaging.version import Version

from megatron_owl2.config.schema import ParallelConfig
from megatron_owl2.errors import ConfigError
from megatron_owl2.mcore import cpu

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection

# What megatron-core says of itself and under newer versions of torch is nothing users can mend.
_KNOWN_WARNINGS = (
    "full scope is deprecated",
    "absl.logging is not installed",
    "MimoModelConfig is experimental",
    "invalid escape sequence",
    "The argument order of load has been changed",
    "torch.distributed is disabled",
    "Apex is not installed",
    "The following imports from `dynamic_context.py`",
    "The .grad attribute of a Tensor that is not a leaf",
    "TypedStorage is deprecated",
)
_KNOWN_LOGGERS = ("megatron.core.dist_checkpointing", "megatron.core.distributed")


def setup() -> None:
    """Prepare this process for megatron-core and import it, once; later calls do nothing.

    Without a GPU the CPU stands in for CUDA (mcore/cpu.py). Called before megatron.core is
    imported it also saves the seconds that its compiled helpers take to set up. Raises ConfigError
    where another package makes megatron-core fail.
    """
    if getattr(setup, "done", False):
        return
    # One queue per device keeps communication ahead of the GEMM it overlaps with; CUDA reads it
    # once, at its first call.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if on_cpu():
        cpu.apply(compiled_already="megatron.core" in sys.modules)
        # Kernels that only exist for GPUs are not missed.
        warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # nor is CUDA
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed|megatron")
    for message in _KNOWN_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    for name in _KNOWN_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    # Convolutions of a run in fp32 are fp32, as on a CPU; cuDNN would round their inputs to TF32.
    torch.backends.cudnn.allow_tf32 = False
    _import_megatron_core()
    setup.done = True


def _import_megatron_core() -> None:
    """Import of megatron.core without wandb, which its inference engine takes where it is there.

    That is not used here, and wandb is a sixth of the time that every rank takes to start.
    """
    unseen = "wandb" not in sys.modules
    if unseen:
        sys.modules["wandb"] = None  # pyright: ignore[reportArgumentType]  # as if not installed
    try:
        importlib.import_module("megatron.core.dist_checkpointing")
    except (AttributeError, AssertionError):
        _name_old_resiliency_ext()
        raise
    finally:
        if unseen:
            del sys.modules["wandb"]


def _name_old_resiliency_ext() -> None:
    """Raise ConfigError for a nvidia-resiliency-ext that megatron-core fails to import beside; from
    0.18 on it asks for 0.6.0 where there is one (dist_checkpointing/strategies/nvrx.py)."""
    with suppress(metadata.PackageNotFoundError):
        found = metadata.version("nvidia-resiliency-ext")
        if Version(found) < Version("0.6"):
            raise ConfigError(
                f"nvidia-resiliency-ext {found} is too old for this megatron-core, which fails to "
                "import beside it: pip uninstall nvidia-resiliency-ext, which is not needed here, "
                "or install 0.6.0 or newer"
            )


@functools.cache  # the stand-in answers some of the questions that torch asks CUDA
def without_stand_in() -> AbstractContextManager:
    """Context in which torch is called directly, for code that asks for no CUDA device: on a CPU
    every call of torch takes several microseconds longer by the stand-in for CUDA."""
    return torch._C.DisableTorchFunction() if on_cpu() else nullcontext()


def on_cpu() -> bool:
    """Whether the CPU stands in for CUDA: torch sees no GPU."""
    return not torch.cuda.is_available()


def device() -> torch.device:
    """The device of this rank: its CUDA device, or the CPU where there is no GPU."""
    return torch.device("cpu") if on_cpu() else torch.device("cuda", torch.cuda.current_device())


def describe_ranks() -> str:
    """Number of ranks, their device and backend, for the log."""
    ranks, backend = torch.distributed.get_world_size(), torch.distributed.get_backend()
    name = "CPU" if on_cpu() else torch.cuda.get_device_name()
    return f"{ranks} rank{'s' if ranks > 1 else ''} on {name}, {backend}"


def initialize(parallel: ParallelConfig, timeout_minutes: int = 30) -> "ProcessGroupCollection":
    """Join the process group torchrun describes (NCCL, or gloo on CPU) and lay out the ranks.

    Outside torchrun a group of one process is made. A rank that waits for another longer than
    `timeout_minutes` fails. Returns megatron-core's process groups.
    """
    setup()
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection

    if not torch.distributed.is_initialized():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        options: dict[str, Any] = {}
        if "MASTER_ADDR" not in os.environ and os.environ.get("WORLD_SIZE", "1") == "1":
            store = torch.distributed.HashStore()  # pyright: ignore[reportPrivateImportUsage]
            options = {"store": store, "rank": 0, "world_size": 1}
            # Threads of a group that is there at the very end can abort a process that did well;
            # of several ranks one that failed would wait here for the others.
            atexit.register(shutdown)
        if not on_cpu():
            options["device_id"] = device()  # communicators are made here, where a fault is told
        torch.distributed.init_process_group(
            "gloo" if on_cpu() else "nccl",
            timeout=timedelta(minutes=timeout_minutes),
            **options,
        )
    if not parallel_state.model_parallel_is_initialized():
        interleaved = parallel.virtual_pipeline > 1
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor,
            pipeline_model_parallel_size=parallel.pipeline,
            virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if interleaved else None,
            context_parallel_size=parallel.context,
            distributed_timeout_minutes=timeout_minutes,
            # Nobody answers in a fake group (planner/fake_process_groups.py), over gloo neither.
            create_gloo_process_groups=torch.distributed.get_backend() != "fake",
        )
    return ProcessGroupCollection.use_mpu_process_groups()


def shutdown() -> None:
    """Leave the process groups; also for tests and tools that build several parallel configurations
    in one process."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
