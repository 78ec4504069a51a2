"""Clock, threads and queues of the code that reads shards, which a simulation replaces."""

import time
from collections.abc import Callable
from queue import SimpleQueue
from threading import Thread
from typing import Any


class Runtime:
    """The clock of this machine, in seconds, and daemon threads, which never hold up an exit."""

    def monotonic(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def queue(self) -> Any:
        """A queue with the `put` and the blocking `get` of SimpleQueue."""
        return SimpleQueue()

    def start_thread(self, name: str, work: Callable, *arguments: Any) -> None:
        Thread(target=work, args=arguments, name=name, daemon=True).start()
