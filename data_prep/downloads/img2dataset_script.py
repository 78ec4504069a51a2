"""Script that downloads a list of addresses with img2dataset.

Tested with img2dataset 1.47.0.
"""

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from data_prep.downloads.corpus import Corpus
from data_prep.downloads.selection import Selection
from megatron_owl2.errors import PreprocessError

SCRIPT = "download.sh"


@dataclass(frozen=True)
class Options:
    """Form of downloaded images: the smaller side is at most `image_size` pixels, JPEG of this
    quality where it must be encoded again, in the form `output_format` (webdataset, files or
    parquet) with this many addresses a shard.

    Random crops keep half of the area or more, so a smaller side of 320 leaves 224 pixels sharp.
    Raises PreprocessError for sizes and qualities that cannot be.
    """

    image_size: int = 320
    quality: int = 95
    output_format: str = "webdataset"
    samples_per_shard: int = 10_000

    def __post_init__(self):
        if min(self.image_size, self.samples_per_shard, self.quality) < 1 or self.quality > 100:
            raise PreprocessError(
                "image size and shard size must be positive, the quality from 1 to 100"
            )


def script(
    corpus: Corpus,
    columns: Sequence[str],
    files: Sequence[Sequence],
    selection: Selection,
    options: Options,
) -> str:
    """Text of download.sh for a list with these columns and [name, rows] of files."""
    command = " \\\n".join(
        f"    --{name} {shlex.quote(_value(value))}"
        for name, value in _options(corpus, columns, selection, options).items()
    )
    shards = sum(-(-rows // options.samples_per_shard) for _, rows in files)
    return _TEMPLATE.format(corpus=corpus.name, options=command, shards=shards)


def _options(
    corpus: Corpus, columns: Sequence[str], selection: Selection, options: Options
) -> dict[str, Any]:
    faces = corpus.faces in columns
    chosen = {
        "input_format": "parquet",
        "url_col": "url",
        "caption_col": "caption",
        "save_additional_columns": [n for n in columns if n not in (corpus.sha256, corpus.faces)],
        "output_format": options.output_format,
        "number_sample_per_shard": options.samples_per_shard,
        "image_size": options.image_size,
        "resize_mode": "keep_ratio",
        "resize_only_if_bigger": True,
        "encode_format": "jpg",
        "encode_quality": options.quality,
        # With it img2dataset 1.47 writes small images with their faces as they were.
        "skip_reencode": not faces,
        "min_image_size": selection.min_side,
        "max_aspect_ratio": selection.max_aspect,
        "extract_exif": False,
        "compute_hash": "sha256",
        "verify_hash": [corpus.sha256, "sha256"] if corpus.sha256 in columns else None,
        "bbox_col": corpus.faces if faces else None,
        "timeout": 10,
        "retries": 2,
        "max_shard_retry": 3,
        "incremental_mode": "incremental",
        "user_agent_token": "img2dataset",
        "disallowed_header_directives": ["noai", "noimageai", "noindex", "noimageindex"],
        "enable_wandb": False,
    }
    return {name: value for name, value in chosen.items() if value not in (None, [])}


def _value(value: Any) -> str:
    return json.dumps(value, separators=(",", ":")) if isinstance(value, list) else str(value)


_TEMPLATE = """#!/usr/bin/env bash
# Downloads the images of {corpus} with img2dataset (pip install img2dataset==1.47.0):
#   [PROCESSES=16 THREADS=64] bash download.sh FOLDER
# Started again it continues. THREADS are for each process. Images whose server forbids the use
# for AI or any index (X-Robots-Tag) are left out. A fast name server near by helps a lot.
set -euo pipefail

list=$(cd "$(dirname "${{BASH_SOURCE[0]}}")" && pwd)
folder=${{1:?usage: bash download.sh FOLDER}}
if ! command -v img2dataset > /dev/null; then
    echo "error: img2dataset is not installed; run: pip install img2dataset==1.47.0" >&2
    exit 1
fi

img2dataset --url_list "$list" --output_folder "$folder" \\
    --processes_count "${{PROCESSES:-$(nproc)}}" --thread_count "${{THREADS:-64}}" \\
{options}

done=$(find "$folder" -maxdepth 1 -name '*_stats.json' | wc -l)
if [ "$done" -ne {shards} ]; then
    echo "error: $done of {shards} shards are finished; start the script again" >&2
    exit 1
fi
"""
