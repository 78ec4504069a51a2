"""Speed of generation: the engine against transformers' generate on the same exported model.

Both answer the same questions about images, from pixels and text to text, on one core: prompts of
different lengths in one batch, and so many new tokens, whatever the model says. Each runs in a
process of its own, and they take turns; the fastest round counts. The first token's time is that of
the same call with one new token; the ratio is that of the whole calls. Growth is the mean time of a
token in the last quarter of an answer over that in the first quarter; memory is what the engine's
process grew by while it answered once more.

Without --model it makes an export of about 100 M parameters with random weights in DIRECTORY.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

WORDS = [
    "what",
    "is",
    "the",
    "color",
    "of",
    "left",
    "right",
    "top",
    "shape",
    "letter",
    "how",
    "many",
]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", metavar="DIRECTORY", help="scratch space for the random model")
    parser.add_argument("--model", action="append", default=[], help="an HF export; may repeat")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    parser.add_argument("--worker", choices=("transformers", "engine"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return serve(options.worker, options.model[0])
    models = [Path(model) for model in options.model] or [random_model(Path(options.directory))]
    figures = [row for model in models for row in measure(model, options)]
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=1))
    return 0


def measure(model: Path, options: argparse.Namespace) -> list[dict]:
    """Figures of one model, a row for each batch size, printed as they come."""
    workers = {name: Worker(name, model) for name in ("transformers", "engine")}
    print(f"{model}, {options.new_tokens} new tokens")
    print(
        "batch   transformers: first     all   per token   engine: first     all   per token   "
        "ratio   growth   memory"
    )
    rows = []
    for batch in options.batch:
        first, whole = ({name: [] for name in workers} for _ in range(2))
        for _ in range(options.rounds):
            for name, worker in workers.items():
                first[name].append(worker.ask(batch=batch, new=1)["seconds"])
                whole[name].append(worker.ask(batch=batch, new=options.new_tokens)["seconds"])
        row = {"model": str(model), "batch": batch}
        for name in workers:
            row[name] = {"first": min(first[name]), "all": min(whole[name])}
            each = (row[name]["all"] - row[name]["first"]) / (options.new_tokens - 1)
            row[name]["per_token"] = each
        row["ratio"] = row["transformers"]["all"] / row["engine"]["all"]
        row |= workers["engine"].ask(batch=batch, new=options.new_tokens, steps=True)
        print(
            f"{batch:5d}"
            + "".join(
                f"{1e3 * row[name]['first']:{width}.1f} {1e3 * row[name]['all']:7.0f} "
                f"{1e3 * row[name]['per_token']:8.2f} ms"
                for name, width in (("transformers", 22), ("engine", 15))
            )
            + f"{row['ratio']:8.2f} {row['growth']:8.2f} {row['memory_mib']:5.1f} MiB",
            flush=True,
        )
        rows.append(row)
    for worker in workers.values():
        worker.close()
    return rows


class Worker:
    """A process that answers with one of the two implementations, on one core."""

    def __init__(self, name: str, model: Path):
        command = [sys.executable, __file__, ".", "--worker", name, "--model", str(model)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.ask(batch=1, new=2)

    def ask(self, **what) -> dict:
        assert self.process.stdin and self.process.stdout
        print(json.dumps(what), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def serve(name: str, model: str) -> int:
    """Answer the commands of standard input, one line of JSON each."""
    answer = transformers_answers(model) if name == "transformers" else engine_answers(model)
    for line in sys.stdin:
        print(json.dumps(answer(**json.loads(line))), flush=True)
    return 0


def transformers_answers(model: str):
    import torch
    from transformers import AutoModelForCausalLM, AutoProcessor

    processor = AutoProcessor.from_pretrained(model, trust_remote_code=True)
    owl = AutoModelForCausalLM.from_pretrained(model, trust_remote_code=True).eval()

    def answer(batch: int, new: int) -> dict:
        texts, images = questions(batch)
        texts = [f"USER: <|image|>{text} ASSISTANT:" for text in texts]
        started = time.perf_counter()
        inputs = processor(text=texts, images=images, padding=True, return_tensors="pt")
        with torch.inference_mode():
            ids = owl.generate(**inputs, max_new_tokens=new, min_new_tokens=new, do_sample=False)
        processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return {"seconds": time.perf_counter() - started}

    return answer


def engine_answers(model: str):
    import psutil

    import megatron_owl2 as owl2

    owl = owl2.load(model)

    def answer(batch: int, new: int, steps: bool = False) -> dict:
        texts, images = questions(batch)
        if steps:
            return growth(owl, texts, images, new)
        started = time.perf_counter()
        owl.generate(texts, [[i] for i in images], max_new_tokens=new, min_new_tokens=new)
        return {"seconds": time.perf_counter() - started}

    def growth(owl, texts, images, new: int) -> dict:
        before = psutil.Process().memory_info().rss
        times = token_times(owl, texts, images, new)
        quarter = len(times) // 4
        ratio = statistics.mean(times[-quarter:]) / statistics.mean(times[:quarter])
        return {
            "growth": ratio,
            "memory_mib": (psutil.Process().memory_info().rss - before) / 2**20,
        }

    return answer


def token_times(owl, texts, images, new: int) -> list[float]:
    """Seconds of every decode step of a batch."""
    from megatron_owl2.inference.messages import from_question
    from megatron_owl2.inference.options import GenerationOptions
    from megatron_owl2.inference.scheduler import Scheduler

    options = GenerationOptions(max_new_tokens=new, min_new_tokens=new)
    scheduler = Scheduler(owl.generator.loaded, len(texts))
    for text, image in zip(texts, images, strict=True):
        scheduler.add(owl.request(from_question(text, [image]), options))
    while scheduler.waiting:
        scheduler.step()
    times = []
    while scheduler.active:
        started = time.perf_counter()
        scheduler.step()
        times.append(time.perf_counter() - started)
    return times


def questions(batch: int) -> tuple[list[str], list]:
    """Questions of 5 to 19 words and an image for each, the same for both implementations."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(5)
    texts = [" ".join(rng.choice(WORDS, 5 + i * 7 % 15)) for i in range(batch)]
    pixels = rng.integers(0, 256, (batch, 120, 90, 3), dtype=np.uint8)
    return texts, [Image.fromarray(image) for image in pixels]


