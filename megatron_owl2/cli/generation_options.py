"""Options of a command line that are generation options, a flag for every field."""

import argparse
from dataclasses import fields
from typing import Any

from megatron_owl2.inference.options import GenerationOptions

_HELP = {
    "max_new_tokens": "length limit of an answer",
    "min_new_tokens": "number of tokens before which no end token comes",
    "temperature": "0 takes the likeliest token, above it tokens are drawn",
    "top_p": "draw from the fewest tokens whose probabilities sum to this",
    "top_k": "draw from so many likeliest tokens; 0: all",
    "repetition_penalty": "above 1, tokens seen before become less likely",
    "stop": "end an answer before this text; may be repeated",
    "seed": "of what is drawn",
    "beams": "hypotheses of a beam search",
    "length_penalty": "exponent of the length by which hypotheses are compared",
    "logprobs": "keep the log probabilities of the tokens",
}


def add_generation_options(parser: argparse.ArgumentParser) -> None:
    """A flag for every field of `GenerationOptions`; those that are not given are in no result."""
    group = parser.add_argument_group("generation")
    for option in fields(GenerationOptions):
        kinds: dict[str, Any] = {"type": type(option.default), "metavar": "N"}
        default = f" (default: {option.default})"
        if option.name == "stop":
            kinds, default = {"action": "append", "metavar": "TEXT"}, ""
        elif isinstance(option.default, bool):
            kinds, default = {"action": "store_true"}, ""
        group.add_argument(
            f"--{option.name.replace('_', '-')}",
            default=argparse.SUPPRESS,
            help=_HELP[option.name] + default,
            **kinds,
        )


def given_options(parsed: argparse.Namespace) -> dict[str, Any]:
    """The fields of `GenerationOptions` that a command line gave."""
    return {o.name: getattr(parsed, o.name) for o in fields(GenerationOptions) if o.name in parsed}
