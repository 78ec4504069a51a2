"""Answers to a file of requests, computed together, by all processes of a job."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from megatron_owl2.cli.command import is_first_rank
from megatron_owl2.evaluation.ranks import from_first, together
from megatron_owl2.inference.api import InferenceModel
from megatron_owl2.inference.request_file import (
    Answers,
    FileRequest,
    answer_file,
    naming,
    put_in_order,
    read_answers,
)
from megatron_owl2.inference.requests import Completion, Request, expand


def answer_requests(
    model: InferenceModel, requests: Sequence[FileRequest], output: Path, batch_size: int
) -> int:
    """The number of requests answered now, of those without an answer in `output`.

    Every process calls this; the first one reads and writes the file, which at the end is in the
    order of the requests. At most `batch_size` are under way together. Raises InferenceError for a
    request that does not fit, before any is answered, or whose image cannot be read.
    """
    known: Answers = from_first(lambda: read_answers(output, requests))
    left = [request for request in requests if request.id not in known]
    positions = max((_positions(model, request) for request in left), default=1)
    with ExitStack() as stack:
        with together():
            write = stack.enter_context(answer_file(output)) if is_first_rank() else None
        counts = {"total": len(requests), "initial": len(known), "unit": " requests"}
        bar = stack.enter_context(tqdm(**counts, disable=not is_first_rank()))
        asked = _read(model, left, batch_size)
        size = max(1, min(batch_size, len(left)))
        for place, completion in model.generator.as_they_end(asked, size, positions):
            with together():
                if write is not None:
                    write(_row(left[place], completion))
            bar.update()
    with together():
        if is_first_rank():
            put_in_order(output, requests)
    return len(left)


def _positions(model: InferenceModel, request: FileRequest) -> int:
    """The positions that a request may take, found without reading its images."""
    size = model.config.vision.image_size
    shapes = [(len(i), 3) if isinstance(i, list) else (3,) for i in request.conversation.images]
    shown = [torch.empty(*s, size, size, dtype=torch.uint8, device="meta") for s in shapes]
    prompt = Request(model.prompt_ids(request.conversation), shown, request.options)
    row = expand(prompt, model.config, request.place)
    return len(row.tokens) + request.options.max_new_tokens - 1


def _read(
    model: InferenceModel, requests: Sequence[FileRequest], batch_size: int
) -> Iterator[Request]:
    """Requests with their images, each read when it is asked for; neighbours share them."""
    pixels = lru_cache(maxsize=batch_size)(model.pixels)
    for request in requests:
        with together(), naming(request.place):
            images = [
                torch.stack([pixels(frame) for frame in image])
                if isinstance(image, list)
                else pixels(image)
                for image in request.conversation.images
            ]
            ids = model.prompt_ids(request.conversation)
        yield Request(ids, images, request.options)


def _row(request: FileRequest, completion: Completion) -> dict[str, Any]:
    row: dict[str, Any] = {
        "id": request.id,
        "answer": completion.text,
        "finish_reason": completion.finish_reason,
        "prompt_tokens": completion.prompt_positions,
        "new_tokens": len(completion.token_ids),
    }
    if completion.logprobs is not None:
        row["logprobs"] = completion.logprobs
    return {**row, "request": request.mark}
