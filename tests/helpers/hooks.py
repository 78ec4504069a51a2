"""Changes to the Trainer of jobs that a scheduler starts, with its own command lines."""

import os
from pathlib import Path

_FINDER = """
import importlib.abc, importlib.util, sys
class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "megatron_owl2.training.trainer":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module
        def exec_module(module):
            load(module)
            exec({body!r}, dict(trainer=module))
        spec.loader.exec_module = exec_module
        return spec
sys.meta_path.insert(0, Finder())
"""


def write(folder: Path, body: str) -> dict[str, str]:
    """Have Python processes run `body` after they import megatron_owl2.training.trainer, which it
    knows as `trainer`; returns the environment that does it."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / "sitecustomize.py").write_text(_FINDER.format(body=body))
    return {"PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}
