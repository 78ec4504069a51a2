"""Image files by their bytes: their kind, and copies without what no pixel depends on.

Needs the standard library alone, since exported directories carry this file.
"""

import re
import zlib
from collections.abc import Iterator

MAX_SCANS = 100  # of a JPEG; every one decodes the whole image again

# By the first bytes. Pillow's names of the formats are these in capitals.
_READ = {
    "JPEG": rb"\xff\xd8\xff",
    "PNG": rb"\x89PNG\r\n\x1a\n",
    "WebP": rb"RIFF....WEBP",
    "GIF": rb"GIF8[79]a",
    "TIFF": rb"II[*+]\0|MM\0[*+]",
    "BMP": rb"BM",
}
_UNREAD = {
    "AVIF": rb"....ftypavi[fs]",
    "HEIC": rb"....ftyp(?:he[iv]|mif|msf)",
    "JPEG 2000": rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51",
    "JPEG XL": rb"\0\0\0\x0cJXL |\xff\x0a",
    "SVG": rb"(?i)\s*(?:<\?xml[^>]*>\s*)?(?:<!--.*?-->\s*|<!doctype svg[^>]*>\s*)*<svg\b",
    "PDF": rb"%PDF",
    "PostScript": rb"%!PS|\xc5\xd0\xd3\xc6",
    "Photoshop": rb"8BPS",
    "an icon": rb"\0\0\x01\0|icns",
    "PPM": rb"P[1-7][\s#]",
    "QOI": rb"qoif",
    "DDS": rb"DDS ",
    "OpenEXR": rb"\x76\x2f\x31\x01",
}
_NO_IMAGE = {
    "the file is empty": rb"\Z",
    "it holds zeros alone, left by a download that was cut short": rb"\0+\Z",
    "it is an HTML page, left by a failed download": rb"(?i)\s*<(?:!doctype )?(?:html|head|body)",
    "it is a pointer of Git LFS; fetch the file with `git lfs pull`": rb"version https://git-lfs",
    "it is an XML text": rb"\s*<\?xml",
    "it is a JSON text, left by a failed download": rb'\s*[{\[]\s*["{}\[\]]',
    "it is a video": rb"....ftyp|\x1aE\xdf\xa3|RIFF....AVI ",
    "it is compressed or an archive": rb"\x1f\x8b|PK\x03\x04|\(\xb5/\xfd|BZh|7z\xbc\xaf|\xfd7zXZ",
}

_MARKER = re.compile(rb"\xff+([^\0\xff])", re.DOTALL)  # libjpeg skips whatever is before one
_END_OF_SCAN = re.compile(rb"\xff+[^\0\xff\xd0-\xd7]", re.DOTALL)
_JFIF = b"\xff\xe0\0\x10JFIF\0\1\1\0\0\1\0\1\0\0"
_PNG_PIXELS = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"}


def kind(data: bytes) -> str | None:
    """The kind of an image file among those that are read, or None."""
    return _first_match(_READ, data)


def why_not_read(data: bytes) -> str:
    """The reason why a file of none of these kinds is not read."""
    if name := _first_match(_UNREAD, data):
        return f"{name} is not read; convert it to JPEG or PNG"
    return _first_match(_NO_IMAGE, data) or "it is not an image file of a known kind"


def without_metadata(data: bytes) -> bytes:
    """A copy of a JPEG or PNG file without what no pixel depends on; other files as they are.

    What a strict decoder says of the copy is about pixels: it holds frame, tables and scans of a
    JPEG byte for byte, or the PNG chunks of pixels, palette and transparency.
    """
    if kind(data) == "JPEG":
        return _jpeg_without_metadata(data)
    if kind(data) == "PNG":
        chunks = [data[start:end] for name, start, end in _png_chunks(data) if name in _PNG_PIXELS]
        return data[:8] + b"".join(chunks)
    return data


def has_many_scans(data: bytes) -> bool:
    """Whether a file is a JPEG of more than MAX_SCANS scans."""
    # No other bytes of a JPEG's scans look like the start of one.
    return kind(data) == "JPEG" and (
        _may_have_many_scans(data) and data.count(b"\xff\xda") > MAX_SCANS
    )


def has_sound_chunks(data: bytes) -> bool:
    """Whether the checksums of the chunks that a PNG's pixels depend on are right; True of others.

    Pillow leaves those of the pixels alone, and the end of the compressed data often as well.
    """
    return kind(data) != "PNG" or all(
        zlib.crc32(memoryview(data)[start + 4 : end - 4]) == int.from_bytes(data[end - 4 : end])
        for name, start, end in _png_chunks(data)
        if name in _PNG_PIXELS and end <= len(data)
    )


