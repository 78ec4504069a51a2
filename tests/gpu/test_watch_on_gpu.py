"""What only a GPU can show of itself: time by events, memory, its peak."""

import torch

from megatron_owl2.training import devices
from megatron_owl2.training.pace import Stopwatch


def test_the_stopwatch_counts_what_the_device_does():
    x = torch.randn(4096, 4096, device="cuda")
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    stopwatch = Stopwatch()
    stopwatch.take()
    begin.record()
    for _ in range(3):
        stopwatch.start()
        for _ in range(10):
            x = torch.nn.functional.normalize(x @ x)
        stopwatch.stop()
    end.record()
    seconds = stopwatch.take()
    assert 0.5 < seconds / (begin.elapsed_time(end) / 1e3) <= 1.01
    assert stopwatch.take() == 0


def test_memory_is_that_of_the_interval():
    devices.take_peak_memory()
    x = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    allocated, reserved = devices.take_peak_memory()
    assert 0.25 <= allocated <= reserved
    del x
    devices.take_peak_memory()
    assert devices.take_peak_memory()[0] < allocated - 0.2


def test_the_peak_is_looked_up_by_name():
    assert devices.peak_tflops(0.0) == devices.peak_of(torch.cuda.get_device_name())
