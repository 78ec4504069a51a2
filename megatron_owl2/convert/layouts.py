"""Layouts of whole models in Hugging Face directories, and what a model must be for each.

"owl2" is the released mPLUG-Owl2, "owl1" the released mPLUG-Owl (version 1). Neither has settings
for all that a ModelConfig can say; a model goes into the layout whose released code can hold it.
"""

from collections.abc import Callable

from megatron_owl2.config.schema import ModelConfig
from megatron_owl2.errors import ConversionError

MODEL_TYPES = {"mplug_owl2": "owl2", "mplug-owl": "owl1"}  # of config.json
RELEASED_FFN_SIZE = 2816  # of the abstractor, the only one that owl1's video code takes as it is

# What a layout asks of a model: the reason why it cannot hold one, if it cannot.
_Demand = tuple[Callable[[ModelConfig], bool], str]
_DEMANDS: dict[str, tuple[_Demand, ...]] = {
    "owl2": (
        (
            lambda model: model.abstractor.positions == "sincos",
            "its abstractor has position tables, and model.abstractor.positions is none",
        ),
        (
            lambda model: not model.vision.temporal,
            "its ViT has no adapters over frames, and model.vision.temporal is set",
        ),
        (
            lambda model: model.template != "owl1" and model.tokenization == "turns",
            "its processor does not know version 1's template (model.template, model.tokenization)",
        ),
    ),
    "owl1": (
        (
            lambda model: model.template == "owl1",
            "its processor asks in the template owl1, and model.template is another",
        ),
        (
            lambda model: not model.decoder.modality_split,
            "its decoder has one branch for both modalities, and model.decoder.modality_split is "
            "not []",
        ),
        (
            lambda model: model.abstractor.positions == "none",
            "its abstractor has no positions, and model.abstractor.positions is sincos",
        ),
        (
            lambda model: model.decoder.num_kv_heads == model.decoder.num_heads,
            "its LLaMA has a key and value for every head, and model.decoder.num_kv_heads is less",
        ),
        (
            lambda model: not model.vision.temporal or model.abstractor.ffn_size % 256 == 0,
            "its video code rounds the width of the abstractor's MLP up to a multiple of 256, and "
            "model.abstractor.ffn_size is none",
        ),
    ),
}
LAYOUTS = tuple(_DEMANDS)


def misfits(layout: str, model: ModelConfig) -> list[str]:
    """Why a layout cannot hold a model; [] if it can."""
    return [reason for fits, reason in _DEMANDS[layout] if not fits(model)]


def layout_of(model: ModelConfig) -> str:
    """The layout that can hold a model; raises ConversionError with reasons if none can."""
    for layout in LAYOUTS:
        if not misfits(layout, model):
            return layout
    reasons = "; ".join(f"{layout}: {', '.join(misfits(layout, model))}" for layout in LAYOUTS)
    raise ConversionError(f"no layout of Hugging Face directories holds this model. {reasons}")


def text_takes_an_image(model: ModelConfig) -> bool:
    """Whether a row of text alone takes an image of a batch in the released code, which shows it
    nobody: in mPLUG-Owl2's, and not in version 1's."""
    return model.abstractor.positions == "sincos"


def check_layout(layout: str, model: ModelConfig) -> None:
    """Refuse a layout of whole models that cannot hold the model; raises ConversionError."""
    if reasons := misfits(layout, model):
        other = [name for name in LAYOUTS if not misfits(name, model)]
        fix = f"; its layout is {other[0]}" if other else ""
        raise ConversionError(f"layout {layout} cannot hold this model: {'; '.join(reasons)}{fix}")
