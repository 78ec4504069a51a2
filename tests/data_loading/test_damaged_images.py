"""Damage of images: metadata may be damaged, pixels may not; what is refused is named the same way
in every run."""

import io
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_data import encoded, make_image

from megatron_owl2.data.image_files import without_metadata
from megatron_owl2.data.images import decode, image_size
from megatron_owl2.errors import BadSampleError

IMAGE = make_image(3, 160, 120)
JPEGS = {
    "baseline": encoded(IMAGE, quality=90),
    "progressive": encoded(IMAGE, quality=90, progressive=True),
    "restarts": encoded(IMAGE, quality=90, restart_marker_rows=1),
    "grey": encoded(IMAGE.convert("L"), quality=90),
    "CMYK": encoded(IMAGE.convert("CMYK"), quality=90),
}


def segment(marker: int, payload: bytes) -> bytes:
    return bytes([0xFF, marker]) + (2 + len(payload)).to_bytes(2) + payload


def before(marker: int, more: bytes, data: bytes) -> bytes:
    place = data.index(bytes([0xFF, marker]))
    return data[:place] + more + data[place:]


QUANTISATION, START_OF_SCAN = 0xDB, 0xDA
ICC = b"ICC_PROFILE\0"
REMARKS = {
    "zeros between segments": lambda data: before(QUANTISATION, bytes(4), data),
    "text between segments": lambda data: before(QUANTISATION, b"Adobe, or so", data),
    "fill bytes": lambda data: before(QUANTISATION, b"\xff" * 9, data),
    "a stuffed zero": lambda data: before(QUANTISATION, b"\xff\0ab\xff\0", data),
    "a lone marker in rubbish": lambda data: before(QUANTISATION, b"ab\xff\x01c\xff\xd3d", data),
    "rubbish before the scan": lambda data: before(START_OF_SCAN, b"rubbish", data),
    "a profile of a wrong number": lambda data: before(
        QUANTISATION, segment(0xE2, ICC + b"\2\1profile"), data
    ),
    "two profiles": lambda data: before(
        QUANTISATION, segment(0xE2, ICC + b"\1\1a") + segment(0xE2, ICC + b"\1\1b"), data
    ),
    "EXIF longer than it says": lambda data: before(
        QUANTISATION, segment(0xE1, b"Exif\0\0MM") + b"\0*\0\0\0\x08", data
    ),
    "JFIF of version 2": lambda data: (
        data[:2] + segment(0xE0, b"JFIF\0\2\1\0\0\1\0\1\0\0") + without_jfif(data)
    ),
    "rubbish in front of a comment": lambda data: before(
        START_OF_SCAN, b"\1\2\3" + segment(0xFE, b"a comment"), data
    ),
    "data behind the end": lambda data: data + b"MPF\xff\xe2\xff\xda\xff" + data[:999],
}


def without_jfif(data: bytes) -> bytes:
    start = data.find(b"\xff\xe0")
    if start < 0:
        return data[2:]
    return data[2:start] + data[start + 2 + int.from_bytes(data[start + 2 : start + 4]) :]


@pytest.mark.parametrize("name", JPEGS)
@pytest.mark.parametrize("remark", REMARKS)
def test_remarks_on_metadata_of_a_jpeg_are_no_damage(name, remark):
    remarked = REMARKS[remark](JPEGS[name])
    assert remarked != JPEGS[name]
    assert torch.equal(decode(remarked), decode(JPEGS[name]))
    assert image_size(remarked) == (160, 120)


def test_remarks_between_the_scans_of_a_jpeg_are_no_damage():
    data = JPEGS["progressive"]
    second = data.index(b"\xff\xda", data.index(b"\xff\xda") + 2)
    tables = data.rindex(b"\xff\xc4", 0, second)  # of the second scan
    notes = segment(0xE2, ICC + b"\2\1profile") + b"rubbish" + segment(0xFE, b"notes") + bytes(3)
    assert torch.equal(decode(data[:tables] + notes + data[tables:]), decode(data))


