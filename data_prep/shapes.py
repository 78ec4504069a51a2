"""Embedded corpus, a small world of shapes, rendered in the formats that real data sets publish.

    python data_prep/shapes.py --output DIR

    pairs/         img2dataset's output folder (its webdataset form): images with captions
    instructions/  LLaVA conversations: llava_shapes.json (questions), llava_captions.json,
                   llava_two_images.json (two images each)
    text/          ShareGPT dialogues for the language model's start, retellings of scenes and
                   others, and more of these for joint tuning
    eval/          COCO captions, VQAv2 and POPE on images with training pairs (seen) and with
                   held-out pairs (heldout); ShareGPT questions without an image (text)
    tokenizer/     a SentencePiece model trained on the training text
    corpus.json    parameters, counts, held-out pairs, answer statistics, pixel mean and deviation

The same parameters give the same bytes. DIR appears when everything is written, not before.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from tqdm import tqdm

from data_prep.toy_corpus import formats, world
from megatron_owl2.data.tokenizer import train_tokenizer
from megatron_owl2.errors import PreprocessError

VERSION = 8  # raised whenever the same parameters give other bytes
VOCAB_SIZE = 576  # the least multiple of 64 that makes every word of the corpus one piece
_IMAGES_PER_TASK = 250
_TEXTS = {  # shares of text skills in the files of text/
    "sharegpt_retellings": {"retelling": 1},
    "sharegpt_start": {"scene": 70, "reversal": 10, "mixing": 10, "prices": 10},
    "sharegpt_instructions": {
        **{"scene": 56, "reversal": 8, "mixing": 8, "prices": 8},
        "retelling": 20,
    },
}


@dataclass(frozen=True)
class Parameters:
    """Parameters that determine every byte of the corpus.

    Raises ValueError for impossible sizes.
    """

    seed: int = 1234
    pairs: int = 20_000
    instructions: int = 16_000
    texts: int = 12_000
    eval: int = 600

    def __post_init__(self):
        if self.seed < 0:
            raise ValueError(f"seed must be 0 or more, got {self.seed}")
        for name in ("pairs", "instructions", "texts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")
        if self.eval < 2:
            raise ValueError(f"eval must be 2 or more (half of it is held out), got {self.eval}")


def build_corpus(output: Path, parameters: Parameters, workers: int = 1) -> bool:
    """Writer of the corpus to `output`; returns False if it was there already, complete.

    Raises PreprocessError if `output` is something else or was made with other parameters.
    """
    if _is_complete(output, parameters):
        return False
    partial = output.parent / f".{output.name}.partial-{os.getpid()}"
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise PreprocessError(f"{output}: cannot be created there ({error})") from error
    try:
        _write_corpus(partial, parameters, workers)
        partial.rename(output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return True


def _is_complete(output: Path, parameters: Parameters) -> bool:
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    try:
        corpus = json.loads((output / "corpus.json").read_text())
        found = {"version": corpus["version"], **corpus["parameters"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PreprocessError(
            f"{output} exists and is not a finished corpus of this program ({error!r}); "
            "choose another --output or remove it"
        ) from error
    wanted = {"version": VERSION, **asdict(parameters)}
    if found != wanted:
        raise PreprocessError(
            f"{output} holds a corpus made with {found}, asked for {wanted}; "
            "choose another --output or remove it"
        )
    return True


def _write_corpus(folder: Path, parameters: Parameters, workers: int) -> None:
    seed, held_out_images = parameters.seed, parameters.eval // 2
    images = parameters.pairs + parameters.instructions + parameters.eval + held_out_images
    total = images + len(_TEXTS) * parameters.texts
    record = formats.AnswerRecord()
    with (
        tqdm(total=total, desc="shapes", unit=" samples") as progress,
        _renderer(seed, workers, progress.update) as render,
    ):
        pairs = render("pairs", parameters.pairs)
        pixels = formats.write_pairs(folder / "pairs", pairs, seed, record)
        formats.write_instructions(
            folder / "instructions", render("instructions", parameters.instructions), seed, record
        )
        for name, shares in _TEXTS.items():
            path = folder / f"text/{name}.json"
            formats.write_texts(path, parameters.texts, shares, seed, record, progress.update)
        seen = render("eval/seen", parameters.eval)
        formats.write_eval(folder / "eval/seen", seen, seed, record)
        held_out = render("eval/heldout", held_out_images, held_out=True)
        formats.write_eval(folder / "eval/heldout", held_out, seed, record)
        formats.write_text_eval(
            folder / "eval/text/sharegpt_text.json", parameters.eval // 2, seed, record
        )
    (folder / "tokenizer").mkdir()
    tokenizer = train_tokenizer(record.texts, folder / "tokenizer/tokenizer.model", VOCAB_SIZE)
    known = {*record.captions["pairs"], *record.captions["instructions"]}
    seen_captions = record.captions["eval/seen"]
    corpus = {
        "version": VERSION,
        "parameters": asdict(parameters),
        "held_out_pairs": world.HELD_OUT,
        "image_size": world.IMAGE_SIZE,
        **pixels,
        "vocab_size": tokenizer.vocab_size,
        "counts": {
            "pairs": parameters.pairs,
            "instructions/llava_shapes": parameters.instructions,
            "instructions/llava_captions": -(-parameters.instructions // formats.CAPTION_EVERY),
            "instructions/llava_two_images": (parameters.instructions - 1) // formats.TWO_EVERY,
            **{f"text/{name}": parameters.texts for name in _TEXTS},
            "eval/seen": parameters.eval,
            "eval/heldout": held_out_images,
            "eval/text": sum(found.total() for found in record.answers["eval/text"].values()),
        },
        "answers": record.statistics(),
        # Images of eval/seen are new; with so few kinds of scenes, what they show may not be.
        "eval_seen_captions_in_training": round(
            sum(caption in known for caption in seen_captions) / len(seen_captions), 4
        ),
    }
    (folder / "corpus.json").write_text(json.dumps(corpus, indent=2) + "\n")


@contextlib.contextmanager
def _renderer(seed: int, workers: int, tick: Callable[[], object]) -> Iterator[Callable]:
    """Context of render(split, count, held_out=False), an iterator over a split's images."""
    with contextlib.ExitStack() as stack:
        compute = map
        if workers > 1:
            # Forking a process that has threads can deadlock; spawning cannot.
            compute = stack.enter_context(multiprocessing.get_context("spawn").Pool(workers)).imap

        def render(
            split: str, count: int, held_out: bool = False
        ) -> Iterator[formats.RenderedScene]:
            ranges = (
                range(i, min(i + _IMAGES_PER_TASK, count))
                for i in range(0, count, _IMAGES_PER_TASK)
            )
            for drawn in compute(_draw_range, ((seed, split, r, held_out) for r in ranges)):
                for image in drawn:
                    tick()
                    yield image

        yield render


