"""Structure of a command line: its parser, its call, and the rule from errors to exit codes."""

import argparse
import io
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_owl2.errors import Owl2Error
from megatron_owl2.utils.logs import setup_logging

EXIT_INTERRUPTED = 128 + signal.SIGINT


class UsageError(Exception):
    """Options that do not go together; told below the usage, with exit code 2."""


@dataclass(frozen=True, kw_only=True)
class Command:
    """A verb of `owl2`, which tools/VERB.py runs too.

    `help` is the docstring of its module. `run` returns the exit code and may raise UsageError
    before its work. Errors (Owl2Error and OSError) end in one line on stderr and `error_code`,
    Ctrl-C (and SIGTERM, if `sigterm_interrupts`) in the line `interrupted` and 130. `intermixed`
    lets options stand between positional arguments. `modes` are commands of their own, chosen by
    the first argument.
    """

    verb: str
    help: str | None
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    error_code: int = 2
    interrupted: str = "interrupted"
    sigterm_interrupts: bool = False
    intermixed: bool = False
    modes: Mapping[str, "Command"] = field(default_factory=dict)

    def main(self, arguments: Sequence[str] | None = None, prog: str | None = None) -> int:
        """Parse and run; returns the exit code. `prog` is the name of the script by default.

        Raises SystemExit with 2 for arguments that cannot be parsed, with 0 for --help.
        """
        arguments = list(sys.argv[1:] if arguments is None else arguments)
        prog = Path(sys.argv[0]).name if prog is None else prog
        if arguments and arguments[0] in self.modes:
            mode = arguments.pop(0)
            return self.modes[mode].main(arguments, f"{prog} {mode}")
        parser = self.parser(prog)
        parse = parser.parse_intermixed_args if self.intermixed else parser.parse_args
        options = parse(arguments)
        setup_logging()
        if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal may not print what a file holds
            sys.stdout.reconfigure(errors="backslashreplace")
        if self.sigterm_interrupts:
            signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            return self.run(options)
        except UsageError as error:
            parser.error(str(error))
        except (Owl2Error, OSError) as error:
            _tell(error)
            return self.error_code
        except KeyboardInterrupt:
            print(self.interrupted, file=sys.stderr)
            return EXIT_INTERRUPTED

    def parser(self, prog: str) -> argparse.ArgumentParser:
        """The parser; its examples show the command as it was called, `owl2 VERB` or a script."""
        text = self.help or ""
        if not prog.startswith("owl2 "):
            script = f"tools/{self.verb.replace('-', '_')}.py"
            text = text.replace(f"--no-python owl2 {self.verb}", script)
            text = text.replace(f"owl2 {self.verb}", f"python {script}")
        parser = argparse.ArgumentParser(
            prog=prog, description=text, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        self.add_arguments(parser)
        return parser


def is_first_rank() -> bool:
    """Whether this process prints the results of its job: it is alone, or torchrun's rank 0."""
    return os.environ.get("RANK", "0") == "0"


def _tell(error: Exception) -> None:
    """Write the line of an error at once, for the ranks of a job share a terminal or a log."""
    where = "" if is_first_rank() else f"rank {os.environ['RANK']}: "
    sys.stderr.write(f"error: {where}{error}\n")
    sys.stderr.flush()
