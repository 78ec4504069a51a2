"""Ask a model about pictures, or without one:

python tools/generate.py --checkpoint CKPT_OR_HF_DIR --image FILE --prompt "What is this?"
"""

import argparse
import os
import sys
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True, help="run directory, iter_* or HF export")
    parser.add_argument(
        "--image", action="append", default=[], help="a picture; several in order, or none"
    )
    parser.add_argument(
        "--prompt",
        required=True,
        help="the question; <|image|> in it places the pictures, which come first otherwise",
    )
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    arguments = parser.parse_args()

    from megatron_owl2.data import images
    from megatron_owl2.data.conversation import prompt
    from megatron_owl2.data.shards.records import IMAGE_PLACEHOLDER
    from megatron_owl2.errors import (
        BadSampleError,
        CheckpointError,
        ConfigError,
        ConversionError,
        InferenceError,
    )
    from megatron_owl2.inference.engine import Generator, load_model

    question = arguments.prompt
    if IMAGE_PLACEHOLDER not in question:
        question = IMAGE_PLACEHOLDER * len(arguments.image) + question
    try:
        files = [Path(name).read_bytes() for name in arguments.image]
        loaded = load_model(arguments.checkpoint, arguments.precision)
        size = loaded.config.vision.image_size
        pictures = []
        for name, data in zip(arguments.image, files, strict=True):
            try:
                pictures.append(images.resize_square(images.decode(data), size))
            except BadSampleError as error:
                raise InferenceError(f"{name}: {error}") from None
        answers = Generator(loaded).generate(
            [prompt(question)], [pictures], arguments.max_new_tokens
        )
    except (InferenceError, CheckpointError, ConversionError, ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if os.environ.get("RANK", "0") == "0":
        print(answers[0])
    return 0


if __name__ == "__main__":
    sys.exit(main())
