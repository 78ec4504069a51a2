"""Linear probes: what of an image is where in the features of ViT and abstractor.

    python examples/studies/probes.py QUICKSTART OUTPUT

Ridge regression from all features of an image to the colour and the shape in every cell, fitted on
images that no stage saw; the figures are shares of cells with a shape that it names right.
QUICKSTART is the folder of a finished quickstart; OUTPUT gets probes.md, probes.json, probes.png.
"""

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy
import torch
from PIL import Image
from tqdm import tqdm

from data_prep.toy_corpus import world
from megatron_owl2.inference.loading import load_model
from megatron_owl2.plotting.figure import canvas

RUNS = {
    "vision": "vision start",
    "pretrain": "stage 1",
    "finetune": "stage 2",
}
FITTED, TESTED = 6000, 1000
RIDGE = 1e-2  # of the mean square of a feature
ATTRIBUTES = {"colour": tuple(world.COLORS), "shape": world.SHAPES}
SETS = ("new", "held-out pairs")

Features = Callable[[torch.Tensor], torch.Tensor]


def draw(split: str, count: int, held_out: bool = False) -> tuple[torch.Tensor, list[world.Scene]]:
    """Images uint8 [count, 3, H, W] and their scenes."""
    drawn = [world.draw_image(0, f"probe/{split}", i, held_out) for i in range(count)]
    pixels = [numpy.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB")) for _, jpeg in drawn]
    return torch.from_numpy(numpy.stack(pixels)).permute(0, 3, 1, 2), [scene for scene, _ in drawn]


def labels(scenes: list[world.Scene], attribute: str) -> torch.Tensor:
    """Index of the colour or shape in every cell, -1 without one: int64 [n, 4]. Scenes with a
    held-out pair have that of the pair alone."""
    found = torch.full((len(scenes), len(world.POSITIONS)), -1)
    for row, scene in enumerate(scenes):
        for i in scene.held_out or range(len(scene.shapes)):
            shape = scene.shapes[i]
            value = shape.color if attribute == "colour" else shape.shape
            found[row, shape.cell] = ATTRIBUTES[attribute].index(value)
    return found


def features_of(run: Path) -> dict[str, Features]:
    """Features [n, d] of images by the place in the model where they are read."""
    model = load_model(run).model

    def vit(images: torch.Tensor) -> torch.Tensor:
        pixels = (images / 255 - model.image_mean) / model.image_std
        return model.vision_model(pixels).transpose(0, 1).flatten(1)

    return {"ViT": vit, "abstractor": lambda images: model.encode_images(images).flatten(1)}


def small_pixels(images: torch.Tensor) -> torch.Tensor:
    """Means of 4 x 4 pixels, the probe without any model."""
    return torch.nn.functional.avg_pool2d(images / 255, 4).flatten(1)


@torch.no_grad()
def apply(function: Features, images: torch.Tensor) -> torch.Tensor:
    """Features and a constant, fp64 [n, d + 1]."""
    found = torch.cat([function(part) for part in images.split(250)]).double()
    return torch.cat([found, torch.ones(len(found), 1, dtype=torch.float64)], 1)


def accuracy(fitted: tuple, tested: tuple, choices: int) -> float:
    """% of cells with a shape for which a probe fitted on (features, labels) is right."""
    x, wanted = fitted
    targets = torch.nn.functional.one_hot(wanted + 1, choices + 1).double().flatten(1)
    penalty = RIDGE * x.square().mean() * len(x)
    weights = torch.linalg.solve(x.T @ x + penalty * torch.eye(x.shape[1]), x.T @ targets)
    x, wanted = tested
    scores = (x @ weights).unflatten(1, (wanted.shape[1], choices + 1))[..., 1:]
    there = wanted >= 0
    return 100 * (scores.argmax(-1) == wanted)[there].double().mean().item()


def probe(quickstart: Path) -> dict[str, dict[str, float]]:
    """Accuracies by place and by "attribute, set"."""
    images, scenes = draw("fit", FITTED)
    tests = {name: draw(name, TESTED, name != SETS[0]) for name in SETS}
    places = {"pixels": small_pixels}
    for run, name in RUNS.items():
        found = features_of(quickstart / "runs" / run)
        places |= {f"{place}, {name}": function for place, function in found.items()}
    results = {}
    for place, function in tqdm(places.items(), desc="probes", unit="place"):
        x = apply(function, images)
        results[place] = {}
        for name, (tested, tested_scenes) in tests.items():
            y = apply(function, tested)
            for attribute, choices in ATTRIBUTES.items():
                wanted = labels(tested_scenes, attribute)
                share = accuracy((x, labels(scenes, attribute)), (y, wanted), len(choices))
                results[place][f"{attribute}, {name}"] = share
    return results


def write(results: dict[str, dict[str, float]], folder: Path) -> str:
    """Table as Markdown, which is written to `folder` with its numbers and picture."""
    columns = list(next(iter(results.values())))
    lines = ["| features | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for place, row in results.items():
        lines.append(f"| {place} | " + " | ".join(f"{row[name]:.1f}" for name in columns) + " |")
    note = (
        f"% of cells with a shape that a linear probe names right; fitted on {FITTED:,} images, "
        f"asked about {TESTED:,} new ones and {TESTED:,} with held-out pairs"
    )
    text = "\n".join([*lines, "", note])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "probes.md").write_text(text + "\n")
    (folder / "probes.json").write_text(json.dumps(results, indent=1) + "\n")
    with canvas(folder / "probes.png", "What a linear probe reads", 11, 4) as figure:
        axes = figure.subplots(1, len(columns), sharey=True)
        for axis, column in zip(axes, columns, strict=True):
            places = range(len(results))
            axis.barh(places, [row[column] for row in results.values()], color="#2b6cb0")
            axis.set_yticks(places, list(results))
            axis.set_title(column, fontsize=10)
            axis.set_xlim(0, 100)
        axes[0].invert_yaxis()
        figure.supxlabel(note, fontsize=8)
    return text


def main() -> int:
    if len(sys.argv) != 3:
        sys.exit("usage: python examples/studies/probes.py QUICKSTART OUTPUT")
    torch.set_num_threads(2)
    print(write(probe(Path(sys.argv[1])), Path(sys.argv[2])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
