"""Signals that end a run after the step in hand, with a checkpoint."""

import signal
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # importing torch takes seconds, in which a signal would be lost
    import torch

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class StopSignal:
    """Flag set by the first signal that this process receives, reduced over the ranks.

    Signals after the first, Ctrl-C too, change nothing, for torchrun and terminals both pass on one
    Ctrl-C; SIGQUIT (Ctrl-\\) ends a process at once.
    """

    def __init__(self):
        self._received = 0
        for number in SIGNALS:
            signal.signal(number, self._remember)

    def _remember(self, number, frame) -> None:
        self._received = self._received or number

    def reduce(self, device: "torch.device") -> "torch.Tensor":
        """The number of a signal that some rank has received, or 0; all ranks together.

        Of several signals it is the greatest: Ctrl-C gives way to a scheduler's. An int64 scalar
        on the device; who reads it waits until the device has come so far.
        """
        import torch

        flag = torch.full((), self._received, device=device)
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        return flag
