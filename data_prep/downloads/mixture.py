"""Mixture of a recipe: progress of each source, next steps, configuration for training.

Under the mixture's folder lie lists/NAME (addresses), pictures/NAME (img2dataset's output),
shards/NAME and, if samples are held out, validation/NAME. The steps are other verbs of
`owl2`, which can be run by hand or elsewhere.
"""

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from data_prep.downloads.img2dataset_script import SCRIPT
from data_prep.downloads.recipe import Recipe, Source
from data_prep.downloads.registry import CORPORA
from data_prep.downloads.url_list import REPORT, read_report
from data_prep.job import REPORT as SHARDS_REPORT
from data_prep.job import read_statistics
from megatron_owl2.data.shards.manifest import MANIFEST
from megatron_owl2.errors import PreprocessError
from megatron_owl2.utils.files import is_hidden, write_atomically
from megatron_owl2.utils.json_text import parse_json

CONFIG = "config.yaml"


@dataclass(frozen=True)
class State:
    """Progress of a source: addresses listed, images downloaded, (finished, all) shards of the
    download, samples sharded and held out; None: not begun. `ready`: nothing is left to do."""

    listed: int | None
    downloaded: int | None
    download_shards: tuple[int, int]
    sharded: int | None
    held_out: int | None
    ready: bool

    @property
    def download_complete(self) -> bool:
        """Whether every shard of the list is downloaded."""
        done, wanted = self.download_shards
        return 0 < wanted <= done


