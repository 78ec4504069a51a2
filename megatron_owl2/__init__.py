"""mPLUG-Owl2 on megatron-core: pre-training, instruction tuning, conversion and inference.

    import megatron_owl2 as owl2

    model = owl2.load("model")  # an HF export, a run directory or a checkpoint
    model.generate("What is this?", images=["owl.jpg"])
    owl2.ShardedDataset("shards/coyo")[1337]
    config = owl2.load_config("examples/7b/pretrain.yaml", ["train.steps=10"])
    owl2.Trainer(config).train()

The names below are imported at their first use, so `import megatron_owl2` loads neither torch nor
megatron-core.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_owl2.config.load import load_config
    from megatron_owl2.data.shards.dataset import ShardedDataset
    from megatron_owl2.errors import Owl2Error
    from megatron_owl2.inference.api import InferenceModel, load
    from megatron_owl2.training.trainer import Trainer

__all__ = [
    "InferenceModel",
    "Owl2Error",
    "ShardedDataset",
    "Trainer",
    "load",
    "load_config",
]

_MODULES = {
    "InferenceModel": "megatron_owl2.inference.api",
    "Owl2Error": "megatron_owl2.errors",
    "ShardedDataset": "megatron_owl2.data.shards.dataset",
    "Trainer": "megatron_owl2.training.trainer",
    "load": "megatron_owl2.inference.api",
    "load_config": "megatron_owl2.config.load",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
