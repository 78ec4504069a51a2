"""Command lines of the project as modules, for tests of what is in them."""

import importlib.util
from pathlib import Path
from types import ModuleType

from paths import TOOLS


def load(path: str) -> ModuleType:
    """The module of a file below tools/."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, TOOLS / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
