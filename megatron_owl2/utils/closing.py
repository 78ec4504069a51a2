"""Stack of what is to be closed, on every path out of a run."""

import logging
from collections.abc import Callable
from contextlib import ExitStack

_logger = logging.getLogger(__name__)


class Closing(ExitStack):
    """ExitStack that can keep a failure of closing from hiding the error that came before it."""

    def call(self, close: Callable[[bool], None]) -> None:
        """Have `close(failed)` called in its turn; what it raises after an error is logged."""

        def leave(kind, error, traceback):
            try:
                close(error is not None)
            except Exception as failure:
                if error is None:
                    raise
                name = type(failure).__name__
                _logger.warning("while closing after an error: %s: %s", name, failure)

        self.push(leave)
