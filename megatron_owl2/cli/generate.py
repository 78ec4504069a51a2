"""Answers of a model to a question, to a file of requests, or in a chat.

owl2 generate --checkpoint CKPT_OR_HF_DIR --image FILE --prompt "What is this?"
owl2 generate --checkpoint CKPT_OR_HF_DIR --requests FILE.jsonl --output ANSWERS.jsonl
owl2 generate --checkpoint CKPT_OR_HF_DIR --chat

A request of a file is a line {"id": 1, "prompt": "What is this?", "images": ["owl.jpg"]}, with its
images relative to the file, or with "messages"; generation options, such as "max_new_tokens": 8,
may stand beside these. The same command goes on where it was interrupted.
"""

import argparse
import io
import os
import sys
from contextlib import suppress
from pathlib import Path

from megatron_owl2.cli.command import Command, UsageError, is_first_rank
from megatron_owl2.cli.generation_options import add_generation_options, given_options
from megatron_owl2.cli.options import add_model, count
from megatron_owl2.errors import InferenceError

_FRAMES = 4  # of a video, as version 1 took


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument(
        "--prompt",
        help="the question; <|image|> in it places the images, which come first otherwise; "
        "without --image it is text",
    )
    asked.add_argument("--requests", type=Path, metavar="FILE", help="JSON lines; needs --output")
    asked.add_argument("--chat", action="store_true", help="a conversation in the terminal")
    parser.add_argument(
        "--image",
        action="append",
        default=[],
        dest="shown",
        type=lambda path: ("image", path),
        help="of --prompt: an image; several in order, or none",
    )
    parser.add_argument(
        "--video",
        action="append",
        dest="shown",
        type=lambda path: ("video", path),
        help="of --prompt: a video in the place of an image",
    )
    parser.add_argument(
        "--frames", type=count, default=_FRAMES, help=f"of a video (default: {_FRAMES})"
    )
    parser.add_argument("--system", default="", help="text before the conversation")
    parser.add_argument("--output", type=Path, metavar="FILE", help="of --requests: JSON lines")
    parser.add_argument(
        "--batch-size",
        type=count,
        default=32,
        help="of --requests: how many are answered together (default: 32)",
    )
    add_generation_options(parser)


def run(options: argparse.Namespace) -> int:
    _check(options)
    if options.requests is not None:
        return _answer_file(options)
    return _chat(options) if options.chat else _answer(options)


def _check(options: argparse.Namespace) -> None:
    """Raises UsageError for options that do not go together, InferenceError for bad values."""
    from megatron_owl2.inference.options import GenerationOptions

    if (options.requests is None) != (options.output is None):
        raise UsageError("give --requests and --output together")
    if options.shown and options.prompt is None:
        raise UsageError("--image and --video are of --prompt; requests and chats have their own")
    given = given_options(options)
    if "logprobs" in given and options.requests is None:
        raise UsageError("--logprobs is of --requests, whose output has them")
    if options.chat and GenerationOptions(**given).beams > 1:
        raise UsageError("--beams cannot stream an answer; leave it out of --chat")
    GenerationOptions(**given)
    for name in ("prompt", "system"):
        try:
            (getattr(options, name) or "").encode()
        except UnicodeEncodeError:
            raise InferenceError(f"--{name} is not text in UTF-8") from None


def _answer(options: argparse.Namespace) -> int:
    from megatron_owl2.inference import api, messages
    from megatron_owl2.inference.options import GenerationOptions

    images = [_read(kind, path, options.frames) for kind, path in options.shown]
    conversation = messages.from_question(options.prompt, images)  # before the seconds of loading
    conversation.system = options.system
    model = api.load(options.checkpoint, options.precision, adapter=options.adapter)
    request = model.request(conversation, GenerationOptions(**given_options(options)))
    if request.options.beams > 1:
        (completion,) = model.generator.complete([request])
        _show(completion.text + "\n")
        return 0
    pieces = (token.text for token in model.generator.stream(request))
    if sys.stdout.isatty():
        started = False
        for piece in pieces:
            piece = piece if started else piece.lstrip()
            started = started or bool(piece)
            _show(piece)
        _show("\n")
    else:
        _show("".join(pieces).strip() + "\n")
    return 0


def _answer_file(options: argparse.Namespace) -> int:
    from megatron_owl2.evaluation.fingerprint import mark_of_model, model_directory
    from megatron_owl2.inference import api, request_file

    checkpoint = model_directory(Path(options.checkpoint))
    directories = [checkpoint, *([Path(options.adapter)] if options.adapter else [])]
    for directory in directories:
        if not directory.is_dir():
            raise InferenceError(f"{directory} is not a directory")
    about = " ".join([*map(mark_of_model, directories), options.precision])
    requests = request_file.read_requests(
        options.requests, given_options(options), options.system, about
    )
    if options.output.exists() and options.output.samefile(options.requests):
        raise InferenceError(f"--output {options.output} is the file of the requests")
    if is_first_rank():
        request_file.read_answers(options.output, requests)  # before the seconds of loading
    model = api.load(checkpoint, options.precision, adapter=options.adapter)

    from megatron_owl2.cli.answer_file import answer_requests

    answered = answer_requests(model, requests, options.output, options.batch_size)
    _show(f"{answered} of {len(requests)} requests answered now, all are in {options.output}\n")
    return 0


def _chat(options: argparse.Namespace) -> int:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("--chat is of one process; start it without torchrun, or give --requests")
    from megatron_owl2.cli.chat import Chat
    from megatron_owl2.inference import api

    with suppress(ImportError):
        import readline  # noqa: F401 - input() edits lines and has a history with it
    if isinstance(sys.stdin, io.TextIOWrapper):  # a line that is no text must not end the chat
        sys.stdin.reconfigure(errors="surrogateescape")
    model = api.load(options.checkpoint, options.precision, adapter=options.adapter)
    Chat(model, input, _show, system=options.system, options=given_options(options)).run()
    return 0


def _read(kind: str, path: str, frames: int):
    """The pixels of an image, or the frames of a video."""
    from megatron_owl2.evaluation.video_files import Video
    from megatron_owl2.inference import api

    if kind == "image":
        return api.read_image(path)
    from megatron_owl2.evaluation.video_frames import read_frames

    return read_frames(Video(Path(path), frames))


def _show(text: str) -> None:
    """Text of the first process, at once."""
    if is_first_rank():
        sys.stdout.write(text)
        sys.stdout.flush()


main = Command(verb="generate", help=__doc__, add_arguments=add_arguments, run=run).main
