"""Reads COCO captions as published: a JSON file with images: [{id, file_name}], and annotations:
[{id, image_id, caption}].

A picture has about five captions. `coco` makes a record of each, as pre-training pairs are made;
`coco-one-caption` draws one for each picture, as the paper's tuning data have it.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import xxhash

from data_prep.formats.inputs import SkipError, caption, images_folder, picture, split_name
from data_prep.splits import InputSplit, ReadOptions, Skipped
from megatron_owl2.data.sampling.keyed_random import combine
from megatron_owl2.data.shards.records import Record
from megatron_owl2.errors import BadSampleError, PreprocessError

_Row = tuple[Any, Any, Any, Any]  # picture's id and file, caption's id and text; None: not there


def plan(source: Path, options: ReadOptions) -> list[InputSplit]:
    """One part for every `options.samples_per_part` captions, those of a picture one by one.

    Raises PreprocessError if the file is not of this form, or without a folder of pictures.
    """
    return _plan(source, options, one_caption=False)


def plan_one_caption(source: Path, options: ReadOptions) -> list[InputSplit]:
    """As `plan`, with one caption of each picture, drawn by the picture's id."""
    return _plan(source, options, one_caption=True)


def read(payload: tuple[list[_Row], Path, str]) -> Iterator[Record | Skipped]:
    """The records of a run of captions; the key is the ids of the picture and of the caption."""
    rows, images, source = payload
    name, image = None, b""
    for image_id, file_name, caption_id, text in rows:
        try:
            if file_name is None:
                raise SkipError("caption of an unknown picture")
            if caption_id is None:
                raise SkipError("picture without a caption")
            if file_name != name:  # the captions of a picture follow one another
                name, image = None, picture(images, file_name)
                name = file_name
            yield Record(
                f"{image_id}_{caption_id}",
                image=image,
                caption=caption(text),
                source=source,
                metadata={"image_id": image_id, "file_name": file_name},
            )
        except (SkipError, BadSampleError) as error:
            yield Skipped(str(error), f"picture {image_id}, caption {caption_id}")


def _plan(source: Path, options: ReadOptions, one_caption: bool) -> list[InputSplit]:
    if not source.is_file():
        raise PreprocessError(f"{source} is not a file; name the JSON file of the captions")
    data = source.read_bytes()
    try:
        content = json.loads(data)
        files = {image["id"]: image["file_name"] for image in content["images"]}
        captions: dict[Any, list] = {image_id: [] for image_id in files}
        for entry in content["annotations"]:
            captions.setdefault(entry["image_id"], []).append((entry["id"], entry["caption"]))
    except (ValueError, RecursionError) as error:
        raise PreprocessError(f"{source} is not JSON: {error}") from None
    except (TypeError, KeyError):
        raise PreprocessError(
            f"{source} does not hold COCO captions: images with id and file_name, annotations with "
            "id, image_id and caption"
        ) from None
    images = images_folder(source, options)
    if one_caption:
        captions = {image_id: _draw(image_id, found) for image_id, found in captions.items()}
    rows = [
        (image_id, files.get(image_id), *entry)
        for image_id, found in captions.items()
        for entry in found or [(None, None)]
    ]
    identity = f"{xxhash.xxh3_128_hexdigest(data)} one caption: {one_caption}"
    size, name = options.samples_per_part, split_name(source.stem)
    return [
        InputSplit(
            f"{name}-{start // size:05d}",
            f"{identity} from {start}",
            (rows[start : start + size], images, source.stem),
            source,
        )
        for start in range(0, len(rows), size)
    ]


def _draw(image_id: Any, found: list) -> list:
    key = combine(xxhash.xxh3_64_intdigest(str(image_id).encode()))
    return [found[key % len(found)]] if found else []


def write_download(folder: Path) -> Path:
    """Write the script that fetches the official archives; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "download.sh"
    path.write_text(_DOWNLOAD)
    return path


_DOWNLOAD = """#!/usr/bin/env bash
# Downloads the training pictures of COCO 2017 (118,287; 18 GB) and all captions:
#   bash download.sh FOLDER
# Then: tools/preprocess_data.py --format coco --input FOLDER/annotations/captions_train2017.json \\
#     --images FOLDER/train2017
set -euo pipefail

folder=${1:?usage: bash download.sh FOLDER}
mkdir -p "$folder"
cd "$folder"
for archive in annotations/annotations_trainval2017 zips/train2017; do
    file=${archive##*/}.zip
    unzip -tqq "$file" 2> /dev/null || curl --fail --location --continue-at - --remote-name \\
        "http://images.cocodataset.org/$archive.zip"
    unzip -n -q "$file"
done
found=$(find train2017 -name '*.jpg' | wc -l)
if [ "$found" -ne 118287 ]; then
    echo "error: $found of 118287 pictures are there; remove train2017.zip and start again" >&2
    exit 1
fi
"""