def _first_match(patterns: dict[str, bytes], data: bytes) -> str | None:
    head = data[:1024].removeprefix(b"\xef\xbb\xbf")
    found = (name for name, pattern in patterns.items() if re.match(pattern, head, re.DOTALL))
    return next(found, None)


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Name, start and end of every chunk of a PNG file; the last may lie beyond the file's end."""
    start = 8
    while start + 8 <= len(data):
        end = start + 12 + int.from_bytes(data[start : start + 4])
        yield data[start + 4 : start + 8], start, end
        start = end


def _may_have_many_scans(data: bytes) -> bool:
    """Whether a decoder reads on after the first scan of a JPEG: it is progressive, or its colours
    come one by one. To look for scans in all of the data costs more than to read the header."""
    components, position = 0, 2
    try:
        while data[position] == 0xFF:
            marker, start = data[position + 1], position + 4
            if marker == 0xDA:  # SOS
                return data[start] < components
            if marker in (0xC0, 0xC1):  # SOF of a sequential Huffman-coded image
                components = data[start + 5]
            elif 0xC2 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # another SOF
                return True
            position += 2 + int.from_bytes(data[position + 2 : start])
    except IndexError:
        pass
    return True  # not as most programs write it


def _may_have_lost_its_end(segment: bytes, jfif: bool) -> bool:
    """Whether pixels depend on a segment of a JPEG whose own bytes do not show that it is whole."""
    if segment[1] == 0xEE:  # the colour transform, but in a file of JFIF
        return not jfif and not re.match(rb"Adobe\0[de].{4}[\0-\2]", segment[4:], re.DOTALL)
    if segment[1] != 0xC4:
        return segment[1] == 0xDB
    tables = segment[4:]
    while tables:  # Huffman tables have no symbol twice
        symbols, tables = tables[17 : 17 + sum(tables[1:17])], tables[17 + sum(tables[1:17]) :]
        if len(set(symbols)) < len(symbols):
            return True
    return False


def _jpeg_without_metadata(data: bytes) -> bytes:
    """A JPEG as libjpeg finds its way through it, without segments and bytes that it skips.

    Of libjpeg's warnings (JWRN_* of jerror.h) these are about what is left out or made regular:
    EXTRANEOUS_DATA between two segments, BOGUS_ICC, JFIF_MAJOR and ADOBE_XFORM, for which libjpeg
    assumes what stands here then. The others are about scans and stay: HIT_MARKER, HUFF_BAD_CODE,
    ARITH_BAD_CODE, MUST_RESYNC, NOT_SEQUENTIAL, BOGUS_PROGRESSION, JPEG_EOF and EXTRANEOUS_DATA
    behind the last unit of a scan. TOO_MUCH_DATA is of the caller.

    Bytes other than padding stay behind tables and a colour transform of which they may be the end,
    moved out by others that do not belong in there.
    """
    parts, position = [b"\xff\xd8"], 2
    doubtful = scans = jfif = False
    adobe = components = 0
    while match := _MARKER.search(data, position):
        marker, start = match[1][0], match.end()
        skipped = data[position : match.start()]
        if doubtful and skipped.strip(b"\0\xff"):
            parts.append(skipped)
        if marker in (0xD8, 0xD9):  # a second start is libjpeg's to refuse
            parts.append(bytes([0xFF, marker]))
            break
        if marker == 0x01 or 0xD0 <= marker <= 0xD7:  # markers alone
            position = start
            continue
        position = start + max(2, int.from_bytes(data[start : start + 2]))
        segment = b"\xff" + data[start - 1 : position]
        # What follows a table between two scans may be a scan that has lost its beginning.
        doubtful = (scans and marker < 0xE0) or _may_have_lost_its_end(segment, jfif)
        if segment[4:9] == b"JFIF\0" and marker == 0xE0 and len(segment) >= 18:
            segment, jfif = _JFIF, True
        elif segment[4:9] == b"Adobe" and marker == 0xEE and len(segment) >= 16:
            adobe = len(parts)
        elif marker == 0xFE or 0xE0 <= marker <= 0xEF:  # a comment or of an application
            continue
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # SOF
            components = segment[9] if len(segment) > 9 else 0
        elif marker == 0xDA:  # SOS
            scans, end = True, _END_OF_SCAN.search(data, position)
            scan, position = position, end.start() if end else len(data)
            segment += data[scan:position]
        parts.append(segment)
    if adobe and parts[adobe][15] and components in (3, 4):  # YCbCr or YCCK
        parts[adobe] = parts[adobe][:15] + bytes([components - 2]) + parts[adobe][16:]
    return b"".join(parts)