def _draw_range(job: tuple[int, str, range, bool]) -> list[formats.RenderedScene]:
    seed, split, indices, held_out = job
    return [world.draw_image(seed, split, i, held_out) for i in indices]


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status, 2 for bad arguments (by SystemExit)."""
    description = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(description=description)
    help_ = {
        "seed": "seed of all random choices",
        "pairs": "images with a caption",
        "instructions": "images with a dialogue",
        "texts": "texts in each of the three text files",
        "eval": "evaluation images of seen pairs; half as many of held-out pairs",
    }
    parser.add_argument("--output", type=Path, required=True, help="folder to be created")
    for field in fields(Parameters):
        parser.add_argument(
            f"--{field.name}",
            type=int,
            default=field.default,
            metavar="N",
            help=f"{help_[field.name]} (default: %(default)s)",
        )
    parser.add_argument(
        "--workers", type=int, default=1, metavar="N", help="processes that render (default: 1)"
    )
    options = vars(parser.parse_args(arguments))
    output, workers = options.pop("output"), options.pop("workers")
    if workers < 1:
        parser.error(f"workers must be 1 or more, got {workers}")
    try:
        written = build_corpus(output, Parameters(**options), workers)
    except (ValueError, PreprocessError) as error:
        parser.error(str(error))
    print(f"{output}: {'written' if written else 'already complete, nothing to do'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
