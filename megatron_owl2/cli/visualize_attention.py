"""Attention maps of a model, and what text and vision attend to in every layer.

owl2 visualize-attention --checkpoint CKPT_OR_HF_DIR --image FILE --prompt TEXT --output DIR

DIR gets attention.png, the paper's figures 4 and 5, and attention.json with the averages. --compare
draws another model beside it, such as one without the modality split. The answer is the model's own
unless --answer gives it.
"""

import argparse
import json
from pathlib import Path

from megatron_owl2.cli.command import Command, UsageError, is_first_rank
from megatron_owl2.cli.options import add_model, count
from megatron_owl2.errors import InferenceError

_MAPS = 4  # layers that are drawn unless --layers says which


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--compare", metavar="DIR", help="another model, drawn beside it")
    parser.add_argument(
        "--image", action="append", required=True, help="an image; several in order"
    )
    parser.add_argument("--prompt", required=True, help="the question; <|image|> places images")
    parser.add_argument("--answer", help="the answer that is read, instead of the model's own")
    parser.add_argument("--max-new-tokens", type=count, default=32, help="of the model's answer")
    parser.add_argument(
        "--layers", type=_numbers, help=f"of the maps, as 0,15,31 (default: {_MAPS}, evenly spread)"
    )
    parser.add_argument("--output", required=True, type=Path, metavar="DIR")


def run(options: argparse.Namespace) -> int:
    for name in ("prompt", "answer"):
        try:
            (getattr(options, name) or "").encode()
        except UnicodeEncodeError:
            raise UsageError(f"--{name} is not text in UTF-8") from None

    from megatron_owl2.inference import api

    images = [api.read_image(file) for file in options.image]
    checkpoints = [(options.checkpoint, options.adapter)]
    if options.compare:
        checkpoints.append((options.compare, None))
    models = [_look(options, images, *checkpoint) for checkpoint in checkpoints]
    if is_first_rank():
        from megatron_owl2.plotting import attention

        options.output.mkdir(parents=True, exist_ok=True)
        page, table = options.output / "attention.png", options.output / "attention.json"
        attention.draw(page, models)
        table.write_text(json.dumps([_averages(model) for model in models], indent=1) + "\n")
        print(page)
        print(table)
    return 0


def _look(options: argparse.Namespace, images: list, checkpoint: str, adapter: str | None):
    """What one model attends to; the model is gone when this returns."""
    from megatron_owl2.inference import api
    from megatron_owl2.inference.attention_maps import attention_maps, modality_shares
    from megatron_owl2.inference.messages import from_question
    from megatron_owl2.inference.options import GenerationOptions
    from megatron_owl2.plotting.attention import Attention

    model = api.load(checkpoint, options.precision, adapter=adapter)
    last = model.config.decoder.num_layers - 1
    layers = options.layers or sorted({round(last * i / (_MAPS - 1)) for i in range(_MAPS)})
    if max(layers) > last:
        raise InferenceError(f"there is no layer {max(layers)}; {checkpoint} has 0 to {last}")
    limits = GenerationOptions(options.max_new_tokens)
    request = model.request(from_question(options.prompt, images), limits)
    if options.answer is None:
        (completion,) = model.generator.complete([request])
        ids, answer = completion.token_ids, completion.text
    else:
        ids, answer = model.tokenizer.encode(options.answer), options.answer
    found = attention_maps(model.generator.loaded, request.prompt, request.images, ids)
    return Attention(checkpoint, options.prompt, answer, found, modality_shares(found), layers)


def _averages(model) -> dict:
    """The averages of one model as a tree of JSON."""
    names = ("text_on_vision", "text_on_text", "vision_on_vision", "vision_on_text")
    columns = {name: getattr(model.shares, name).tolist() for name in names}
    return {
        "model": model.name,
        "prompt": model.prompt,
        "answer": model.answer,
        "positions": len(model.found.vision),
        "layers": [
            {"layer": layer, **{name: columns[name][layer] for name in names}}
            for layer in range(len(model.found.maps))
        ],
    }


def _numbers(text: str) -> list[int]:
    """Whole numbers from 0 on, between commas."""
    words = text.split(",")
    if not all(word.strip().isdecimal() for word in words):
        raise argparse.ArgumentTypeError(f"{text!r} is not as 0,15,31")
    return list(dict.fromkeys(map(int, words)))


main = Command(verb="visualize-attention", help=__doc__, add_arguments=add_arguments, run=run).main
