"""Regions of Visual Genome as published: region_descriptions.json, [{id, regions: [{region_id,
phrase, x, y, width, height}]}].

`--images` is the folder that holds the images, IMAGE_ID.jpg, or the published folders of them,
VG_100K and VG_100K_2, or one above these. They must have the published sizes, since boxes are in
pixels.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import xxhash

from data_prep.formats.common.annotation_files import published_file
from data_prep.formats.common.encodings import check_data
from data_prep.formats.common.inputs import (
    SkipError,
    image_folders,
    images_folder,
    read_first_image,
    refuse_columns,
    sanitize_name,
    shown,
    skipped,
)
from data_prep.formats.common.json_lists import cut_list
from data_prep.formats.common.regions import Region, one_of_each_phrase, questions, read_region
from data_prep.formats.format import Format
from data_prep.splits import InputPlan, InputSplit, ReadOptions, Skipped
from megatron_owl2.data.shards.records import Record
from megatron_owl2.errors import BadSampleError, PreprocessError
from megatron_owl2.utils.json_text import parse_json

_FILE = "region_descriptions.json"
_FOLDERS = ("VG_100K", "VG_100K_2")
_TURNS = 10  # of a sample, at most; an image has about fifty regions
_BOX = ("x", "y", "width", "height")


class VisualGenome:
    """Phrases about regions of an image; one sample an image."""

    name = "visual-genome"

    def plan(self, source: Path, options: ReadOptions) -> InputPlan:
        """One split for every `options.samples_per_split` images.

        `source` is the file, or the folder that holds it. The payload is JSON: what its 5.4 million
        regions are in Python would take many times the memory. Raises PreprocessError if the file
        is not of this form, or without a folder of images.
        """
        refuse_columns(options)
        path = published_file(source, _FILE)
        check_data(path)
        folders = image_folders(images_folder(path, options), _FOLDERS)
        name = sanitize_name(path.stem)
        size = options.samples_per_split
        try:
            splits = [
                InputSplit(
                    f"{name}-{start // size:05d}",
                    f"{xxhash.xxh3_128_hexdigest(text.encode(errors='replace'))} from {start}",
                    (start, text, folders, path),
                    path,
                )
                for start, text in cut_list(path.read_bytes(), size)
            ]
        except ValueError as error:
            raise PreprocessError(f"{path} is not a JSON list of images: {error}") from None
        if not splits:
            raise PreprocessError(f"{path} holds no image: its list is empty")
        return InputPlan(splits)

    def read(self, payload: tuple[int, str, tuple[Path, ...], Path]) -> Iterator[Record | Skipped]:
        """Records of consecutive images, with up to ten regions each; the key is the image's id.

        A region that cannot be used is one Skipped. Of regions with the same phrase one is asked
        about; `metadata["other_regions"]` counts those that a sample has no turn for.
        """
        from megatron_owl2.data.images import image_size  # the list of formats comes without torch

        start, text, folders, source = payload
        for number, entry in enumerate(parse_json(text), start):
            where = f"{source.name}, entry {number}"
            try:
                image_id, found = _entry(entry)
                where = f"{where}, image {image_id}"
                image = read_first_image(folders, [f"{image_id}.jpg"])
                size = image_size(image)
            except (SkipError, BadSampleError) as error:
                yield skipped(error, where)
                continue
            regions: list[Region] = []
            for region in found:
                try:
                    regions.append(_region(image_id, region, size))
                except SkipError as error:
                    name = region.get("region_id") if isinstance(region, dict) else region
                    yield skipped(error, f"{where}, region {shown(name)}")
            yield _record(image_id, image, regions, source, where)


def _entry(entry: Any) -> tuple[int, list]:
    if not isinstance(entry, dict) or not isinstance(entry.get("id"), int):
        raise SkipError("entry without an id", shown(entry))
    if not isinstance(entry.get("regions"), list):
        raise SkipError("entry without a list of regions", shown(entry.get("regions")))
    return entry["id"], entry["regions"]


def _region(image_id: int, region: Any, size: tuple[int, int]) -> Region:
    if not isinstance(region, dict):
        raise SkipError("region is not an object", shown(region))
    number = region.get("region_id", region.get("id"))  # id: in version 1.0
    box = [region.get(name) for name in _BOX]
    return read_region(f"{image_id} {number}", region.get("phrase"), box, size)


def _record(
    image_id: int, image: bytes, regions: list[Region], source: Path, where: str
) -> Record | Skipped:
    chosen = one_of_each_phrase(regions)[:_TURNS]
    if not chosen:
        return Skipped("image without a usable region", where)
    try:
        return Record(
            str(image_id),
            images=(image,),
            turns=questions(chosen),
            source=source.stem,
            metadata={"image_id": image_id, "other_regions": len(regions) - len(chosen)},
        )
    except BadSampleError as error:
        return skipped(error, where)


FORMATS: tuple[Format, ...] = (VisualGenome(),)
