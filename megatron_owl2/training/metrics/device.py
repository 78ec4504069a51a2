"""Peak FLOP/s of devices by name, and their peak memory."""

import re
import resource

import torch

from megatron_owl2.mcore import setup

_GIB = 1024**3
# Dense bf16 with fp32 accumulation, TFLOP/s, from NVIDIA's data sheets (which print twice as much
# where they mean sparse matrices). The first pattern that is found in a device's name counts.
_PEAKS = (
    (r"\bMIG\b", None),  # a slice of a GPU
    (r"\bGB200\b", 2500.0),
    (r"\bB200\b", 2250.0),
    (r"\bH200 NVL\b", 835.0),
    (r"\bH200\b", 989.0),
    (r"\bH100 NVL\b", 835.0),
    (r"\bH100 PCIe\b", 756.0),
    (r"\bH100\b", 989.0),
    (r"\bL40S\b", 362.0),
    (r"\bL4\b", 121.0),
    (r"\bA100\b", 312.0),
    (r"\bA40\b", 149.7),
    (r"\bA30\b", 165.0),
    (r"\bA10\b", 125.0),
)


def peak_tflops(given: float) -> float | None:
    """TFLOP/s of this rank's device in bf16: `given` if it is not 0, else by the device's name;
    None if that is not known."""
    if given:
        return given
    return None if setup.on_cpu() else get_peak_flops(torch.cuda.get_device_name())


def get_peak_flops(name: str) -> float | None:
    """TFLOP/s in bf16 of the GPU that `torch.cuda.get_device_name` calls `name`, if known."""
    return next((peak for pattern, peak in _PEAKS if re.search(pattern, name)), None)


class DeviceMemoryMonitor:
    """Monitor of the peak memory of this rank's device, in GiB.

    On a GPU `names` are "allocated" (by tensors) and "reserved" (by torch for them); without one
    "resident", the most that the process ever took.
    """

    def __init__(self):
        self._on_cpu = setup.on_cpu()
        self.names = ("resident",) if self._on_cpu else ("allocated", "reserved")

    def take_peak(self) -> list[float]:
        """The peaks by `names` since the last call."""
        if self._on_cpu:
            return [resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / _GIB]
        found = [torch.cuda.max_memory_allocated() / _GIB, torch.cuda.max_memory_reserved() / _GIB]
        torch.cuda.reset_peak_memory_stats()
        return found
