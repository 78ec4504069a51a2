"""Adapters without settings: whole PeftModels, as the released trainer of mPLUG-Owl leaves them.

Its `checkpoint-N` holds `pytorch_model.bin` with every weight of the model below
`base_model.model.` and the adapters among them, without settings. transformers finds no name that
it knows there and gives a model of random weights, with no more than a warning. Trainers of later
versions leave the adapters alone, sometimes without settings as well.
"""

import logging
import re
from pathlib import Path

import torch

from megatron_owl2.config.schema import LoraConfig
from megatron_owl2.convert.safetensors_io import (
    ADAPTER_FILES,
    ADAPTER_SETTINGS,
    MODEL_FILES,
    TensorReader,
    has_weights,
)
from megatron_owl2.errors import ConversionError

PREFIX = "base_model.model."
RELEASED_ALPHA = 32  # of the released training script
# In a live PeftModel A and B have the name of their adapter before the end, in its files none.
_ADAPTER = re.compile(r"(?P<module>.*\.lora_[AB])(\.(?P<adapter>[^.]+))?\.weight")
_WRAPPED = ".base_layer.weight"  # of a linear that has an adapter, in later versions of peft
_FILES = (*ADAPTER_FILES, *MODEL_FILES)
_logger = logging.getLogger(__name__)


def lacks_settings(directory: str | Path) -> bool:
    """Whether a directory holds adapters, or a whole PeftModel, without the file of settings;
    raises ConversionError for weights that cannot be read."""
    directory = Path(directory)
    if (directory / ADAPTER_SETTINGS).exists() or not has_weights(directory, _FILES):
        return False
    names = TensorReader(directory, _FILES).names()
    return bool(names) and all(name.startswith(PREFIX) for name in names)


def refuse_without_settings(directory: str | Path) -> None:
    """ConversionError with the way to convert adapters that have no settings."""
    if lacks_settings(directory):
        raise ConversionError(
            f"{directory} holds adapters without {ADAPTER_SETTINGS}, which tells their alpha (the "
            f"released training script of mPLUG-Owl has {RELEASED_ALPHA}). Convert them with their "
            f"model: owl2 convert-from-hf --owl1 (or --owl2) MODEL --adapter {directory} "
            "--adapter-alpha ALPHA"
        )


def refuse_peft_model(directory: str | Path) -> None:
    """ConversionError if a directory that should be a model is a whole PeftModel."""
    if has_weights(Path(directory), MODEL_FILES) and lacks_settings(directory):
        raise ConversionError(
            f"{directory} is a whole PeftModel, as mPLUG-Owl's trainer saves its checkpoints: all "
            f"names begin with {PREFIX}, so that transformers would read none of them and give a "
            "model of random weights. Give the model that it was trained from, and this as its "
            "adapter: owl2 convert-from-hf --owl1 MODEL --adapter "
            f"{directory} --adapter-alpha {RELEASED_ALPHA}"
        )


def read_without_settings(
    directory: str | Path, base: str | Path, alpha: float | None
) -> tuple[LoraConfig, TensorReader]:
    """Rank and alpha of adapters without settings, and a reader that has them alone, under the
    names of an adapter's own file.

    Other weights beside them must be those of the model in the directory `base`. Raises
    ConversionError if they are not, if `alpha` is None, which no file tells, and for no adapter or
    several.
    """
    if alpha is None:
        refuse_without_settings(directory)
    assert alpha is not None
    reader = TensorReader(directory, _FILES)
    matches = {name: match for name in reader.names() if (match := _ADAPTER.fullmatch(name))}
    called = sorted({match["adapter"] or "" for match in matches.values()})
    if len(called) != 1:
        found = f"those of {', '.join(called)}" if called else "no names with .lora_A and .lora_B"
        raise ConversionError(f"{directory} must hold LoRA matrices of one adapter; it has {found}")
    if frozen := reader.names() - matches.keys():
        _hold_against_base(reader, frozen, TensorReader(base))
    ranks = {reader.shape(name)[0] for name in matches if ".lora_A." in name}
    if len(ranks) != 1:
        raise ConversionError(f"{directory} has adapters of the ranks {sorted(ranks)}")
    kind = "a whole PeftModel, the layout in which mPLUG-Owl's trainer leaves LoRA checkpoints and "
    kind += "which transformers loads as a random model"
    _logger.warning(
        "%s is %s. Its %d adapter tensors are taken, with alpha %g%s",
        directory,
        kind if frozen else "an adapter without settings",
        len(matches),
        alpha,
        f"; its {len(frozen)} other tensors are those of {base}" if frozen else "",
    )
    reader.rename({name: f"{match['module']}.weight" for name, match in matches.items()})
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
