"""Command lines of the project as modules, for tests of what is in them."""

import contextlib
import importlib.util
import io
import subprocess
import sys
from pathlib import Path
from types import ModuleType

from paths import TOOLS


def load(path: str) -> ModuleType:
    """The module of a file below tools/, which may import those beside it."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, TOOLS / path)
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str((TOOLS / path).parent))  # as Python does for a script
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.path[0]
    return module


def run(name: str, *arguments: object) -> subprocess.CompletedProcess:
    """A tool of tools/ run in this process, which spares it the import of torch."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = load(f"{name}.py").main([*map(str, arguments)])
        except SystemExit as stop:  # options that cannot be parsed
            code = stop.code
    return subprocess.CompletedProcess([name, *arguments], code, out.getvalue(), err.getvalue())
