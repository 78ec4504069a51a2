"""Tar members as shards use them, checked strictly: to bytes and back.

The tarfile module takes a damaged header for the end of the archive and stops without an error.
Written are plain ustar members; read are also the extended headers (PAX, GNU long names) that
webdataset, img2dataset and tar itself write before a member.
"""

import re
import struct
from collections.abc import Callable, Iterator
from zlib import adler32

from megatron_owl2.errors import BadSampleError
from megatron_owl2.utils.files import is_hidden

BLOCK = 512
END = bytes(2 * BLOCK)  # closes an archive

_FILE = (b"0", b"\0", b"7")
# Links, devices, folders, global headers; of GNU tar also lists of folders and labels.
_NO_FILE = (b"1", b"2", b"3", b"4", b"5", b"6", b"g", b"D", b"V")
_PAX, _LONG_NAME, _LONG_LINK = b"x", b"L", b"K"
_MAX_EXTENDED = 2**20  # bytes of an extended header; a larger one is damage
_TRAILER = b"0" + bytes(100) + b"ustar\x0000" + bytes(64) + b"0000000\0" * 2 + bytes(167)
_CHECKSUM_BASE = sum(_TRAILER) + 8 * ord(" ")
_FIELDS = struct.Struct("124x 12s 12x 8s c 355x")  # size, checksum, type
_ADLER = 65521
_PAX_RECORD = re.compile(rb"(\d{1,7}) ([^=\n]*)=")


def pack_member(name: str, data: bytes) -> bytes:
    """Header, data and padding of one member with modification time 0."""
    header_name = name.encode()
    if len(header_name) > 100 or len(data) >= 8**11:
        raise BadSampleError(f"member {name!r} of {len(data)} bytes does not fit a ustar header")
    start = b"%b0000644\x000000000\x000000000\x00%011o\x0000000000000\x00" % (
        header_name.ljust(100, b"\0"),
        len(data),
    )
    checksum = sum(start) + _CHECKSUM_BASE
    return b"".join((start, b"%06o\0 " % checksum, _TRAILER, data, bytes(padding(len(data)))))


def padding(size: int) -> int:
    """Zero bytes after `size` bytes of data up to the next block."""
    return -size % BLOCK


def split_name(name: str) -> tuple[str, str]:
    """Key and extension as webdataset cuts them: at the first dot of the base name."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


def is_member(name: str) -> bool:
    """Whether a file of an archive is a member of a sample.

    Hidden files, names without an extension, and `__NAME__`, which webdataset passes over as well,
    stand between the members without being one.
    """
    base = name.rpartition("/")[2]
    stem, dot, extension = base.partition(".")
    if not (stem and dot and extension):
        return False
    return not (is_hidden(name) or (base.startswith("__") and base.endswith("__")))


def members(
    read: Callable[[int, int], bytes | memoryview], position: int, stop: int
) -> Iterator[tuple[int, str, int, int]]:
    """Members of samples between two byte offsets of an archive: entries() of such names."""
    for start, name, data, size in entries(read, position, stop):
        if name is not None and is_member(name):
            yield start, name, data, size


def entries(
    read: Callable[[int, int], bytes | memoryview], position: int, stop: int
) -> Iterator[tuple[int, str | None, int, int]]:
    """Entries of an archive between two byte offsets, until `stop` or the end marker.

    `read(start, stop)` gives bytes of the archive. Yields (offset of the first header of a file,
    name, offset of its data, size). What is no file (directories, links, global headers) has None
    for a name. Raises BadSampleError if a header is damaged, or a member is of an unknown type or
    reaches beyond `stop`.
    """
    first, long_name, long_size = position, None, None
    while position < stop:
        header = bytes(read(position, position + BLOCK))
        if header == END[:BLOCK] and first == position:
            return
        size, kind = _parse_header(header)
        data = position + BLOCK
        if kind in _FILE and long_size is not None:
            size = long_size
        position = data + size + padding(size)
        if position > stop:
            raise BadSampleError(f"member {long_name or _name(header)!r} is cut")
        if kind in _FILE:
            yield first, _name(header) if long_name is None else long_name, data, size
        elif kind in (_PAX, _LONG_NAME):
            if size > _MAX_EXTENDED:
                raise BadSampleError(f"damaged tar header (extended header of {size} bytes)")
            body = bytes(read(data, data + size))
            if kind == _PAX:
                long_name, long_size = _parse_pax(body)
            else:
                long_name = _text(body)
            continue
        elif kind == _LONG_LINK:
            continue
        elif kind in _NO_FILE:
            yield first, None, data, size
        else:
            raise BadSampleError(f"member {_name(header)!r} is of the unknown type {kind!r}")
        first, long_name, long_size = position, None, None


def unpack_sample(data: bytes) -> tuple[str, dict[str, bytes]]:
    """Key and contents (extension to bytes) of the members of one sample.

    Raises BadSampleError if a header is damaged or a member belongs to another sample.
    """
    contents: dict[str, bytes] = {}
    sample_key = None
    for _, name, start, size in members(lambda a, b: data[a:b], 0, len(data)):
        key, extension = split_name(name)
        if extension in contents or key != (sample_key or key):
            raise BadSampleError(f"member {name!r} does not belong to sample {sample_key!r}")
        contents[extension] = data[start : start + size]
        sample_key = key
    if sample_key is None:
        raise BadSampleError("no member")
    return sample_key, contents


def _parse_header(header: bytes) -> tuple[int, bytes]:
    """Data size and type of a member from its block of 512 bytes."""
    if len(header) != BLOCK:
        raise BadSampleError("tar header is cut")
    size, stored, kind = _FIELDS.unpack(header)
    try:
        checksum = int(stored.strip(b"\0 "), 8)
        size = int(size.strip(b"\0 "), 8)
    except ValueError:
        raise BadSampleError("damaged tar header") from None
    # The low half of Adler-32 is 1 + the sum of the bytes, modulo 65521, in C.
    others = (adler32(header) & 0xFFFF) - (adler32(stored) & 0xFFFF)
    if (others + 8 * ord(" ") - checksum) % _ADLER or size < 0:
        raise BadSampleError("damaged tar header (checksum)")
    return size, kind


def _name(header: bytes) -> str:
    name = _text(header[:100])
    # Old GNU headers ("ustar  ") keep times where ustar keeps the folder.
    if header[345] and header[257:263] == b"ustar\0":
        name = f"{_text(header[345:500])}/{name}"
    return name


def _parse_pax(body: bytes) -> tuple[str | None, int | None]:
    """The `path` and `size` of an extended header: records "LENGTH KEY=VALUE\\n"."""
    path, size, position = None, None, 0
    try:
        while position < len(body):
            record = _PAX_RECORD.match(body, position)
            if record is None:
                raise ValueError
            start, end = record.end(), position + int(record[1])
            if not start < end <= len(body) or body[end - 1 : end] != b"\n":
                raise ValueError
            if record[2] == b"path":
                path = _text(body[start : end - 1])
            elif record[2] == b"size":
                if not body[start : end - 1].isdigit():
                    raise ValueError
                size = int(body[start : end - 1])
            position = end
    except ValueError:
        raise BadSampleError("damaged tar header (extended header)") from None
    return path, size


def _text(field: bytes) -> str:
    # A long name is cut here, perhaps inside a character; its extended header has all of it.
    return field.split(b"\0", 1)[0].decode(errors="backslashreplace")
