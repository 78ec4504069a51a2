"""Answer of a model to a question about images, or about none.

owl2 generate --checkpoint CKPT_OR_HF_DIR --image FILE --prompt "What is this?"
"""

import argparse

from megatron_owl2.cli.command import Command, is_first_rank
from megatron_owl2.errors import InferenceError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", required=True, help="run directory, iter_* or HF export")
    parser.add_argument(
        "--image", action="append", default=[], help="an image; several in order, or none"
    )
    parser.add_argument(
        "--prompt",
        required=True,
        help="the question; <|image|> in it places the images, which come first otherwise; "
        "without --image it is text",
    )
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")


def run(options: argparse.Namespace) -> int:
    from megatron_owl2.inference import api

    try:
        options.prompt.encode()
    except UnicodeEncodeError:
        raise InferenceError("--prompt is not text in UTF-8") from None
    images = [api.read_image(file) for file in options.image]  # before the seconds of loading
    model = api.load(options.checkpoint, options.precision)
    answer = model.generate(options.prompt, images, max_new_tokens=options.max_new_tokens)
    if is_first_rank():
        print(answer)
    return 0


main = Command(verb="generate", help=__doc__, add_arguments=add_arguments, run=run).main
