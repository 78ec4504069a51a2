"""Damage to a user's file, of the kinds that disks, editors, downloads and hands do."""

import gzip
import json
import random
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

Damage = Callable[[random.Random, bytes], bytes]

# What a value of JSON becomes by mistake.
_VALUES: tuple[Any, ...] = (
    None, True, 0, -1, 1.5, 10**30, float("nan"), "", " x ", "\ufeff", "\ud800", [], [[]], {},
    {"a": 1}, "1", [None], "\u2028",
)  # fmt: skip


def cut(draw: random.Random, data: bytes) -> bytes:
    return data[: draw.randrange(len(data) + 1)]


def empty(draw: random.Random, data: bytes) -> bytes:
    return b""


def zeros(draw: random.Random, data: bytes) -> bytes:
    """A block that was never written."""
    start = draw.randrange(len(data) + 1)
    length = min(len(data) - start, draw.choice((1, 16, 512, 4096)))
    return data[:start] + bytes(length) + data[start + length :]


def flipped_bits(draw: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 4, 30))):
        if changed:
            changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def noise(draw: random.Random, data: bytes) -> bytes:
    start = draw.randrange(len(data) + 1)
    return data[:start] + draw.randbytes(draw.choice((1, 3, 100))) + data[start:]


def lost_bytes(draw: random.Random, data: bytes) -> bytes:
    start = draw.randrange(len(data) + 1)
    return data[:start] + data[start + draw.choice((1, 7, 512)) :]


def rubbish(draw: random.Random, data: bytes) -> bytes:
    return draw.randbytes(draw.randrange(1, 2000))


def another_encoding(draw: random.Random, data: bytes) -> bytes:
    kind = draw.choice(("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-8-sig", "latin-1"))
    return data.decode("utf-8", "replace").encode(kind, "replace")


def line_ends(draw: random.Random, data: bytes) -> bytes:
    end = draw.choice((b"\r", b"\r\n", b"\n\n", b"\x0b", b"\xe2\x80\xa8", b"", b" \n", b"\n\r"))
    return data.replace(b"\n", end)


def moved_lines(draw: random.Random, data: bytes) -> bytes:
    """Lines that are doubled, lost or exchanged."""
    lines = data.splitlines(keepends=True)
    for _ in range(2):
        if lines:
            place = draw.randrange(len(lines))
            line = lines.pop(place)
            lines[draw.randrange(len(lines) + 1) : 0] = [line] * draw.randrange(3)
    return b"".join(lines)


def odd_characters(draw: random.Random, data: bytes) -> bytes:
    odd = draw.choice((b"\0", b'"', b"\\", b"\t", b"\xff", b"{", b"]", b":", b",", b"- ", b"&x *x"))
    start = draw.randrange(len(data) + 1)
    return data[:start] + odd * draw.choice((1, 2, 50)) + data[start:]


def another_value(draw: random.Random, data: bytes) -> bytes:
    """Where the file is JSON or JSON lines: another value, a lost key, a key twice."""
    try:
        lines, content = None, json.loads(data)
    except ValueError:
        lines = data.splitlines()
        if not lines:
            return b"[]"
        place = draw.randrange(len(lines))
        try:
            content = json.loads(lines[place])
        except ValueError:
            return odd_characters(draw, data)
    changed = json.dumps(_changed(draw, content)).encode()
    if lines is None:
        return changed
    lines[place] = changed
    return b"\n".join(lines)


def deep(draw: random.Random, data: bytes) -> bytes:
    pair = draw.choice((b"[]", b"{}"))
    if pair == b"{}":
        return b'{"a":' * 100_000 + b"1" + b"}" * 100_000
    return b"[" * 100_000 + b"]" * 100_000


def a_web_page(draw: random.Random, data: bytes) -> bytes:
    return b"<!DOCTYPE html><html><head><title>404 Not Found</title></head></html>\n"


def a_pointer(draw: random.Random, data: bytes) -> bytes:
    return b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12\n"


def packed(draw: random.Random, data: bytes) -> bytes:
    if draw.random() < 0.6:
        return gzip.compress(data, mtime=0)
    out = BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        file.writestr("a", data)
    return out.getvalue()


def long_lines(draw: random.Random, data: bytes) -> bytes:
    start = draw.randrange(len(data) + 1)
    return data[:start] + draw.choice((b"9", b"x", b" ", b"[1,", b'"')) * 70_000 + data[start:]


DAMAGES: tuple[Damage, ...] = (
    cut, empty, zeros, flipped_bits, noise, lost_bytes, rubbish, another_encoding, line_ends,
    moved_lines, odd_characters, another_value, another_value, another_value, deep, a_web_page,
    a_pointer, packed, long_lines,
)  # fmt: skip


def damage(draw: random.Random, path: Path) -> str:
    """Damage of one kind to a file, or something else in its place; returns the kind."""
    if draw.random() < 0.04:
        path.unlink()
        kind = draw.choice(("gone", "folder", "broken link", "link to itself"))
        if kind == "folder":
            path.mkdir()
        elif kind != "gone":
            path.symlink_to("nowhere" if kind == "broken link" else path.name)
        return kind
    kind = draw.choice(DAMAGES)
    path.write_bytes(kind(draw, path.read_bytes()))
    return kind.__name__


def _changed(draw: random.Random, content: Any) -> Any:
    """The same tree with one change somewhere."""
    if isinstance(content, dict) and content and draw.random() < 0.85:
        key = draw.choice(list(content))
        match draw.randrange(6):
            case 0:
                return {name: value for name, value in content.items() if name != key}
            case 1:
                return {name + "s" if name == key else name: v for name, v in content.items()}
        return content | {key: _changed(draw, content[key])}
    if isinstance(content, list) and content and draw.random() < 0.85:
        place = draw.randrange(len(content))
        rest = content[place + 1 :]
        match draw.randrange(6):
            case 0:
                return content[:place] + rest
            case 1:
                return content[: place + 1] + content[place:]
        return [*content[:place], _changed(draw, content[place]), *rest]
    return draw.choice(_VALUES)
