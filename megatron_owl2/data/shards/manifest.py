"""The manifest of a data set: one row for every shard, and the fingerprint of them all.

`manifest.json` is written last, so a folder without it was never finished. A row holds the
shard's name, its samples, its bytes, and the SHA-256 of its two sidecars; `.tar.sums` in turn
holds a checksum of every sample, so the fingerprint stands for every byte that training reads.
"""

import hashlib
import json
import os
from pathlib import Path

from megatron_owl2.errors import ShardError
from megatron_owl2.utils.files import write_atomically
from megatron_owl2.utils.json_text import parse_json

MANIFEST = "manifest.json"
FORMAT = "megatron_owl2 shards 3"  # may hold records of several images, or with a system text
_READABLE = {FORMAT, "megatron_owl2 shards 2"}
_ROW_TYPES = {"name": str, "samples": int, "bytes": int, "index_sha256": str, "sums_sha256": str}


def write_manifest(directory: str | os.PathLike, rows: list[dict]) -> None:
    """Finish a data set: write `manifest.json` over the shard rows, atomically.

    Raises ValueError if the rows hold no sample.
    """
    if not rows:
        raise ValueError(f"{directory}: a data set needs at least one sample")
    manifest = {
        "format": FORMAT,
        "samples": sum(row["samples"] for row in rows),
        "bytes": sum(row["bytes"] for row in rows),
        "fingerprint": _fingerprint(rows),
        "shards": rows,
    }
    write_atomically(Path(directory) / MANIFEST, json.dumps(manifest, indent=1).encode() + b"\n")


def parse_manifest(data: bytes, where: str) -> dict:
    """The checked manifest; raises ShardError naming `where` if it is inconsistent."""
    try:
        manifest = parse_json(data)
    except ValueError as error:
        raise ShardError(f"{where} is damaged: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("format") not in _READABLE:
        raise ShardError(f"{where} is not of the format {FORMAT!r}; make the data set again")
    rows = manifest.get("shards")
    if not isinstance(rows, list) or not rows or not all(_is_row(row) for row in rows):
        raise ShardError(f"{where}: its shard rows are missing or malformed")
    if manifest.get("fingerprint") != _fingerprint(rows):
        raise ShardError(f"{where}: its shard rows do not match its fingerprint; it was edited")
    for total in ("samples", "bytes"):
        if manifest.get(total) != sum(row[total] for row in rows):
            raise ShardError(f"{where}: its {total} are not the sum of its rows; it was edited")
    if len({row["name"] for row in rows}) < len(rows):
        raise ShardError(f"{where} names a shard twice")
    return manifest


def _is_row(row) -> bool:
    return (
        isinstance(row, dict)
        and row.keys() == _ROW_TYPES.keys()
        and all(type(row[name]) is kind for name, kind in _ROW_TYPES.items())
        and row["name"] == os.path.basename(row["name"])
        and row["name"].endswith(".tar")
        and row["samples"] > 0
    )


def _fingerprint(rows: list[dict]) -> str:
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()
