"""Stack of what is to be closed, on every path out of a run."""

from collections.abc import Callable
from contextlib import ExitStack

from megatron_owl2.utils.logs import log_failures_after


class Closing(ExitStack):
    """ExitStack that can keep a failure of closing from hiding the error that came before it."""

    def call(self, close: Callable[[bool], None]) -> None:
        """Have `close(failed)` called in its turn; what it raises after an error is logged."""

        def leave(kind, error, traceback):
            with log_failures_after(error):
                close(error is not None)

        self.push(leave)
