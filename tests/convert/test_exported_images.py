"""Inputs of the exported image processor and of generation: files that cannot be used, arrays,
lists and addresses."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
import torch
from exported_images import exported_module, pixels_of
from PIL import Image
from tiny_data import encoded, make_image

from megatron_owl2.config.schema import ModelConfig, VisionConfig
from megatron_owl2.convert import hf_config
from megatron_owl2.data.images import decode, load_square, square_resize
from megatron_owl2.errors import ConversionError, InferenceError
from megatron_owl2.inference.api import read_image

WIDTH, HEIGHT = 40, 30
CROP_SIZE = {"height": 14, "width": 14}
IMAGE = make_image(3, WIDTH, HEIGHT)
COLOURS = IMAGE.quantize(17)
TRANSPARENT = IMAGE.copy()
TRANSPARENT.putalpha(Image.linear_gradient("L").resize((WIDTH, HEIGHT)))


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    with exported_module(tmp_path_factory.mktemp("export")) as module:
        yield module


@pytest.fixture(scope="module")
def process(module):
    return pixels_of(module, HEIGHT, WIDTH)


def endless_scans() -> bytes:
    data = encoded(IMAGE, progressive=True)
    scan = data.index(b"\xff\xda")
    return data[:-2] + data[scan : scan + 20] * 100 + data[-2:]


UNUSABLE = {
    "cut JPEG": (encoded(IMAGE)[:-200], "its JPEG data are damaged or cut short"),
    "cut PNG": (encoded(IMAGE, "PNG")[:-100], "its PNG data are damaged or cut short"),
    "cut GIF": (encoded(COLOURS, "GIF")[:-100], "its GIF data are damaged or cut short"),
    "cut BMP": (encoded(IMAGE, "BMP")[:-100], "its BMP data are damaged or cut short"),
    "AVIF": (b"\0\0\0\x20ftypavif", "AVIF is not read; convert it to JPEG or PNG"),
    "page": (b"<html>404</html>", "it is an HTML page, left by a failed download"),
    "empty": (b"", "image cannot be decoded: the file is empty"),
    "line": (encoded(Image.new("1", (65_536, 1)), "PNG"), "image of 65536 x 1 pixels exceeds"),
    "scans": (endless_scans(), "JPEG of more than 100 scans"),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_every_path_refuses_alike(name, process, tmp_path):
    data, words = UNUSABLE[name]
    path = tmp_path / "image.jpg"
    path.write_bytes(data)
    for read, prefix, source in (
        (decode, "", data),
        (read_image, f"{path}: ", path),
        (process, f"{path}: ", str(path)),
    ):
        with pytest.raises(ValueError) as refusal:
            read(source)
        said = str(refusal.value)
        assert words in said and said.startswith(prefix)
        assert "object" not in said and "0x" not in said


def test_metadata_may_be_damaged_on_every_path(process, tmp_path):
    jpeg, png = encoded(IMAGE, quality=90), encoded(IMAGE, "PNG")
    table = jpeg.index(b"\xff\xdb")
    text = (3).to_bytes(4) + b"tEXta\0b" + (1).to_bytes(4)  # of a wrong checksum
    path = tmp_path / "image"
    for whole, remarked in (
        (jpeg, jpeg[:table] + bytes(4) + jpeg[table:]),
        (jpeg, jpeg[:table] + b"a\xff\x01b" + jpeg[table:]),  # which Pillow refuses
        (png, png[:33] + text + png[33:]),
    ):
        path.write_bytes(remarked)
        for found in (decode(remarked), read_image(path), process(str(path))):
            assert torch.equal(found, decode(whole))


@pytest.mark.parametrize(
    "image, words",
    [
        (np.zeros((30, 40), np.uint8), r"uint8 \[30, 40\]; give a PIL image or uint8 \[H, W, 3\]"),
        (np.zeros((30, 40, 1), np.uint8), r"uint8 \[30, 40, 1\]; give"),
        (np.zeros((30, 40, 4), np.uint8), r"uint8 \[30, 40, 4\]; give"),
        (np.zeros((2, 30, 40, 3), np.uint8), r"uint8 \[2, 30, 40, 3\]; give"),
        (np.zeros((30, 40, 3)), r"float64 \[30, 40, 3\]; give"),
        (torch.zeros(3, 30, 40), r"torch.float32 \[3, 30, 40\]; give"),
        (np.zeros((3, 30, 3), np.uint8), "which axis has the colours is not clear"),
        (np.zeros((0, 40, 3), np.uint8), "image of 40 x 0 pixels"),
        (Image.new("RGB", (0, 9)), "image of 0 x 9 pixels"),
        ([], "no images"),
        (7, "an image is of type int"),
        (None, "an image is of type NoneType"),
        ("no.jpg", "no.jpg: there is no such file, and it is neither a URL nor base64"),
        ("data:image/png;base64,????", "neither a URL nor base64"),
        (base64.b64encode(b"<html>").decode(), "image cannot be decoded: it is an HTML page"),
    ],
)
def test_the_processor_refuses_what_has_no_meaning(process, image, words):
    with pytest.raises(ValueError, match=words):
        process(image)


@pytest.mark.parametrize(
    "image, words",
    [
        (torch.zeros(3, 0, 40, dtype=torch.uint8), "an image: image of 40 x 0 pixels"),
        (torch.zeros(3, 1, 65_536, dtype=torch.uint8), "image of 65536 x 1 pixels exceeds"),
        (torch.zeros(4, 30, 40, dtype=torch.uint8), r"uint8 \[4, 30, 40\]; give uint8 \[3, H, W\]"),
        (np.zeros((30, 40, 3), np.uint8), "an image is of type ndarray; give a path"),
        (b"abc", "an image is of type bytes"),
        (None, "an image is of type NoneType"),
    ],
)
def test_generation_refuses_what_has_no_meaning(image, words):
    with pytest.raises(InferenceError, match=words):
        read_image(image)


def test_an_image_that_pillow_has_not_read_yet_may_be_damaged(process, tmp_path):
    path = tmp_path / "cut.png"
    path.write_bytes(encoded(IMAGE, "PNG")[:-300])
    for read, error in ((read_image, InferenceError), (process, ValueError)):
        with Image.open(path) as opened, pytest.raises(error, match="its data are damaged or cut"):
            read(opened)
        with pytest.raises(error, match="or its file is closed"):
            read(opened)


def test_arrays_tensors_and_nested_lists_are_the_image(module):
    array = np.asarray(IMAGE)
    forms = [IMAGE, array, array[::-1][::-1], array.transpose(2, 0, 1), torch.tensor(array)]
    processor = module.MPLUGOwl2ImageProcessor(CROP_SIZE, [0.5] * 3, [0.2] * 3)
    values = processor([forms[:2], [[form] for form in forms[2:]]])["pixel_values"]
    assert values.shape == (5, 3, 14, 14)
    assert all(torch.equal(value, values[0]) for value in values)
    assert torch.equal(processor(IMAGE)["pixel_values"][0], values[0])


@pytest.mark.parametrize("mode", ["stretch", "pad", "crop"])
def test_an_export_shows_the_pixels_of_its_mode(mode, module, tmp_path):
    statistics = {"image_mean": [0.2, 0.3, 0.4], "image_std": [0.25, 0.2, 0.3]}
    model = ModelConfig(vision=VisionConfig(image_size=28), image_mode=mode, **statistics)
    hf_config.write(tmp_path, "owl2", model, torch.float32)
    assert hf_config.read_model(tmp_path).image_mode == mode
    settings = json.loads((tmp_path / "preprocessor_config.json").read_text())
    processor = module.MPLUGOwl2ImageProcessor(**settings)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in statistics.values())
    shown = []
    for data in (
        encoded(IMAGE),
        encoded(make_image(4, 30, 90), "PNG"),
        encoded(TRANSPARENT, "PNG"),
    ):
        (tmp_path / "image").write_bytes(data)
        square = load_square(data, 28, to_square=square_resize(model))
        values = processor(str(tmp_path / "image"))["pixel_values"][0]
        assert torch.equal(values, (square.float() / 255 - mean) / std)
        shown.append(not torch.equal(square, load_square(data, 28)))
    assert shown == [mode != "stretch"] * 3


def test_a_directory_without_a_mode_stretches_and_a_mode_that_is_none_is_refused(module, tmp_path):
    hf_config.write(tmp_path, "owl2", ModelConfig(image_mode="pad"), torch.float32)
    file = tmp_path / "preprocessor_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps(settings | {"image_mode": "squash"}))
    with pytest.raises(ConversionError, match="image_mode is 'squash', use stretch, pad or crop"):
        hf_config.read_model(tmp_path)
    with pytest.raises(ValueError, match="image_mode is 'squash'; use stretch, pad or crop"):
        module.MPLUGOwl2ImageProcessor(**settings | {"image_mode": "squash"})(IMAGE)
    del settings["image_mode"]  # as in the released model, and in exports of older versions
    file.write_text(json.dumps(settings))
    assert hf_config.read_model(tmp_path).image_mode == "stretch"
    values = module.MPLUGOwl2ImageProcessor(**settings | {"crop_size": CROP_SIZE})(IMAGE)
    stretched = module.MPLUGOwl2ImageProcessor(
        CROP_SIZE, settings["image_mean"], settings["image_std"], "stretch"
    )(IMAGE)
    assert torch.equal(values["pixel_values"], stretched["pixel_values"])


class Answers(BaseHTTPRequestHandler):
    def do_GET(self):
        found = self.path == "/image.png"
        self.send_response(200 if found else 404)
        self.end_headers()
        self.wfile.write(encoded(TRANSPARENT, "PNG") if found else b"<html>404</html>")

    def log_message(self, *_):
        pass


def test_an_address_is_read_as_a_file_is(process):
    server = HTTPServer(("127.0.0.1", 0), Answers)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        address = f"http://127.0.0.1:{server.server_port}"
        pixels = process(f"{address}/image.png")
        assert torch.equal(pixels, decode(encoded(TRANSPARENT, "PNG")))
        with pytest.raises(ValueError, match=f"{address}/none.png: Not Found"):
            process(f"{address}/none.png")
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_loading_of_transformers_is_not_used(module, tmp_path):
    """Its loader drops transparency and turns images."""
    path = tmp_path / "image.png"
    path.write_bytes(encoded(TRANSPARENT, "PNG"))
    processor = module.MPLUGOwl2ImageProcessor(CROP_SIZE, [0.5] * 3, [0.2] * 3)
    ((fetched,), same) = processor.fetch_images([[str(path)], IMAGE])
    assert torch.equal(torch.from_numpy(np.array(fetched)).permute(2, 0, 1), read_image(path))
    assert same is IMAGE
