"""Server of a model: OpenAI's chat API, with images, and a page to try it.

owl2 serve --checkpoint CKPT_OR_HF_DIR --port 8000
torchrun --nproc-per-node 2 --no-python owl2 serve --checkpoint CKPT_OR_HF_DIR

The address that it prints shows the page; clients of OpenAI's API take it with /v1 as their base.
SIGTERM and Ctrl-C let open requests end, for --grace seconds at most.
"""

import argparse
from pathlib import Path

from megatron_owl2.cli.command import Command, UsageError, is_first_rank
from megatron_owl2.cli.options import add_model, count, positive
from megatron_owl2.errors import ServingError
from megatron_owl2.serving.limits import MIB, Limits

_DEFAULT = Limits()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add_model(parser)
    add("--host", default="127.0.0.1", help="0.0.0.0 for all of the network (default: %(default)s)")
    add("--port", type=int, default=8000, help="0 for one that is free (default: %(default)s)")
    add("--model-name", help="its name for clients (default: that of the directory)")
    add_limits(parser.add_argument_group("limits"))
    images = parser.add_argument_group("images from the internet")
    images.add_argument(
        "--allow-image-urls",
        action="store_true",
        help="fetch images that requests name by http and https addresses of public hosts",
    )
    images.add_argument(
        "--image-url-port",
        action="append",
        type=count,
        default=[],
        help="a port to fetch from beside 80 and 443; several in turn",
    )
    images.add_argument("--image-url-seconds", type=positive, default=10.0, help="for one image")


def add_limits(group: argparse._ArgumentGroup) -> None:
    """The options of Limits."""

    def add(name: str, kind, default, text: str) -> None:
        group.add_argument(name, type=kind, default=default, help=f"{text} (default: {default})")

    d = _DEFAULT
    add("--max-batch", count, d.max_batch, "requests in generation together")
    add("--max-queue", count, d.max_queue, "requests that wait; more are answered with 429")
    add("--max-tokens", count, d.max_tokens, "new tokens of an answer")
    text = "decoder positions of prompt and answer, or the model's; memory is held for --max-batch"
    add("--max-positions", count, d.max_positions, text)
    add("--max-body-mib", positive, d.max_body / MIB, "size of a request")
    add("--max-images", count, d.max_images, "images of a request")
    add("--max-image-mib", positive, d.max_image_bytes / MIB, "size of an image's file")
    add("--max-image-pixels", count, d.max_image_pixels, "pixels of an image")
    add("--request-seconds", positive, d.request_seconds, "time of a request")
    add("--body-seconds", positive, d.body_seconds, "time to send a request")
    add("--grace", positive, d.grace_seconds, "seconds that open requests get at the end")


def limits_of(options: argparse.Namespace) -> Limits:
    """The limits that options name."""
    return Limits(
        max_batch=options.max_batch,
        max_queue=options.max_queue,
        max_body=int(options.max_body_mib * MIB),
        max_images=options.max_images,
        max_image_bytes=int(options.max_image_mib * MIB),
        max_image_pixels=options.max_image_pixels,
        max_positions=options.max_positions,
        max_tokens=options.max_tokens,
        request_seconds=options.request_seconds,
        body_seconds=options.body_seconds,
        grace_seconds=options.grace,
    )


def run(options: argparse.Namespace) -> int:
    if options.image_url_port and not options.allow_image_urls:
        raise UsageError("--image-url-port needs --allow-image-urls")
    from megatron_owl2.mcore.setup import setup

    setup()  # before the engine imports megatron-core
    try:
        from megatron_owl2.serving import server
        from megatron_owl2.serving.fetch import ImageFetcher
    except ModuleNotFoundError as error:
        needed = "pip install 'megatron-owl2[serve]'"
        raise ServingError(f"owl2 serve needs {error.name}: {needed}") from None
    from megatron_owl2.inference.loading import load_model

    limits = limits_of(options)
    bound = server.listen(options.host, options.port) if is_first_rank() else None
    loaded = load_model(options.checkpoint, options.precision, adapter=options.adapter)
    if bound is None:
        server.follow(loaded, limits=limits)
        return 0
    fetcher = None
    if options.allow_image_urls:
        fetcher = ImageFetcher(
            limits.max_image_bytes,
            options.image_url_seconds,
            ports=frozenset(options.image_url_port),
        )
    name = options.model_name or Path(options.checkpoint).resolve().name
    service = server.build_service(loaded, name=name, limits=limits, fetcher=fetcher)
    server.serve(service, bound)
    return 0


main = Command(verb="serve", help=__doc__, add_arguments=add_arguments, run=run).main
