"""torchrun tests/helpers/padded_vocabulary.py CKPT HF_DIR FOLDER: a model whose vocabulary two
ranks do not divide, proved and saved under TP 2 and under PP 2, and answering under TP 2.

Rank 0 leaves `results.json`: the checks by parallelism, and the answers.
"""

import json
import sys
from pathlib import Path

import prepared  # noqa: F401
import runs_in_turn
import torch

from megatron_owl2.convert.verify.compare import compare
from megatron_owl2.convert.verify.verify import Verification
from megatron_owl2.data.image_tokens import IMAGE_TOKEN_ID
from megatron_owl2.inference.engine import Generator
from megatron_owl2.inference.loading import load_model
from megatron_owl2.inference.options import GenerationOptions
from megatron_owl2.inference.requests import Request
from megatron_owl2.mcore import setup
from megatron_owl2.training.checkpoint import save_load

PARALLELISMS = {
    "TP 2": ["parallel.tensor=2", "parallel.sequence=true"],
    "PP 2": ["parallel.pipeline=2"],
}
PROMPTS = [[1, 5, 322, 7], [1, 9], [1, 40, IMAGE_TOKEN_ID, 50]]
OPTIONS = {
    "greedy": GenerationOptions(6, 6),
    "sampled": GenerationOptions(6, 6, temperature=1.5, top_p=0.9, seed=3, repetition_penalty=1.2),
    "beams": GenerationOptions(6, 6, beams=3),
}


def answers(generator: Generator) -> dict:
    """Ids under every kind of options, and the log-likelihoods of the greedy ones."""
    size = generator.config.vision.image_size
    pixels = torch.randn(3, size, size, generator=torch.Generator().manual_seed(2))
    images = [[], [], [pixels]]
    found = {}
    for name, options in OPTIONS.items():
        requests = [Request(p, i, options) for p, i in zip(PROMPTS, images, strict=True)]
        found[name] = [one.token_ids for one in generator.complete(requests)]
    likelihoods = generator.log_likelihoods(PROMPTS, found["greedy"], images)
    found["likelihood"] = [one.total for one in likelihoods]
    return found


def main() -> None:
    checkpoint, hf_directory, folder = map(Path, sys.argv[1:])
    results = {}
    for name, overrides in PARALLELISMS.items():
        runs_in_turn.join_group(name)
        results[name] = [str(check) for check in compare(checkpoint, hf_directory, overrides)]
        loaded = Verification(checkpoint, overrides)
        save_load.save(folder / name, [loaded.model], loaded.config)
        setup.shutdown()
    for directory in (checkpoint, hf_directory):
        runs_in_turn.join_group(f"answers of {directory.name}")
        generator = Generator(load_model(directory))
        results[directory.name] = answers(generator)
        rank = torch.distributed.get_rank()
        setup.shutdown()
    if rank == 0:
        (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