class Mixture:
    """Mixture under way: a recipe, and the folder that it is carried out in."""

    def __init__(self, recipe: Recipe, folder: Path):
        self.recipe = recipe
        self.folder = folder.resolve()

    def state(self, name: str) -> State:
        """Progress of a source."""
        listed = downloaded = None
        done = wanted = 0
        if (self._path("lists", name) / REPORT).exists():
            report = read_report(self._path("lists", name))
            listed = report.listed
            wanted = sum(-(-rows // self.recipe.shard_size) for _, rows in report.files)
        stats = sorted(self._path("pictures", name).glob("*_stats.json"))
        stats = [path for path in stats if not is_hidden(path.name)]
        if stats:
            done = len(stats)
            downloaded = sum(_read_number(path, "successes") for path in stats)
        sharded, held_out = (self._samples(kind, name) for kind in ("shards", "validation"))
        ready = sharded is not None and (held_out is not None or not self.recipe.hold_out)
        return State(listed, downloaded, (done, wanted), sharded, held_out, ready)

    def dropped(self, name: str) -> dict[str, int]:
        """Number of samples, by reason, that are not in the shards of a source."""
        if not (self._path("shards", name) / SHARDS_REPORT).exists():
            return {}
        return read_statistics(self._path("shards", name)).skipped

    def steps(self, name: str, workers: int) -> dict[str, list[str]]:
        """Commands that make the shards of a source, from the start: list, download, shards,
        validation.

        Each may be run again: what is finished stays, and what was made by another recipe is
        refused.
        """
        source = self.recipe.sources[name]
        steps = {}
        if source.corpus is not None:
            script = self._path("lists", name) / SCRIPT
            steps["list"] = self._list(name, source)
            steps["download"] = ["bash", str(script), str(self._path("pictures", name))]
        steps["shards"] = self._shards(name, source, workers)
        if self.recipe.hold_out:
            steps["validation"] = self._held_out(name, source, workers)
        return steps

    def missing(self, name: str) -> str | None:
        """Message about a file that the user must bring before a source can begin, or None."""
        source = self.recipe.sources[name]
        for path in (source.metadata, source.input, source.images, self.recipe.tokenizer):
            if path is not None and not (self.folder / path).exists():
                about = f" ({CORPORA[source.corpus].about})" if source.corpus else ""
                return f"bring {self.folder / path}{about}"
        return None

    def next_step(self, name: str, state: State) -> str | None:
        """First step of a source that is not finished, or None."""
        if state.sharded is not None:
            return None if state.ready else "validation"
        if self.recipe.sources[name].corpus is None or state.download_complete:
            return "shards"
        return "list" if state.listed is None else "download"

    def advice(self, name: str, state: State) -> str:
        """Message about the next thing to do for a source."""
        source = self.recipe.sources[name]
        if state.sharded is None or not state.ready:
            return self.missing(name) or f"next: {self.next_step(name, state)}"
        if state.sharded >= source.target:
            return "ready"
        short = f"ready with {state.sharded / source.target:.1%} of the target"
        return f"{short}; a lower 'expected' lists more" if source.corpus else short

    def write_config(self, recipe_path: Path) -> Path:
        """Path of the configuration for training, which this writes.

        If the weights of the sources are those of the targets, a source that falls short is
        repeated more often. Raises PreprocessError if a source is not ready.
        """
        recipe = self.recipe
        unfinished = [name for name in recipe.sources if not self.state(name).ready]
        if unfinished:
            raise PreprocessError(f"not ready yet: {', '.join(unfinished)}")
        total = sum(source.target for source in recipe.sources.values())
        by_target = recipe.weights == "targets"
        sources = [
            {
                "path": str(self._path("shards", name)),
                "weight": round(source.target / total, 9) if by_target else 0.0,
                **({"group": source.group} if source.group else {}),
            }
            for name, source in recipe.sources.items()
        ]
        tree: dict[str, Any] = {}
        if recipe.extends is not None:
            tree["extends"] = str((recipe_path.parent / recipe.extends).resolve())
        tree |= {section: dict(keys) for section, keys in recipe.config.items()}
        tree.setdefault("data", {})["sources"] = sources
        if recipe.tokenizer is not None:
            tree["data"]["tokenizer"] = str(self.folder / recipe.tokenizer)
            model = tree.setdefault("model", {})
            model |= {"template": recipe.template, "tokenization": recipe.tokenization}
        if recipe.hold_out:
            held_out = [str(self._path("validation", name)) for name in recipe.sources]
            tree.setdefault("validation", {})["sources"] = held_out
        path = self.folder / CONFIG
        write_atomically(path, yaml.safe_dump(tree, sort_keys=False).encode())
        return path

    def _path(self, kind: str, name: str) -> Path:
        return self.folder / kind / name

    def _samples(self, kind: str, name: str) -> int | None:
        manifest = self._path(kind, name) / MANIFEST
        return _read_number(manifest, "samples") if manifest.exists() else None

    def _list(self, name: str, source: Source) -> list[str]:
        assert source.metadata is not None  # read_recipe asks for it beside a corpus
        return [
            *_verb("prepare-downloads"),
            *_flags({"corpus": source.corpus, "input": self.folder / source.metadata}),
            *_flags({"output": self._path("lists", name)}),
            *_flags(source.list),
            *_flags({"sample": math.ceil(source.target / source.expected)}),
            *_flags({"seed": self.recipe.seed, "image_size": self.recipe.image_size}),
            *_flags({"shard_size": self.recipe.shard_size}),
        ]

    def _shards(self, name: str, source: Source, workers: int) -> list[str]:
        return [
            *_verb("preprocess-data"),
            *self._from(name, source, self._path("shards", name)),
            *_flags({"sample": source.target, "seed": self.recipe.seed}),
            *_flags({"shard_size": self.recipe.shard_size, "workers": workers}),
        ]

    def _held_out(self, name: str, source: Source, workers: int) -> list[str]:
        return [
            *_verb("preprocess-data"),
            *self._from(name, source, self._path("validation", name)),
            *_flags({"seed": self.recipe.seed}),
            *_flags({"shard_size": self.recipe.shard_size, "workers": workers}),
            "--only-held-out",
        ]

    def _from(self, name: str, source: Source, output: Path) -> list[str]:
        """Options of the input and the output of shards, and all that both kinds of them share."""
        downloaded = self._path("pictures", name)
        place = {
            "input": downloaded if source.input is None else self.folder / source.input,
            "format": source.format,
        }
        if source.images is not None:
            place["images"] = self.folder / source.images
        options = dict(source.shards)
        if self.recipe.hold_out:
            options["hold_out"] = self.recipe.hold_out
        if self.recipe.tokenizer is not None:
            options["tokenizer"] = self.folder / self.recipe.tokenizer
            options["template"] = self.recipe.template
            options["tokenization"] = self.recipe.tokenization
        return _flags(place | {"output": output} | options)


def _verb(name: str) -> list[str]:
    """`owl2 NAME`, with this interpreter whatever else is on the PATH."""
    return [sys.executable, "-m", "megatron_owl2.cli", name]


def _flags(options: Mapping[str, Any]) -> list[str]:
    flags = []
    for name, value in options.items():
        values = [value]
        if isinstance(value, dict):
            values = [f"{key}={_joined(entry)}" for key, entry in value.items()]
        for entry in values:
            flags += [f"--{name.replace('_', '-')}", str(entry)]
    return flags


def _joined(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _read_number(path: Path, key: str) -> int:
    """A whole number in a JSON file; raises PreprocessError naming the file."""
    try:
        content = parse_json(path.read_bytes())
    except ValueError:
        content = None
    number = content.get(key) if isinstance(content, dict) else None
    if not isinstance(number, int) or number < 0:
        raise PreprocessError(f"{path} is damaged: it holds no number {key!r}; make it again")
    return number
