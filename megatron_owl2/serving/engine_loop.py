"""Loop of the one thread of a process that owns its Scheduler, and the commands that reach it.

Under tensor parallelism the loop runs on every rank: rank 0 sends its commands to the others before
every step, so that all of them make the same calls.
"""

import queue
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import torch

from megatron_owl2.errors import InferenceError
from megatron_owl2.inference.requests import Request, Token
from megatron_owl2.inference.scheduler import Scheduler

HEARTBEAT_SECONDS = 20.0  # between the messages of idle ranks, far below the group's timeout
_GROUP_TIMEOUT = timedelta(minutes=10)


@dataclass(frozen=True)
class Admit:
    """A request to be answered under a ticket, a number that the server chose."""

    ticket: int
    request: Request


@dataclass(frozen=True)
class Cancel:
    """The end of interest in a ticket."""

    ticket: int


@dataclass(frozen=True)
class Stop:
    """The end of the loop."""


Command = Admit | Cancel | Stop
Event = tuple[int, Token | InferenceError]  # of a ticket


class Source(Protocol):
    """Where a rank has its commands from."""

    def next(self, busy: bool) -> Sequence[Command]:
        """The commands before the next step; waits for some if there is nothing to do."""
        ...


class Inbox:
    """Commands of other threads of this process, which is alone or rank 0."""

    def __init__(self) -> None:
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()

    def put(self, command: Command) -> None:
        """Hand over a command; from any thread."""
        self._commands.put(command)

    def next(self, busy: bool) -> list[Command]:
        """All commands that have come; waits up to HEARTBEAT_SECONDS for one if not `busy`."""
        found: list[Command] = []
        try:
            if not busy:
                found.append(self._commands.get(timeout=HEARTBEAT_SECONDS))
            while True:
                found.append(self._commands.get_nowait())
        except queue.Empty:
            return found


class RankSource:
    """Commands of rank 0 on all ranks of torchrun; `inbox` is rank 0's.

    All ranks make it together. They wait in gloo, which neither spins nor queues work on a device.
    """

    def __init__(self, inbox: Inbox | None):
        self._inbox = inbox
        self._group: Any = torch.distributed.new_group(backend="gloo", timeout=_GROUP_TIMEOUT)

    def next(self, busy: bool) -> Sequence[Command]:
        """The same commands on every rank."""
        message: list[Any] = [self._inbox.next(busy) if self._inbox else None]
        torch.distributed.broadcast_object_list(
            message, src=0, group=self._group, device=torch.device("cpu")
        )
        return message[0]


def run(
    scheduler: Scheduler, source: Source, deliver: Callable[[list[Event]], None] = lambda _: None
) -> None:
    """Serve commands until Stop; `deliver` gets what every step gave.

    A request that can never be served gets its InferenceError, anything else that is raised is a
    failure of the engine.
    """
    numbers: dict[int, int] = {}  # ticket: number of the scheduler
    tickets: dict[int, int] = {}
    while True:
        events: list[Event] = []
        for command in source.next(bool(scheduler.active or scheduler.waiting)):
            if isinstance(command, Stop):
                return
            if isinstance(command, Cancel):
                if (number := numbers.pop(command.ticket, None)) is not None:
                    del tickets[number]
                    scheduler.cancel(number)
                continue
            try:
                number = scheduler.add(command.request)
            except InferenceError as error:
                events.append((command.ticket, error))
                continue
            numbers[command.ticket], tickets[number] = number, command.ticket
        for token in scheduler.step():
            if (ticket := tickets.get(token.request)) is None:
                continue  # it was cancelled
            events.append((ticket, token))
            if token.finish_reason is not None:
                del numbers[ticket], tickets[token.request]
        if events:
            deliver(events)
