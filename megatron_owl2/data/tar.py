"""Plain ustar members as bytes: the part of the tar format that shards use, checked strictly.

The tarfile module takes a damaged header for the end of the archive and stops without an error.
"""

from megatron_owl2.data.records import BadSampleError

BLOCK = 512


def pack_member(name: str, data: bytes) -> bytes:
    """Header, data and padding of one member with modification time 0."""
    header_name = name.encode()
    if len(header_name) > 100 or len(data) >= 8**11:
        raise BadSampleError(f"member {name!r} of {len(data)} bytes does not fit a ustar header")
    start = header_name.ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2
    start += b"%011o\0" % len(data) + b"00000000000\0"
    end = b"0" + bytes(100) + b"ustar\x0000" + bytes(64) + b"0000000\0" * 2 + bytes(167)
    checksum = sum(start) + 8 * ord(" ") + sum(end)
    return start + b"%06o\0 " % checksum + end + data + bytes(padding(len(data)))


def padding(size: int) -> int:
    """Zero bytes after `size` bytes of data up to the next block."""
    return -size % BLOCK


def parse_header(header: bytes) -> tuple[str, int]:
    """Name and data size of a member from its block of 512 bytes.

    Raises BadSampleError if the checksum is wrong or the member is not a plain file with a plain
    header.
    """
    if len(header) != BLOCK:
        raise BadSampleError("tar header is cut")
    try:
        checksum = int(header[148:156].strip(b"\0 "), 8)
        size = int(header[124:136].strip(b"\0 "), 8)
        name = _text(header[:100])
        folder = _text(header[345:500]) if header[257:262] == b"ustar" else ""
    except ValueError:
        raise BadSampleError("damaged tar header") from None
    if sum(header) - sum(header[148:156]) + 8 * ord(" ") != checksum or size < 0:
        raise BadSampleError("damaged tar header (checksum)")
    if header[156:157] not in (b"0", b"\0"):
        raise BadSampleError(
            f"member {name!r} is not a plain ustar file (type {header[156:157]!r}); write shards "
            "with short names and webdataset.ShardWriter(mtime=0)"
        )
    return (f"{folder}/{name}" if folder else name), size


def split_name(name: str) -> tuple[str, str]:
    """Key and extension as webdataset cuts them: at the first dot of the base name."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


def unpack_sample(data: bytes) -> tuple[str, dict[str, bytes]]:
    """Key and parts (extension to bytes) of the members of one sample.

    Raises BadSampleError if a header is damaged or a member belongs to another sample.
    """
    members, sample_key, position = {}, None, 0
    while position < len(data):
        name, size = parse_header(data[position : position + BLOCK])
        key, extension = split_name(name)
        position += BLOCK
        if position + size > len(data):
            raise BadSampleError(f"member {name!r} reaches beyond its sample")
        if extension in members or key != (sample_key or key):
            raise BadSampleError(f"member {name!r} does not belong to sample {sample_key!r}")
        members[extension] = data[position : position + size]
        sample_key = key
        position += size + padding(size)
    return sample_key, members


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode()
