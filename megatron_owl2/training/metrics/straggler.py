"""Straggler detection: the rank that takes longer than those that do the same work."""

import socket
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch

from megatron_owl2.mcore import setup

REPORT_RATIO = 1.25  # times the median of its peers, from which on the slowest rank is reported


class CudaTimer:
    """Timer of device work between `start` and `stop`, by CUDA events that nobody waits for;
    without a GPU by the clock."""

    def __init__(self):
        self._on_cpu = setup.on_cpu()
        self._seconds, self._started = 0.0, 0.0
        self._events, self._used = [], 0  # pairs, used again after every `take`

    def start(self) -> None:
        if self._on_cpu:
            self._started = time.perf_counter()
            return
        if self._used == len(self._events):
            self._events.append([torch.cuda.Event(enable_timing=True) for _ in range(2)])
        self._events[self._used][0].record()

    def stop(self) -> None:
        if self._on_cpu:
            self._seconds += time.perf_counter() - self._started
            return
        self._events[self._used][1].record()
        self._used += 1

    def take(self) -> float:
        """Seconds since the last call; waits until the device has come to the last `stop`."""
        if self._used:
            self._events[self._used - 1][1].synchronize()
        for start, stop in self._events[: self._used]:
            self._seconds += start.elapsed_time(stop) / 1e3
        seconds, self._seconds, self._used = self._seconds, 0.0, 0
        return seconds


@dataclass(frozen=True)
class StragglerReport:
    """The slowest rank, its host, how many times the median of its peers it took, and the share of
    its time that it waited for data."""

    rank: int
    host: str
    ratio: float
    data_wait_share: float

    def __str__(self) -> str:
        return (
            f"rank {self.rank} on {self.host} takes {self.ratio:.2f} times as long as its peers, "
            f"{self.data_wait_share:.0%} of it waiting for data"
        )


class StragglerDetector:
    """Comparison of the ranks that do the same work, those of one pipeline stage.

    A rank's own time is what it waits for its data and what its backward passes take. In neither
    does it wait for another data-parallel rank, whereas the forward pass may begin with waiting
    for the parameters that others have updated, and would be longest on the fastest rank. Ranks
    that share a model's layers or a sequence (tensor and context parallelism) wait for each
    other in every layer, so of a slow one all of them show the same time.
    """

    def __init__(self, pipeline_rank: int):
        """`pipeline_rank` is this rank's; all ranks together."""
        ranks: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(ranks, (pipeline_rank, socket.gethostname()))
        self._ranks: list[tuple[int, str]] = ranks

    def slowest(self, waited: list[float], computed: list[float]) -> StragglerReport:
        """The rank that is farthest above the median of its pipeline stage, from seconds by
        rank."""
        own = [sum(pair) for pair in zip(waited, computed, strict=True)]
        by_pipeline_rank: dict[int, list[float]] = {}
        for (pipeline_rank, _), seconds in zip(self._ranks, own, strict=True):
            by_pipeline_rank.setdefault(pipeline_rank, []).append(seconds)
        # The low median, which of two ranks is the faster one.
        usual = {rank: statistics.median_low(seconds) for rank, seconds in by_pipeline_rank.items()}
        ratios = [
            seconds / usual[pipeline_rank] if usual[pipeline_rank] else 1.0
            for (pipeline_rank, _), seconds in zip(self._ranks, own, strict=True)
        ]
        rank = max(range(len(ratios)), key=ratios.__getitem__)
        share = waited[rank] / own[rank] if own[rank] else 0.0
        return StragglerReport(rank, self._ranks[rank][1], ratios[rank], share)
