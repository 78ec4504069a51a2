"""Ctrl-C and SIGTERM end a run after the step in hand, with a checkpoint."""

import signal

import torch


class StopRequest:
    """Remembers a signal from the moment it is made; every rank learns of any rank's."""

    def __init__(self):
        self._received = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._remember)

    def _remember(self, number, frame) -> None:
        self._received = number

    def agreed(self, device: torch.device) -> int:
        """The signal number that some rank has received, or 0; called by all ranks together."""
        flag = torch.tensor([self._received], device=device)
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        return int(flag)
