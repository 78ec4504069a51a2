"""Plug-in modules: the values that every module of a package declares."""

import importlib
import pkgutil
from collections.abc import Collection, Iterator
from types import ModuleType
from typing import Any


def declared(
    package: ModuleType, variable: str, without: Collection[str] = ()
) -> Iterator[tuple[str, Any]]:
    """Pairs of a module's name and the value of its `variable`, sorted by module.

    Subpackages and the modules named in `without` are passed over. Raises TypeError naming the
    module if it does not declare the variable.
    """
    names = (entry.name for entry in pkgutil.iter_modules(package.__path__) if not entry.ispkg)
    for name in sorted(set(names) - set(without)):
        module = importlib.import_module(f"{package.__name__}.{name}")
        if not hasattr(module, variable):
            raise TypeError(f"{module.__file__} does not define {variable}")
        yield module.__name__, getattr(module, variable)
