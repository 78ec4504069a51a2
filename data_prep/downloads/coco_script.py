"""Script that downloads the official archives of COCO."""

from pathlib import Path


def write_coco_script(folder: Path) -> Path:
    """Path of download.sh, which this writes into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "download.sh"
    path.write_text(_SCRIPT)
    return path


_SCRIPT = """#!/usr/bin/env bash
# Downloads the training images of COCO 2017 (118,287; 18 GB) and all captions:
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
    echo "error: $found of 118287 images are there; remove train2017.zip and start again" >&2
    exit 1
fi
"""
