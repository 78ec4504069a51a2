"""Whole PeftModels in files of a model: LoRA checkpoints of mPLUG-Owl's released trainer.

Its `checkpoint-N` holds `pytorch_model.bin` with every weight of the model below
`base_model.model.` and the adapters among them, without settings. transformers finds no name that
it knows there and gives a model of random weights, with no more than a warning.
"""

import logging
from pathlib import Path

import torch

from megatron_owl2.config.schema import LoraConfig
from megatron_owl2.convert.safetensors_io import (
    ADAPTER_SETTINGS,
    TensorReader,
    has_weights,
)
from megatron_owl2.errors import ConversionError

PREFIX = "base_model.model."
RELEASED_ALPHA = 32  # of the released training script
_LIVE = ".default.weight"  # of an adapter in a live PeftModel; its files have .weight
_WRAPPED = ".base_layer.weight"  # of a linear that has an adapter, in later versions of peft
_logger = logging.getLogger(__name__)


def is_peft_model(directory: str | Path) -> bool:
    """Whether a directory holds a whole PeftModel where a model's weights would be; raises
    ConversionError for weights that cannot be read."""
    directory = Path(directory)
    if (directory / ADAPTER_SETTINGS).exists() or not has_weights(directory):
        return False
    names = TensorReader(directory).names()
    return bool(names) and all(name.startswith(PREFIX) for name in names)


def refuse_peft_model(directory: str | Path) -> None:
    """ConversionError if a directory that should be a model is a whole PeftModel."""
    if is_peft_model(directory):
        raise ConversionError(
            f"{directory} is a whole PeftModel, as mPLUG-Owl's trainer saves its checkpoints: all "
            f"names begin with {PREFIX}, so that transformers would read none of them and give a "
            "model of random weights. Give the model that it was trained from, and this as its "
            "adapter: owl2 convert-from-hf --owl1 MODEL --adapter "
            f"{directory} --adapter-alpha {RELEASED_ALPHA}"
        )


def read_peft_model(
    directory: str | Path, base: str | Path, alpha: float | None
) -> tuple[LoraConfig, TensorReader]:
    """Rank and alpha of the adapters of a whole PeftModel, and a reader that has them alone, under
    the names of an adapter's own file.

    The other weights must be those of the model in the directory `base`. Raises ConversionError if
    they are not, if `alpha` is None, which no file tells, and if there are no adapters.
    """
    reader = TensorReader(directory)
    adapters = {
        name: name.removesuffix(_LIVE) + ".weight"
        for name in reader.names()
        if name.endswith(_LIVE) and ".lora_" in name
    }
    if not adapters:
        raise ConversionError(f"{directory} is a whole PeftModel without LoRA adapters")
    if alpha is None:
        raise ConversionError(
            f"{directory} is a whole PeftModel, whose files do not tell the alpha of its adapters; "
            f"give --adapter-alpha (the released training script has {RELEASED_ALPHA})"
        )
    _hold_against_base(reader, reader.names() - adapters.keys(), TensorReader(base))
    ranks = {reader.shape(name)[0] for name in adapters if ".lora_A." in name}
    if len(ranks) != 1:
        raise ConversionError(f"{directory} has adapters of the ranks {sorted(ranks)}")
    _logger.warning(
        "warning: %s is a whole PeftModel, the layout in which mPLUG-Owl's trainer leaves LoRA "
        "checkpoints and which transformers loads as a random model. Its %d adapter tensors are "
        "taken, with alpha %g; its other weights are those of %s",
        directory,
        len(adapters),
        alpha,
        base,
    )
    reader.rename(adapters)
    return LoraConfig(rank=ranks.pop(), alpha=alpha), reader


def _hold_against_base(reader: TensorReader, names: set[str], base: TensorReader) -> None:
    """Refuse frozen weights that are not the base's; what the base has no name for is a buffer."""
    plain = {n: n.removeprefix(PREFIX).replace(_WRAPPED, ".weight") for n in names}
    absent = sorted(base.names() - set(plain.values()))
    different = [
        name
        for name, theirs in sorted(plain.items())
        if theirs in base.names()
        and not torch.equal(reader[name], base[theirs].to(reader[name].dtype))
    ]
    absent = [name for name in absent if not name.endswith("inv_freq")]
    if different or absent:
        first = different[0] if different else absent[0]
        raise ConversionError(
            f"{reader.directory} was not trained from {base.directory}: {len(different)} of its "
            f"frozen weights differ and {len(absent)} are missing, such as {first}; give the model "
            "that its training started from"
        )
