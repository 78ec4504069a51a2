"""Discrete-event simulation in which blocking code runs unchanged.

Every process and thread of the simulated cluster is a thread here, of which one runs at a time: it
gives way where it would sleep or wait, to whichever is due next. Between two such places no
simulated time passes.
"""

import heapq
import threading
from collections import deque
from collections.abc import Callable
from itertools import count
from typing import Any

from megatron_owl2.data.storage.runtime import Runtime

_STACK = 2**19  # bytes of a thread, of which there are thousands


class Closed(SystemExit):
    """The end of a thread whose simulation is over."""


class _Task:
    def __init__(self):
        self.turn = threading.Lock()
        self.turn.acquire()
        self.item: Any = None  # that a queue handed over


class Simulation(Runtime):
    """Clock in seconds from 0 on, threads and queues; use as a context manager.

    A deadlock, or an error in a thread, is raised as RuntimeError where the simulation was made.
    """

    def __init__(self):
        self._now = 0.0
        self._events: list[tuple[float, int, _Task | Callable[[], None]]] = []
        self._numbers = count()
        self._main = self._current = _Task()
        self._tasks = {self._main}
        self._failure: BaseException | None = None
        self._closing = False
        self.polls = 0  # sleeps of at most 0.1 s

    def __enter__(self) -> "Simulation":
        self._stack = threading.stack_size(_STACK)
        return self

    def __exit__(self, *_) -> None:
        threading.stack_size(self._stack)
        self._closing = True
        for task in self._tasks - {self._main}:
            task.turn.release()

    def monotonic(self) -> float:
        return self._now

    def sleep(self, seconds: float) -> None:
        self.polls += seconds <= 0.1
        self.resume_at(self._now + seconds, self.current)
        self.block()

    def queue(self) -> "Queue":
        return Queue(self)

    def start_thread(self, name: str, work: Callable, *arguments: Any) -> None:
        task = _Task()
        self._tasks.add(task)
        thread = threading.Thread(target=self._run, args=(task, work, arguments), daemon=True)
        thread.start()
        self.resume_at(self._now, task)

    @property
    def current(self) -> _Task:
        """The thread that runs, for `resume_at`."""
        return self._current

    def resume_at(self, moment: float, what: _Task | Callable[[], None]) -> None:
        """Have a blocked thread go on at a moment, or a function called in whichever thread."""
        heapq.heappush(self._events, (moment, next(self._numbers), what))

    def block(self) -> None:
        """Give way until somebody resumes this thread."""
        if self._closing:
            raise Closed
        task = self._current
        if self._pass_on(task):
            return
        task.turn.acquire()
        if self._closing:
            raise Closed
        if self._failure is not None and task is self._main:
            raise RuntimeError(f"the simulation failed: {self._failure!r}") from self._failure

    def _pass_on(self, task: _Task | None) -> bool:
        """Run what is due until a thread is; whether that is `task` itself."""
        while self._events and self._failure is None:
            self._now, _, what = heapq.heappop(self._events)
            if not isinstance(what, _Task):
                what()
                continue
            self._current = what
            if what is not task:
                what.turn.release()
            return what is task
        self._failure = self._failure or RuntimeError("every thread waits for another")
        self._current = self._main
        if task is self._main:
            raise self._failure
        self._main.turn.release()
        return False

    def _run(self, task: _Task, work: Callable, arguments: tuple) -> None:
        task.turn.acquire()
        try:
            if not self._closing:
                work(*arguments)
        except Closed:
            pass
        except BaseException as error:
            self._failure = error
        if not self._closing:
            self._tasks.discard(task)
            self._pass_on(None)


class Queue:
    """First-in-first-out queue between threads of a simulation."""

    def __init__(self, simulation: Simulation):
        self._simulation = simulation
        self._items: deque = deque()
        self._waiting: deque[_Task] = deque()

    def put(self, item: Any) -> None:
        if not self._waiting:
            self._items.append(item)
            return
        task = self._waiting.popleft()
        task.item = item
        self._simulation.resume_at(self._simulation.monotonic(), task)

    def get(self) -> Any:
        if self._items:
            return self._items.popleft()
        task = self._simulation.current
        self._waiting.append(task)
        self._simulation.block()
        return task.item


class Link:
    """Network link whose transfers share its bandwidth equally, none above `connection` bytes per
    second; all figures in bytes and seconds."""

    def __init__(self, simulation: Simulation, bandwidth: float, connection: float):
        self._simulation = simulation
        self._bandwidth, self._connection = bandwidth, connection
        self._share = 0.0  # bytes that a transfer under way since 0 would have got
        self._updated = 0.0
        self._ends: list[tuple[float, int, list[Callable[[], None]]]] = []
        self._numbers = count()
        self._active = 0
        self._version = 0

    def start(self, size: float, done: Callable[[], None]) -> list[Callable[[], None]]:
        """Begin a transfer; returns what `cancel` takes."""
        self._update()
        transfer = [done]
        heapq.heappush(self._ends, (self._share + size, next(self._numbers), transfer))
        self._active += 1
        self._schedule()
        return transfer

    def cancel(self, transfer: list[Callable[[], None]]) -> None:
        if transfer:
            self._update()
            transfer.clear()
            self._active -= 1
            self._schedule()

    @property
    def _rate(self) -> float:
        return min(self._connection, self._bandwidth / max(1, self._active))

    def _update(self) -> None:
        now = self._simulation.monotonic()
        self._share += (now - self._updated) * self._rate
        self._updated = now

    def _schedule(self) -> None:
        while self._ends and not self._ends[0][2]:
            heapq.heappop(self._ends)
        self._version += 1
        if self._ends:
            version, left = self._version, max(0.0, self._ends[0][0] - self._share)
            moment = self._updated + left / self._rate
            self._simulation.resume_at(moment, lambda: self._complete(version))

    def _complete(self, version: int) -> None:
        if version != self._version:
            return
        self._update()
        end, _, transfer = heapq.heappop(self._ends)
        self._share = max(self._share, end)  # rounding must not leave it a byte short for ever
        self._active -= 1
        done = transfer.pop()
        self._schedule()
        done()
