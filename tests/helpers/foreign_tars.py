"""Tar files as other programs write them."""

import io
import json
import tarfile
from pathlib import Path

from tiny_data import encoded, make_image

IMAGE = encoded(make_image(0))


def pack(path: Path, members: list[tuple[str, bytes]], **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def parts(key: str, *extensions: str) -> list[tuple[str, bytes]]:
    data = {"txt": f"caption {key}".encode(), "json": json.dumps({"id": key}).encode()}
    return [(f"{key}.{e}", data.get(e.rpartition(".")[2], IMAGE)) for e in extensions]