def random_model(directory: Path) -> Path:
    """An export of 105 M parameters with random weights, made once."""
    output = directory / "random-100m"
    if output.exists():
        return output
    from megatron_owl2.mcore.setup import initialize, setup

    setup()
    import torch

    from megatron_owl2.config.schema import ParallelConfig, RunConfig
    from megatron_owl2.convert.hf_weights import export_hf
    from megatron_owl2.convert.lazy_tensor import of_model
    from megatron_owl2.data.tokenizer import train_tokenizer
    from megatron_owl2.mcore.parallel import ParallelContext
    from megatron_owl2.model.owl2 import Owl2

    directory.mkdir(parents=True, exist_ok=True)
    texts = [f"{a} {b} USER: ASSISTANT:" for a in WORDS for b in WORDS]
    tokenizer = train_tokenizer(texts, directory / "tokenizer.model", 320)
    config = RunConfig()
    config.train.precision = "fp32"
    model, vision, abstractor = config.model, config.model.vision, config.model.abstractor
    vision.image_size, vision.hidden_size, vision.ffn_size = 112, 256, 1024
    vision.num_layers, vision.num_heads = 4, 4
    abstractor.num_layers, abstractor.num_heads, abstractor.ffn_size = 2, 4, 688
    decoder = model.decoder
    decoder.vocab_size, decoder.hidden_size, decoder.ffn_size = tokenizer.vocab_size, 768, 2048
    decoder.num_layers = decoder.num_heads = decoder.num_kv_heads = 12
    decoder.max_positions, model.init_std = 1024, 0.05
    torch.manual_seed(7)
    owl = Owl2(ParallelContext(config, initialize(ParallelConfig())), model)
    print(f"{sum(p.numel() for p in owl.parameters()):,} parameters")
    export_hf(of_model(owl), model, output, tokenizer=tokenizer.path)
    return output


if __name__ == "__main__":
    sys.exit(main())
