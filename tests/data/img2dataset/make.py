"""Makes the folders beside it with the real img2dataset: one list of addresses in its three forms.

    pip install img2dataset==1.47.0
    python tests/data/img2dataset/make.py

Nine addresses on a server of its own: five pictures arrive, one is missing, one broken, one too
small, and the use of one is forbidden. Shards have five addresses.
"""

import http.server
import io
import os
import subprocess
import sys
import threading
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from PIL import Image

HERE = Path(__file__).parent
ROOT = HERE.parents[2]


def _encoded(seed: int, kind: str, size: int = 24) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (3, 3, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((size + seed, size), Image.BICUBIC).save(buffer, kind)
    return buffer.getvalue()


PICTURES = {
    "/0.jpg": _encoded(0, "JPEG"),
    "/1.jpg": _encoded(1, "JPEG"),
    "/broken.jpg": _encoded(2, "JPEG")[:100],
    "/3.png": _encoded(3, "PNG"),
    "/small.jpg": _encoded(4, "JPEG", 8),
    "/5.webp": _encoded(5, "WEBP"),
    "/forbidden.jpg": _encoded(6, "JPEG"),
    "/7.jpg": _encoded(7, "JPEG", 60),
}


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        data = PICTURES.get(self.path)
        if data is None:
            self.send_error(404)
            return
        self.send_response(200)
        if "forbidden" in self.path:
            self.send_header("X-Robots-Tag", "noai")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments):
        pass


def _make(form: str, corpus: Path, folder: Path) -> None:
    arguments = ["--corpus", "laion", "--input", corpus, "--output", folder / form]
    arguments += ["--output-format", form, "--shard-size", 5, "--min-side", 16, "--image-size", 32]
    tool = [sys.executable, ROOT / "tools/prepare_downloads.py", *arguments]
    environment = os.environ | {"PROCESSES": "1", "THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run(list(map(str, tool)), check=True, env=environment)
    script = folder / form / "download.sh"
    subprocess.run(["bash", script, HERE / form], check=True, env=environment)


def main() -> None:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 8765), _Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    names = [*PICTURES, "/missing.jpg"]
    with TemporaryDirectory() as folder:
        corpus = Path(folder) / "part-00000.parquet"
        columns = {
            "URL": [f"http://127.0.0.1:8765{name}" for name in names],
            "TEXT": [f"caption of {name[1:]} é" for name in names],
            "WIDTH": [100] * len(names),
            "HEIGHT": [100] * len(names),
            "similarity": [0.3 + index / 100 for index in range(len(names))],
            "pwatermark": [None, *[0.25] * (len(names) - 1)],
        }
        pyarrow.parquet.write_table(pa.table(columns), corpus)
        for form in ("webdataset", "files", "parquet"):
            _make(form, corpus, Path(folder))


if __name__ == "__main__":
    main()
