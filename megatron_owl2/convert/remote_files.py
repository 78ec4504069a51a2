"""The code of an exported directory, and the settings that name its classes to transformers."""

import json
import shutil
from pathlib import Path
from typing import Any

from megatron_owl2.convert.safetensors_io import read_json

_TOKENIZER = {  # of the slow and the fast kind
    "AutoTokenizer": ["tokenization_mplug_owl2.MPLUGOwl2Tokenizer", None]
}
_IMAGE_PROCESSOR = {"AutoImageProcessor": "image_processing_mplug_owl2.MPLUGOwl2ImageProcessor"}
# What transformers loads from the directory's own code, by layout and the file that says so.
_CLASSES: dict[str, dict[str, dict[str, Any]]] = {
    "owl2": {
        "config.json": {
            "AutoConfig": "configuration_mplug_owl2.MPLUGOwl2Config",
            "AutoModelForCausalLM": "modeling_mplug_owl2.MPLUGOwl2LlamaForCausalLM",
            "AutoModelForImageTextToText": "modeling_mplug_owl2.MPLUGOwl2LlamaForCausalLM",
        },
        "preprocessor_config.json": _IMAGE_PROCESSOR,
        "processor_config.json": {"AutoProcessor": "processing_mplug_owl2.MPLUGOwl2Processor"},
        "tokenizer_config.json": _TOKENIZER,
    },
    "owl1": {
        "config.json": {
            "AutoConfig": "configuration_mplug_owl.MplugOwlConfig",
            "AutoModelForCausalLM": "modeling_mplug_owl.MplugOwlForConditionalGeneration",
            "AutoModelForImageTextToText": "modeling_mplug_owl.MplugOwlForConditionalGeneration",
        },
        "preprocessor_config.json": _IMAGE_PROCESSOR,
        "processor_config.json": {"AutoProcessor": "processing_mplug_owl.MplugOwlProcessor"},
        "tokenizer_config.json": _TOKENIZER,
    },
}


def model_class(layout: str) -> tuple[str, str]:
    """Module and name of the model's class in the code of a layout."""
    module, name = _CLASSES[layout]["config.json"]["AutoModelForCausalLM"].split(".")
    return module, name


def write_remote_code(directory: Path, layout: str) -> None:
    """The code that transformers 5 loads with trust_remote_code, added to a directory: the modules
    of its layout, and in the settings that are there the classes to take from them."""
    for module in Path(__file__).with_name("remote_code").joinpath(layout).glob("[!_]*.py"):
        shutil.copyfile(module, directory / module.name)  # what a link leads to
    for name, classes in _CLASSES[layout].items():
        path = directory / name
        if path.is_file():
            tree = read_json(path) | {"auto_map": classes}
            path.write_text(json.dumps(tree, indent=2) + "\n")
