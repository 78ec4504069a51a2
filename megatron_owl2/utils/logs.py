"""Logging of commands: messages of rank 0 on stdout, warnings of every rank on stderr.

Modules log to `logging.getLogger(__name__)`; commands call `setup_logging` once. Lines that
scripts read (`error: ...`) are written directly, by the commands.
"""

import logging
import os
import sys

_LOGGERS = ("megatron_owl2", "data_prep")


class _Handler(logging.StreamHandler):
    """Handler that looks for sys.stdout or sys.stderr anew at every message."""

    def __init__(self, name: str, rank: int):
        logging.Handler.__init__(self)
        self._name_of_stream, self._rank = name, rank
        self.setLevel(logging.WARNING if name == "stderr" else logging.INFO)

    @property
    def stream(self):
        return getattr(sys, self._name_of_stream)

    def filter(self, record: logging.LogRecord) -> bool:
        warning = record.levelno >= logging.WARNING
        return warning == (self._name_of_stream == "stderr")

    def format(self, record: logging.LogRecord) -> str:
        parts = [f"rank {self._rank}"] if self._rank else []
        parts += ["warning"] if record.levelno >= logging.WARNING else []
        return ": ".join([*parts, super().format(record)])


def setup_logging(rank: int | None = None) -> None:
    """Show the messages of this project; `rank` is torchrun's RANK unless given."""
    rank = int(os.environ.get("RANK", "0")) if rank is None else rank
    for name in _LOGGERS:
        logger = logging.getLogger(name)
        logger.handlers = [_Handler("stderr", rank)]
        if rank == 0:
            logger.handlers.append(_Handler("stdout", rank))
        logger.setLevel(logging.INFO)
        logger.propagate = False
