"""Sample filters of preprocessing, and the stored form of images."""

import io
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from preprocess_run import job, keys, pair, records, report, succeeded, tool
from tiny_data import encoded, make_image

from data_prep.filters import Filters
from data_prep.reencode import Reencoding
from data_prep.splits import Skipped
from megatron_owl2.data.images import decode, image_size
from megatron_owl2.data.shards.records import Record, Turn
from megatron_owl2.errors import BadSampleError, PreprocessError


def sized(key: str, width: int, height: int, **more) -> Record:
    return pair(key, encoded(make_image(1, width, height), "PNG"), **more)


def broken(image: bytes) -> bytes:
    return image[: len(image) // 2]


def skipped(folder) -> dict:
    return report(folder)["skipped"]


def test_every_filter_counts_by_its_own_reason(tmp_path):
    text = Record("text", caption="plain text")
    talk = Record("talk", images=(encoded(make_image(2)),), turns=(Turn("a" * 99, "b"),))
    good = [sized("exact", 40, 20), sized("tall", 20, 40), text, talk]
    content = [
        *good,
        sized("small", 40, 19),
        sized("long", 41, 20),
        sized("short-text", 40, 20, caption="four"),
        sized("long-text", 40, 20, caption="x" * 13),
    ]
    limits = Filters(min_side=20, max_aspect=2.0, min_caption=5, max_caption=12)
    job([content], tmp_path, filters=limits)
    assert keys(tmp_path) == [record.key for record in good]
    assert skipped(tmp_path) == {
        "smaller side below 20 pixels": 1,
        "aspect ratio above 2": 1,
        "caption below 5 characters": 1,
        "caption above 12 characters": 1,
    }
    assert report(tmp_path)["examples"]["smaller side below 20 pixels"] == [
        "input0, key small: 40 x 19 pixels"
    ]


def test_scores_have_limits_on_both_sides(tmp_path):
    values = [0.1, 0.3, 0.30001, 0.5, 0.50001, 1, 0.9999, None, float("nan"), "0.4", True]
    content = [pair(str(i), clip=value) for i, value in enumerate(values)] + [pair("without")]
    for record in content[8:9]:
        record.metadata.clear()  # what readers do with NaN
    job(
        [content[:6], content[6:]],
        tmp_path,
        filters=Filters(min_score={"clip": 0.3}, max_score={"clip": 0.5}),
    )
    assert keys(tmp_path) == ["1", "2", "3"]
    assert skipped(tmp_path) == {"clip below 0.3": 1, "clip above 0.5": 3, "no score clip": 5}
    histogram = report(tmp_path)["histograms"]["score clip"]
    assert sum(histogram["read"]) == 7 and sum(histogram["kept"]) == 3
    edge = histogram["edges"].index(0.3)
    assert sum(histogram["kept"][: edge + 1]) == 0 and sum(histogram["read"][: edge + 1]) == 1


@pytest.mark.parametrize("two_readings", [False, True])
def test_a_score_that_no_record_has_is_an_error_that_names_those_there_are(tmp_path, two_readings):
    content = [[pair(f"{i}", clip=0.5, width=3, name="x", good=True)] for i in range(2)]
    limits = Filters(max_score={"watermark": 0.5})
    with pytest.raises(PreprocessError, match="'watermark'.* hold numbers are: clip, width$"):
        job(content, tmp_path, filters=limits, sample=1 if two_readings else None)
    assert not (tmp_path / "manifest.json").exists()


@pytest.mark.parametrize("two_readings", [False, True])
def test_limits_of_a_score_do_not_hide_why_no_record_could_be_read(tmp_path, two_readings):
    content = [[Skipped("no image", "row 1"), pair("page", b"<html>404</html>", clip=0.5)]]
    reasons = (
        "(?s)kept 0, skipped 2\n.*  1 x image is not .* \\(such as input0, key page: it is an HTML"
    )
    reasons += ".*\\)\n  1 x no image"
    limits = Filters(min_score={"clip": 0.3})
    with pytest.raises(PreprocessError, match=reasons):
        job(content, tmp_path, filters=limits, sample=1 if two_readings else None)
    assert not (tmp_path / "manifest.json").exists()


def test_broken_images(tmp_path):
    noise = bytearray(encoded(make_image(1, 400, 300)))
    noise[700:1500] = np.random.default_rng(0).integers(0, 255, 800, dtype=np.uint8).tobytes()
    content = [
        pair("good"),
        pair("cut", broken(encoded(make_image(1, 200, 100)))),
        pair("cut-png", broken(encoded(make_image(1, 200, 100), "PNG"))),
        pair("noise", bytes(noise)),
        pair("header", b"\xff\xd8\xff" + b"nothing" * 9),
        pair("gif", encoded(make_image(1), "GIF")),
        pair("empty", b""),
        pair("page", b"<html>404</html>"),
    ]
    job([content], tmp_path / "decoded")
    assert keys(tmp_path / "decoded") == ["good"]
    assert skipped(tmp_path / "decoded") == {
        "image cannot be decoded": 3,
        "image is not JPEG, PNG or WebP": 2,
        "image is not JPEG, PNG or WebP (--max-side or --jpeg-quality stores it as JPEG)": 1,
        "image cannot be read": 1,
    }
    job([content], tmp_path / "trusted", filters=Filters(decode=False))
    assert keys(tmp_path / "trusted") == ["good", "cut", "cut-png", "noise"]
    page = (tmp_path / "trusted/report.html").read_text()
    assert page.count("cannot be decoded") == 3 and page.count("data:image/jpeg") == 1


@pytest.mark.parametrize("two_readings", [False, True])
def test_a_broken_image_is_named_by_file_key_id_and_number(tmp_path, two_readings):
    good = encoded(make_image(1, 200, 100))
    turns = (Turn("q", "a"),)
    bad = {
        "cut": broken(good),
        "head": b"\xff\xd8\xff" + b"nothing" * 9,
        "gif": encoded(make_image(1), "GIF"),
        "small": encoded(make_image(1, 9, 9)),
    }
    content = [
        pair("good"),
        *(
            Record(key, (good, image), turns=turns, metadata={"id": key})
            for key, image in bad.items()
        ),
        Record("cut", (good,), turns=turns, metadata={"id": 7}),
        Record("odd", (good,), turns=turns, source="talk", metadata={"id": 8, "x": float("nan")}),
    ]
    limits = Filters(min_side=20)
    job([content], tmp_path, filters=limits, sample=9 if two_readings else None)
    examples = {detail for (detail,) in report(tmp_path)["examples"].values()}
    starts = (
        "input0, key cut, id 'cut', image 2 of 2: ",
        "input0, key head, id 'head', image 2 of 2: ",
        "input0, key gif, id 'gif', image 2 of 2: GIF",
        "input0, key small, id 'small', image 2 of 2: 9 x 9 pixels",
        "input0, key cut, id 7",
        "input0, key odd, id 8: ",
    )
    assert len(examples) == len(starts)
    for start in starts:
        assert any(example.startswith(start) for example in examples), (start, examples)


def test_a_broken_image_of_a_conversation_is_named_by_its_line(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images/1.jpg").write_bytes(encoded(make_image(1)))
    (tmp_path / "images/2.jpg").write_bytes(broken(encoded(make_image(1, 200, 100))))
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    entries = [
        {"id": "a", "image": "1.jpg", "conversations": turns},
        {"id": "b", "image": ["1.jpg", "2.jpg", "1.jpg"], "conversations": turns},
    ]
    path = tmp_path / "talk.jsonl"
    path.write_text("\n\n".join(map(json.dumps, entries)))
    said = succeeded(tool(path, "conversations", tmp_path / "set", "--images", tmp_path / "images"))
    assert keys(tmp_path / "set") == ["000000001"]
    assert "(such as talk.jsonl, key 000000003, id 'b', image 2 of 3: " in said


def test_reasons_name_the_kind_of_an_image_and_the_option(tmp_path):
    content = [
        *(pair(kind, encoded(make_image(1), kind)) for kind in ("GIF", "BMP", "TIFF")),
        pair("page", b"<!DOCTYPE html>404"),
        pair("avif", b"\0\0\0\x20ftypavif"),
        pair("header", b"\x89PNG\r\n\x1a\n" + bytes(99)),
        pair("good"),
    ]
    for folder in ("first", "second"):
        job([content], tmp_path / folder)
    found = report(tmp_path / "first")
    assert found["examples"] == {
        "image is not JPEG, PNG or WebP (--max-side or --jpeg-quality stores it as JPEG)": [
            "input0, key GIF: GIF",
            "input0, key BMP: BMP",
            "input0, key TIFF: TIFF",
        ],
        "image is not JPEG, PNG or WebP": [
            "input0, key page: it is an HTML page, left by a failed download",
            "input0, key avif: AVIF is not read; convert it to JPEG or PNG",
        ],
        "image cannot be read": [
            "input0, key header: image header cannot be read: its PNG header is damaged or of a "
            "variant that is not read"
        ],
    }
    assert report(tmp_path / "second") == found
    job([content], tmp_path / "jpeg", reencoding=Reencoding(max_side=500))
    assert keys(tmp_path / "jpeg") == ["GIF", "BMP", "TIFF", "good"]


def test_images_with_damaged_metadata_stay_as_they_are(tmp_path):
    jpeg, png = encoded(make_image(1)), encoded(make_image(1), "PNG")
    table = jpeg.index(b"\xff\xdb")
    images = {
        "jpeg": jpeg[:table] + bytes(4) + jpeg[table:],
        "png": png[:33] + b"\0\0\0\3tEXta\0b\0\0\0\1" + png[33:],  # of a wrong checksum
    }
    job([[pair(key, image) for key, image in images.items()]], tmp_path / "set")
    assert {record.key: record.images[0] for record in records(tmp_path / "set")} == images
    half = {"reencoding": Reencoding(max_side=20)}
    job([[pair(key, image) for key, image in images.items()]], tmp_path / "small", **half)
    assert [image_size(record.images[0]) for record in records(tmp_path / "small")] == [
        (20, 15)
    ] * 2


def test_more_pixels_than_can_be_decoded(tmp_path):
    job([[pair("big", encoded(Image.new("1", (9001, 9001)), "PNG")), pair("good")]], tmp_path)
    reason = "more than 80000000 pixels, or a side above 65535"
    assert keys(tmp_path) == ["good"] and skipped(tmp_path) == {reason: 1}


def nested(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


def test_records_that_cannot_be_stored_are_counted(tmp_path):
    content = [
        pair("twice"),
        pair("twice"),
        pair("a.b"),
        pair("nan", value=math.nan),
        pair("odd", value=object()),
        pair("deep", value=nested(10_000)),
        pair("\ud800", encoded(make_image(0))),
    ]
    for name, options in (("one", {}), ("two", {"sample": 5})):
        job([content], tmp_path / name, **options)
        assert keys(tmp_path / name) == ["twice"]
        assert skipped(tmp_path / name) == {"key occurs twice": 1, "record cannot be stored": 5}


def shape(image: bytes) -> tuple[str, tuple[int, int]]:
    with Image.open(io.BytesIO(image)) as found:
        return found.format, found.size


def test_large_images_become_smaller_and_keep_their_shape(tmp_path):
    smooth = make_image(5, 300, 201)
    noise = Image.fromarray(np.random.default_rng(1).integers(0, 255, (201, 300), dtype=np.uint8))
    images = {
        "jpeg": encoded(smooth, quality=95),
        "png": encoded(smooth, "PNG"),
        "noise": encoded(noise, "PNG"),
        "tall": encoded(smooth.rotate(90, expand=True), "PNG"),
        "gif": encoded(make_image(6), "GIF"),
        "small": encoded(make_image(7, 100, 50)),
        "small-png": encoded(make_image(7, 100, 50), "PNG"),
        "thin": encoded(make_image(8, 900, 2), "PNG"),
    }
    job(
        [[pair(key, image) for key, image in images.items()]],
        tmp_path,
        reencoding=Reencoding(max_side=100),
    )
    found = {record.key: record.images[0] for record in records(tmp_path)}
    assert {key: shape(image) for key, image in found.items()} == {
        "jpeg": ("JPEG", (100, 67)),
        "png": ("JPEG", (100, 67)),
        "noise": ("JPEG", (100, 67)),
        "tall": ("JPEG", (67, 100)),
        "gif": ("JPEG", (40, 30)),
        "small": ("JPEG", (100, 50)),
        "small-png": ("PNG", (100, 50)),
        "thin": ("JPEG", (100, 1)),
    }
    assert found["small"] == images["small"] and found["small-png"] == images["small-png"]
    for key, source in (("jpeg", smooth), ("png", smooth), ("noise", noise.convert("RGB"))):
        expected = np.asarray(source.resize((100, 67), Image.BICUBIC)).astype(int)
        error = np.abs(decode(found[key]).permute(1, 2, 0).numpy().astype(int) - expected)
        assert error.mean() < 5, key
    histogram = report(tmp_path)["histograms"]["smaller side"]
    assert sum(histogram["read"]) == sum(histogram["kept"]) == 8
    edge = histogram["edges"].index(192) + 1
    assert sum(histogram["read"][edge:]) == 4 and sum(histogram["kept"][edge:]) == 0


def test_quality_encodes_everything_anew(tmp_path):
    transparent = Image.new("RGBA", (40, 40), (255, 0, 0, 0))
    turned = make_image(3, 60, 40)
    exif = turned.getexif()
    exif[0x0112] = 6  # rotate by 90 degrees to look at it
    images = {
        "jpeg": encoded(make_image(1, 60, 40), quality=100),
        "png": encoded(transparent, "PNG"),
        "bmp": encoded(make_image(2), "BMP"),
        "tiff": encoded(make_image(2), "TIFF"),
        "webp": encoded(make_image(2), "WEBP"),
        "cmyk": encoded(make_image(2).convert("CMYK")),
        "exif": encoded(turned, exif=exif),
    }
    content = [[pair(key, image) for key, image in images.items()]]
    job(content, tmp_path / "low", reencoding=Reencoding(jpeg_quality=30))
    job(content, tmp_path / "high", reencoding=Reencoding(jpeg_quality=95))
    low, high = (
        {record.key: record.images[0] for record in records(tmp_path / name)}
        for name in ("low", "high")
    )
    assert low.keys() == high.keys() == images.keys()
    for key, image in images.items():
        assert shape(high[key]) == ("JPEG", image_size(image)) and len(low[key]) < len(high[key])
        error = (decode(high[key]).int() - decode(image).int()).abs().float().mean()
        assert error < 3, key
    assert decode(high["png"]).min() > 250


def test_what_is_too_long_for_jpeg_is_skipped(tmp_path):
    line = pair("line", encoded(Image.new("L", (65_501, 2)), "PNG"))
    job([[line, pair("good")]], tmp_path / "all", reencoding=Reencoding(jpeg_quality=90))
    reason = "image is too long for JPEG (--max-side makes it smaller)"
    assert skipped(tmp_path / "all") == {reason: 1}
    job([[line]], tmp_path / "small", reencoding=Reencoding(max_side=1000))
    assert image_size(records(tmp_path / "small")[0].images[0]) == (1000, 1)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_image_size_is_the_one_of_decoding(kind):
    data = encoded(make_image(3, 37, 23), kind)
    assert image_size(data) == (37, 23)
    assert decode(data).shape == torch.Size([3, 23, 37])
    with pytest.raises(BadSampleError, match="header cannot be read"):
        image_size(data[:12])
