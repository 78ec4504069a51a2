"""Recipe of a mixture: its corpora, the number of pairs and the filters of each."""

import difflib
from collections.abc import Collection
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from data_prep.downloads.registry import CORPORA
from data_prep.formats.registry import FORMATS
from megatron_owl2.errors import PreprocessError

# Options of tools/prepare_downloads.py and tools/preprocess_data.py, with underscores.
_LIMITS = ("min_score", "max_score", "min_side", "max_aspect", "min_caption", "max_caption")
LIST_OPTIONS = (*_LIMITS, "only")
SHARD_OPTIONS = (*_LIMITS, "max_side", "jpeg_quality", "deduplicate")


@dataclass(frozen=True)
class Source:
    """Source of a mixture: `target` pairs of a corpus.

    Either `corpus` is to be downloaded: its tables lie in `metadata`, `list` limits the rows, and
    the share `expected` of the addresses listed is thought to give a pair. Or the data are there
    already: `input` in `format`, with `images` if it names image files. `shards` limits the samples
    once more, by what was found. Paths are relative to the mixture's folder.
    """

    target: int
    corpus: str | None = None
    metadata: str | None = None
    expected: float = 1.0
    list: dict[str, Any] = field(default_factory=dict)
    format: str = "img2dataset"
    input: str | None = None
    images: str | None = None
    shards: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """Mixture of `sources` by name.

    `extends` is the configuration (relative to the recipe) that the one for training is made
    from; the rest are options of the tools.
    """

    sources: dict[str, Source]
    extends: str | None = None
    seed: int = 1234
    image_size: int = 320
    shard_size: int = 10_000


def read_recipe(path: Path) -> Recipe:
    """Recipe of a YAML file; raises PreprocessError naming the key and what it must be."""
    try:
        tree = yaml.safe_load(path.read_text())
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        raise PreprocessError(f"{path} cannot be read: {error}") from None
    _check_keys(path, "", tree, [entry.name for entry in fields(Recipe)], {"sources"})
    if not isinstance(tree["sources"], dict) or not tree["sources"]:
        raise PreprocessError(f"{path}: sources must be a section of names with their sources")
    sources = {}
    for name, body in tree["sources"].items():
        where = f"sources.{name}"
        _check_keys(path, where, body, [entry.name for entry in fields(Source)], {"target"})
        _check_keys(path, f"{where}.list", body.get("list", {}), LIST_OPTIONS)
        _check_keys(path, f"{where}.shards", body.get("shards", {}), SHARD_OPTIONS)
        sources[str(name)] = _checked(path, where, Source(**body))
    for key in ("seed", "image_size", "shard_size"):
        _require(type(tree.get(key, 1)) is int, path, key, "a whole number")
    return Recipe(**(tree | {"sources": sources}))


def _checked(path: Path, where: str, source: Source) -> Source:
    _require(
        type(source.target) is int and source.target > 0, path, f"{where}.target", "above 0, whole"
    )
    _require(
        type(source.expected) in (int, float) and 0 < source.expected <= 1,
        path,
        f"{where}.expected",
        "a share above 0 and up to 1",
    )
    _require(source.format in FORMATS, path, f"{where}.format", " or ".join(FORMATS))
    if source.corpus is None:
        _require(isinstance(source.input, str), path, f"{where}.input", "a path without a corpus")
        _require(not source.list, path, f"{where}.list", "absent where nothing is downloaded")
        return source
    _require(source.corpus in CORPORA, path, f"{where}.corpus", " or ".join(CORPORA))
    _require(isinstance(source.metadata, str), path, f"{where}.metadata", "the path of its tables")
    for key, default in (("format", "img2dataset"), ("input", None), ("images", None)):
        given = getattr(source, key)
        _require(given == default, path, f"{where}.{key}", "absent for a corpus to download")
    return source


def _check_keys(
    path: Path, where: str, tree: Any, known: Collection[str], needed: Collection[str] = ()
) -> None:
    place = f"{path}: {where}" if where else str(path)
    if not isinstance(tree, dict):
        raise PreprocessError(f"{place} must be a section with keys, not {tree!r}")
    for key in tree:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(known)}"
            raise PreprocessError(f"{place}: unknown key '{key}'; {hint}")
    for key in needed:
        if key not in tree:
            raise PreprocessError(f"{place}: '{key}' is missing")


def _require(condition: bool, path: Path, key: str, wanted: str) -> None:
    if not condition:
        raise PreprocessError(f"{path}: {key} must be {wanted}")
