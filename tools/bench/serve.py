"""Soak test of a server: many clients with good, bad, oversized and abandoned requests at once.

    python tools/bench/serve.py --checkpoint runs/quickstart/hf --minutes 5

Starts `owl2 serve` and asks it from threads of this process. No good request may fail, every answer
must be the offline engine's, every bad request must get its 4xx, the place of a client that is gone
must be free within a second, and the server's memory must not grow. The exit code is 1 otherwise.
"""

import argparse
import base64
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
from serve_load import MAX_BODY, Case, Load, conversations, table

sys.path.insert(0, str(Path(__file__).parents[2]))


def answers(checkpoint: str, precision: str, max_tokens: int) -> tuple[list[Case], int]:
    """The conversations that fit the model with its answers, and how long any of them can be."""
    from megatron_owl2.mcore.setup import setup

    setup()
    from megatron_owl2.data import images
    from megatron_owl2.data.conversation import asking_ids
    from megatron_owl2.inference.engine import Generator
    from megatron_owl2.inference.loading import load_model
    from megatron_owl2.inference.messages import from_messages
    from megatron_owl2.inference.options import GenerationOptions
    from megatron_owl2.inference.requests import Request

    loaded = load_model(checkpoint, precision)
    config, to_square = loaded.config, images.square_resize(loaded.config)
    size, limit = config.vision.image_size, config.decoder.max_positions
    options = GenerationOptions(max_new_tokens=max_tokens)
    fitting, requests, longest = [], [], 512
    for messages in conversations():
        one = from_messages([_shown(message) for message in messages])
        template = config.conversation
        ids = asking_ids(one.questions, one.answers, loaded.tokenizer, template, one.system)
        left = limit - len(ids) - len(one.images) * (config.tokens_per_image - 1) + 1
        if left >= max_tokens:
            pixels = [to_square(images.decode(data), size) for data in one.images]
            fitting.append(messages)
            requests.append(Request(ids, pixels, options))
            longest = min(longest, left)
    completions = Generator(loaded).complete(requests)
    cases = [Case(m, c.text) for m, c in zip(fitting, completions, strict=True)]
    return cases, longest


def _shown(message: dict[str, Any]) -> dict[str, Any]:
    """A message with the bytes of its images in place of their addresses."""
    if isinstance(message["content"], str):
        return message
    parts = [
        {"type": "image", "image": base64.b64decode(part["image_url"]["url"].partition(",")[2])}
        if part["type"] == "image_url"
        else part
        for part in message["content"]
    ]
    return message | {"content": parts}


def start_server(given: argparse.Namespace, longest: int) -> tuple[subprocess.Popen, int]:
    """A server that has loaded the model, and its port."""
    script = Path(__file__).parents[1] / "serve.py"
    options = {
        "--checkpoint": given.checkpoint,
        "--precision": given.precision,
        "--port": 0,
        "--max-batch": given.max_batch,
        "--max-queue": 2 * given.clients,
        "--max-tokens": max(longest, given.max_tokens),
        "--max-body-mib": MAX_BODY >> 20,
    }
    words = [str(word) for pair in options.items() for word in pair]
    process = subprocess.Popen([sys.executable, script, *words], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    for line in process.stdout:
        if found := re.search(r" is served at http://.*:(\d+)$", line):
            return process, int(found[1])
    raise SystemExit(f"the server ended with exit code {process.wait()}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--max-batch", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=24)
    given = parser.parse_args()
    cases, longest = answers(given.checkpoint, given.precision, given.max_tokens)
    process, port = start_server(given, longest)
    seconds = 60 * given.minutes
    try:
        load = Load(
            ("127.0.0.1", port),
            psutil.Process(process.pid),
            cases,
            max_tokens=given.max_tokens,
            long=longest,
        )
        figures = load.run(given.clients, seconds)
    finally:
        process.terminate()
        code = process.wait(60)
    if code:
        figures.wrong.append(f"the server ended with exit code {code}")
    print(f"{given.clients} clients, {seconds:.0f} s, {len(cases)} conversations\n")
    print(table(figures, seconds))
    for failure in figures.failures():
        print(f"FAILED: {failure}")
    return 1 if figures.failures() else 0


if __name__ == "__main__":
    sys.exit(main())
