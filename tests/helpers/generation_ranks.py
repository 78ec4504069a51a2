"""Commands of generation in two ranks of torchrun, one after the other: FOLDER OUTPUT."""

import json
import sys
from pathlib import Path

from megatron.core import parallel_state

from megatron_owl2.cli import visualize_attention
from megatron_owl2.cli.generate import main


def run(folder: Path, output: Path, *options: str) -> int:
    code = main(["--checkpoint", str(folder / "hf"), *options], "owl2 generate")
    if parallel_state.is_initialized():
        parallel_state.destroy_model_parallel()
    return code


def check(folder: Path, output: Path) -> None:
    requests = ["--requests", str(folder / "requests.jsonl"), "--batch-size", "3"]
    limit = ["--max-new-tokens", "12"]
    assert run(folder, output, *requests, "--output", str(output / "answers.jsonl"), *limit) == 0
    assert run(folder, output, "--prompt", "badal", *limit) == 0
    image = ["--image", str(folder / "images/0.png"), "--output", str(output / "attention")]
    asked = ["--checkpoint", str(folder / "hf"), "--prompt", "badal", *image]
    assert visualize_attention.main(asked, "owl2 visualize-attention") == 0
    parallel_state.destroy_model_parallel()
    bad = output / "bad.jsonl"
    (output / "no.png").write_text("no image")
    bad.write_text(json.dumps({"id": 1, "prompt": "x", "images": ["no.png"]}))
    assert run(folder, output, "--requests", str(bad), "--output", str(output / "none.jsonl")) == 2


if __name__ == "__main__":
    check(Path(sys.argv[1]), Path(sys.argv[2]))
