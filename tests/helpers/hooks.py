"""Changes to the training loop of another process, for tests of what goes wrong in it."""

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
            import torch
            exec({body!r}, dict(torch=torch, loop=module))
        spec.loader.exec_module = exec_module
        return spec
sys.meta_path.insert(0, Finder())
"""


def write(folder: Path, body: str) -> dict[str, str]:
    """Have Python processes run `body` after they import megatron_owl2.training.trainer, which it
    knows as `loop`; returns the environment that does it."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / "sitecustomize.py").write_text(_FINDER.format(body=body))
    return {"PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}
