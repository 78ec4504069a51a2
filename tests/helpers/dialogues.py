"""Dialogues with no image, one or several, as instruction tuning mixes them."""

from collections.abc import Callable
from pathlib import Path

import tiny_data
from tiny_data import encoded, make_image

from data_prep.measure import measure_lengths
from megatron_owl2.config.templates import OWL2
from megatron_owl2.data.shards.records import IMAGE_PLACEHOLDER, Record, Turn
from megatron_owl2.data.tokenizer import Tokenizer

HERE = IMAGE_PLACEHOLDER


def dialogue(index: int, source: str = "talk") -> Record:
    """In turn text, one image, two images in two turns, two in one question, a caption."""
    kind, key = index % 5, f"{source}{index:05d}"
    images = tuple(encoded(make_image(index + 1000 * n)) for n in range(min(kind, 2)))
    words = " ".join(str(index + n) for n in range(1 + index % 4))
    turns = {
        0: (Turn(f"say {words}", f"it is {words}"), Turn("sure?", "yes")),
        1: (Turn(f"{HERE}what number?", str(index)), Turn("sure?", "yes")),
        2: (Turn(f"{HERE}what number?", str(index)), Turn(f"and {HERE}here?", "yes")),
        3: (Turn(f"{HERE}or {HERE}sure?", str(index)),),
    }
    if kind == 4:
        return Record(key, images[:1], caption=f"picture {index}", source=source)
    return Record(key, images, turns=turns[kind], source=source)


def write(
    folder: Path, count: int, tokenizer: Path, record: Callable[[int], Record] = dialogue
) -> Path:
    """A data set of dialogues with its lengths."""
    tiny_data.write(folder, map(record, range(count)))
    measure_lengths(folder, Tokenizer(tokenizer), OWL2)
    return folder