TABLE_SEGMENTS = [0xC4, 0xDB]  # Huffman and quantisation tables


@pytest.mark.parametrize("name", JPEGS)
@pytest.mark.parametrize("marker", TABLE_SEGMENTS)
def test_bytes_moved_out_of_a_table_are_damage(name, marker):
    """libjpeg has no other remark on others that were put into it, but decodes other pixels."""
    data = JPEGS[name]
    start = data.index(bytes([0xFF, marker]))
    end = start + 2 + int.from_bytes(data[start + 2 : start + 4])
    for place in range(start + 21, end - 3):
        with pytest.raises(BadSampleError, match="damaged"):
            decode(data[:place] + data[start + 21 : start + 24] + data[place:])


@pytest.mark.parametrize("name", JPEGS)
def test_padding_behind_any_segment_is_no_damage(name):
    data = JPEGS[name]
    position, whole = 2, decode(data)
    while data[position + 1] != 0xDA:
        position += 2 + int.from_bytes(data[position + 2 : position + 4])
        for padding in (bytes(4), b"\xff\xff", b"\0\xff\0\0"):
            assert torch.equal(decode(data[:position] + padding + data[position:]), whole)


def test_a_scan_without_its_beginning_is_damage():
    data = JPEGS["progressive"]
    second = data.index(b"\xff\xda", data.index(b"\xff\xda") + 2)
    with pytest.raises(BadSampleError, match="damaged"):
        decode(data[:second] + data[second + 10 :])


@pytest.mark.parametrize("transform", [1, 2, 7, 255])
@pytest.mark.parametrize("name", ["baseline", "CMYK"])
def test_colours_are_those_that_libjpeg_assumes(name, transform):
    """For a transform that the marker of Adobe should not have."""
    data = JPEGS[name][:2] + segment(0xEE, b"Adobe\0d\0\0\0\0" + bytes([transform]))
    if name == "CMYK":  # its own marker would come later
        own = JPEGS[name].index(b"\xff\xee")
        rest = JPEGS[name][2:own] + JPEGS[name][own + 16 :]
    else:
        rest = without_jfif(JPEGS[name])
    with Image.open(io.BytesIO(data + rest)) as image:
        expected = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    assert torch.equal(decode(data + rest), expected)


def scan_of(data: bytes) -> int:
    """The position of the first scan's data."""
    start = data.index(b"\xff\xda")
    return start + 2 + int.from_bytes(data[start + 2 : start + 4])


def noisy(data: bytes, seed: int) -> bytes:
    start = scan_of(data) + 40
    noise = np.random.default_rng(seed).integers(0, 255, 300, dtype=np.uint8).tobytes()
    return data[:start] + noise + data[start + 300 :]


DAMAGE = {
    "half": lambda data: data[: len(data) // 2],
    "no end": lambda data: data[:-2],
    "the end of a short scan": lambda data: data[:-300] + b"\xff\xd9",
    "no scan": lambda data: data[: data.index(b"\xff\xda")] + b"\xff\xd9",
    "noise": lambda data: noisy(data, 0),
    "other noise": lambda data: noisy(data, 1),
    "a lost piece": lambda data: data[: scan_of(data) + 50] + data[scan_of(data) + 150 :],
    "more data than pixels": lambda data: data[:-2] + b"0123456789abcdef" + data[-2:],
    "a marker in the scan": lambda data: (
        data[: scan_of(data) + 90] + segment(0xFE, b"comment") + data[scan_of(data) + 90 :]
    ),
    "another start": lambda data: before(QUANTISATION, b"\xff\xd8", data),
}


@pytest.mark.parametrize("name", JPEGS)
@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("remark", [None, "zeros between segments"])
def test_damage_of_a_scan_is_found_also_below_remarks(name, damage, remark):
    data = DAMAGE[damage](JPEGS[name])
    if remark is not None:
        data = REMARKS[remark](data)
    with pytest.raises(
        BadSampleError, match="cannot be decoded: its JPEG (data are|header is) damaged"
    ):
        decode(data)


def test_restart_markers_are_counted():
    data = JPEGS["restarts"]
    place = data.index(b"\xff\xd2", scan_of(data))
    with pytest.raises(BadSampleError, match="damaged"):
        decode(data[:place] + data[place + 2 :])


def test_a_jpeg_of_unknown_subsampling_is_pillows():
    data = encoded(IMAGE.convert("CMYK"), quality=90, subsampling=2)
    with Image.open(io.BytesIO(data)) as image:
        expected = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    assert torch.equal(decode(data), expected) and image_size(data) == (160, 120)
    with pytest.raises(BadSampleError, match="its JPEG data are damaged or cut short"):
        decode(data[:-600])


def test_a_copy_without_metadata_has_the_same_scans():
    for data in JPEGS.values():
        copy = without_metadata(data)
        assert copy[scan_of(copy) :] == data[scan_of(data) :] and len(copy) <= len(data)
        assert torch.equal(decode(copy), decode(data))


def chunk(name: bytes, payload: bytes, wrong: bool = False) -> bytes:
    checksum = zlib.crc32(name + payload) ^ wrong
    return len(payload).to_bytes(4) + name + payload + checksum.to_bytes(4)


PNG = encoded(IMAGE, "PNG")
PALETTE = encoded(IMAGE.quantize(40), "PNG", transparency=3)


@pytest.mark.parametrize("data", [PNG, PALETTE], ids=["RGB", "palette"])
@pytest.mark.parametrize("name", [b"tEXt", b"zTXt", b"iTXt", b"iCCP", b"pHYs", b"eXIf", b"teSt"])
def test_damage_of_metadata_of_a_png_is_no_damage(data, name):
    for wrong in (chunk(name, b"a\0b", wrong=True), chunk(name, b"")):
        for place in (33, data.index(b"IDAT") - 4, len(data) - 12):
            assert torch.equal(decode(data[:place] + wrong + data[place:]), decode(data))
            assert image_size(data[:place] + wrong + data[place:]) == (160, 120)


def test_every_byte_of_a_png_is_checked():
    """Pillow does not see every change: not behind the last row that it needs."""
    data = encoded(make_image(1, 20, 16), "PNG")
    start, end = data.index(b"IDAT"), len(data) - 12
    for place in range(start, end):
        changed = bytearray(data)
        changed[place] ^= 0x15
        with pytest.raises(BadSampleError, match="its PNG (data are|header is) damaged"):
            decode(bytes(changed))


def test_damage_of_a_palette_is_found():
    place = PALETTE.index(b"PLTE") + 9
    with pytest.raises(BadSampleError, match="its PNG header is damaged"):
        decode(PALETTE[:place] + b"\x99" + PALETTE[place + 1 :])


OTHERS = [
    ("GIF", {}),
    ("BMP", {}),
    ("WEBP", {}),
    ("WEBP", {"lossless": True}),
    ("PNG", {}),
    ("TIFF", {}),
    ("TIFF", {"compression": "tiff_lzw"}),
    ("TIFF", {"compression": "tiff_adobe_deflate"}),
]


@pytest.mark.parametrize("kind, options", OTHERS)
def test_a_part_of_an_image_is_refused(kind, options):
    data = encoded(IMAGE.quantize(64) if kind == "GIF" else IMAGE, kind, **options)
    assert torch.equal(decode(data + b"rubbish"), decode(data))
    for part in (0.9, 0.5, 0.2):
        with pytest.raises(BadSampleError, match="its .* damaged or (cut|of a variant)"):
            decode(data[: int(len(data) * part)])


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_damage_of_exif_is_no_damage(kind):
    exif = Image.Exif()
    exif[0x010E] = "a description of this image"
    exif[0x011A] = 72.0  # pixels per inch, which Pillow looks for
    data = bytearray(encoded(IMAGE, kind, exif=exif))
    start = data.index(b"II*\0", 2) if b"II*\0" in data else data.index(b"MM\0*", 2)
    whole = decode(bytes(data))
    data[start + 8 : start + 30] = b"\xff" * 22
    if kind == "PNG":
        length = int.from_bytes(data[start - 8 : start - 4])
        data[start + length : start + length + 4] = zlib.crc32(
            data[start - 4 : start + length]
        ).to_bytes(4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(decode(bytes(data)), whole)


def test_remarks_of_pillow_are_no_errors():
    """Where warnings are errors it has more of them."""
    data = bytearray(encoded(IMAGE, "TIFF", dpi=(72, 72)))
    entry = data.index((296).to_bytes(2, "little") + b"\3\0")  # the unit of the resolution
    data[entry + 4] = 2  # units, not one
    with pytest.warns(UserWarning, match="had too many entries"):
        remarked = decode(bytes(data))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for image in (decode(bytes(data)), remarked):
            assert torch.equal(image, decode(encoded(IMAGE, "PNG")))


MP4 = b"\0\0\0\x20ftyp"
KINDS = [
    (b"", "the file is empty"),
    (bytes(999), "zeros alone"),
    (MP4 + b"avif\0\0\0\0", "AVIF is not read; convert it to JPEG or PNG"),
    (MP4 + b"avis\0\0\0\0", "AVIF is not read"),
    (MP4 + b"heic\0\0\0\0", "HEIC is not read; convert it to JPEG or PNG"),
    (MP4 + b"mif1\0\0\0\0", "HEIC is not read"),
    (MP4 + b"isom\0\0\0\0", "it is a video"),
    (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000 is not read"),
    (b"\xff\x4f\xff\x51", "JPEG 2000 is not read"),
    (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL is not read"),
    (b"\xff\x0a\0", "JPEG XL is not read"),
    (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "SVG is not read"),
    (b'<?xml version="1.0"?>\n<!-- drawn -->\n<svg/>', "SVG is not read"),
    (b"%PDF-1.7", "PDF is not read"),
    (b"8BPS\0\1", "Photoshop is not read"),
    (b"\n<!DOCTYPE html><html>404</html>", "it is an HTML page, left by a failed download"),
    (b"\xef\xbb\xbf<html lang='en'>", "it is an HTML page"),
    (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "it is an XML text"),
    (b'{"error": "not found"}', "it is a JSON text"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
    (b"PK\x03\x04", "it is compressed or an archive"),
    (b"\x1f\x8b\x08", "it is compressed or an archive"),
    (b"hello", "it is not an image file of a known kind"),
    (b"\x89PNG\r\n\x1a\n" + bytes(40), "its PNG header is damaged"),
    (b"RIFF\x10\0\0\0WEBPVP8 ", "its WebP header is damaged"),
    (b"GIF89a", "its GIF header is damaged"),
    (b"BM" + bytes(60), "its BMP header is damaged"),
    (b"II*\0", "its TIFF header is damaged"),
    (b"\xff\xd8\xff" + b"nothing" * 9, "its JPEG header is damaged"),
]


@pytest.mark.parametrize("data, words", KINDS, ids=[words for _, words in KINDS])
def test_a_refusal_names_the_kind_of_file(data, words):
    for read, failure in (
        (decode, "image cannot be decoded: "),
        (image_size, "image header cannot be read: "),
    ):
        said = []
        for _ in range(2):
            with pytest.raises(BadSampleError) as refusal:
                read(bytes(data))
            said.append(str(refusal.value))
        assert said[0] == said[1] and said[0].startswith(failure) and words in said[0]
        assert not any(word in said[0] for word in ("object", "0x7", "PIL", "BytesIO", "()"))
