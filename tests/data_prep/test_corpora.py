"""From corpora as published to lists of addresses and the download: tools/prepare_downloads.py."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_img2dataset import OPTIONS
from paths import ROOT

from data_prep.downloads import url_list
from data_prep.downloads.img2dataset_script import Options
from data_prep.downloads.registry import CORPORA
from data_prep.downloads.selection import Selection
from megatron_owl2.errors import PreprocessError


def url(number: int) -> str:
    return f"https://example.com/{number}.jpg"


def laion(path: Path, count: int = 100, **changes) -> Path:
    """A file of laion2B-en-joined; row i has similarity 0.3 + i / 1000 and width 100 + i."""
    columns = {
        "URL": [url(i) for i in range(count)],
        "TEXT": [f" caption {i} " for i in range(count)],
        "WIDTH": pa.array([100 + i for i in range(count)], pa.int32()),
        "HEIGHT": pa.array([100] * count, pa.int32()),
        "similarity": [0.3 + i / 1000 for i in range(count)],
        "hash": list(range(count)),
        "punsafe": pa.array([0.5 if i % 2 else 0.1 for i in range(count)], pa.float32()),
        "pwatermark": pa.array([None if i == 3 else 0.5 for i in range(count)], pa.float32()),
    }
    columns |= changes
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({k: v for k, v in columns.items() if v is not None}), path)
    return path


def make(corpus: str, source: Path, output: Path, options: Options | None = None, **selection):
    chosen, options = Selection(**selection), options or Options()
    report, _ = url_list.write_url_list(CORPORA[corpus], source, output, chosen, options)
    return report


def listed(folder: Path) -> list[dict]:
    return pq.read_table(sorted(folder.glob("*.parquet"))).to_pylist()


def numbers(folder: Path) -> list[int]:
    return [int(re.search(r"(\d+)\.jpg", row["url"])[1]) for row in listed(folder)]


def refused(corpus: str, source: Path, output: Path, **selection) -> str:
    with pytest.raises(PreprocessError) as error:
        make(corpus, source, output, **selection)
    assert not output.exists()
    return str(error.value)


def test_a_list_in_the_folder_of_its_corpus_is_no_part_of_it(tmp_path):
    laion(tmp_path / "tables/0.parquet")
    made = make("laion", tmp_path / "tables", tmp_path / "tables/list")
    assert make("laion", tmp_path / "tables", tmp_path / "tables/list") == made
    assert made.listed == 100


def test_cc3m_and_cc12m_have_no_header_and_no_quotes(tmp_path):
    cc3m, cc12m = tmp_path / "Train_GCC-training.tsv", tmp_path / "cc12m.tsv"
    captions = ['a "half quoted', "two\twords", "", "été"]
    cc3m.write_text("".join(f"{c}\t{url(i)}\n" for i, c in enumerate(captions)))
    cc12m.write_text("".join(f"{url(i)}\t{c}\n" for i, c in enumerate(captions)))
    for corpus, path in (("cc3m", cc3m), ("cc12m", cc12m)):
        report = make(corpus, path, tmp_path / corpus)
        assert listed(tmp_path / corpus) == [
            {"url": url(0), "caption": 'a "half quoted'},
            {"url": url(3), "caption": "été"},
        ]
        assert (report.rows, report.listed) == (4, 2)
        assert report.left_out == {"no caption": 1, "row has another number of columns": 1}


@pytest.mark.parametrize("form", ["tsv", "parquet"])
def test_a_row_that_is_not_utf8_is_left_out_alone(tmp_path, form):
    """Latin-1 in a caption or an address, wherever in it, and at any place of the table."""
    captions = [f"caption {i} \u00e9".encode() for i in range(1000)]
    addresses = [url(i).encode() for i in range(1000)]
    captions[0], captions[500], captions[999] = b"caf\xe9 au lait", b"\xff", b"end\xe9"
    addresses[7] = b"https://example.com/\xe9.jpg"
    path = tmp_path / f"cc3m.{form}"
    if form == "tsv":
        path.write_bytes(
            b"".join(b"%b\t%b\n" % row for row in zip(captions, addresses, strict=True))
        )
    else:
        columns = {"caption": captions, "url": addresses}
        texts = {name: pa.array(rows, pa.binary()).view("string") for name, rows in columns.items()}
        pq.write_table(pa.table(texts), path)
    report = make("cc3m", path, tmp_path / "list", sample=900)
    assert report.left_out == {"row is not UTF-8": 4, "not drawn": 96}
    assert (report.rows, report.listed) == (1000, 900)
    assert all(row["caption"].endswith(" \u00e9") for row in listed(tmp_path / "list"))
    assert not set(numbers(tmp_path / "list")) & {0, 7, 500, 999}


def test_laion_filters_count_every_row_once(tmp_path):
    rows = {
        "URL": [*(url(i) for i in range(98)), None, "ftp://x"],
        "TEXT": ["  ", None, "ab", *(f"caption {i}" for i in range(3, 100))],
    }
    source = laion(tmp_path / "in/a.parquet", **rows)
    limits = {
        "min_score": {"similarity": 0.305},
        "max_score": {"punsafe": 0.2, "pwatermark": 0.5},
        "min_side": 100,
        "max_aspect": 1.8,
        "min_caption": 3,
        "max_caption": 10,
    }
    report = make("laion", source.parent, tmp_path / "list", **limits)
    # 0, 1: caption; 2: short; 3: no watermark score, but low similarity first; 4: similarity
    # 98, 99: address; aspect above 1.8 from 81; punsafe of odd ones
    assert report.left_out == {
        "no address": 2,
        "no caption": 2,
        "caption shorter than 3": 1,
        "aspect above 1.8": 98 - 81,
        "similarity below 0.305": 2,
        "punsafe above 0.2": 38,
    }
    assert numbers(tmp_path / "list") == list(range(6, 81, 2))
    assert report.rows == 100 == report.listed + sum(report.left_out.values())
    first = listed(tmp_path / "list")[0]
    assert first.keys() == {"url", "caption", "similarity", "punsafe", "pwatermark"}
    assert first["caption"] == "caption 6"


def test_a_missing_score_is_a_reason_of_its_own(tmp_path):
    source = laion(tmp_path / "a.parquet", 10)
    report = make("laion", source, tmp_path / "list", max_score={"pwatermark": 0.9})
    assert report.left_out == {"no pwatermark": 1} and 3 not in numbers(tmp_path / "list")


def test_labels_and_names_of_other_versions(tmp_path):
    old = {"punsafe": None, "pwatermark": None, "NSFW": ["UNLIKELY", "NSFW", None, "UNSURE"]}
    source = laion(tmp_path / "a.parquet", 4, **old)
    report = make("laion", source, tmp_path / "a", only={"NSFW": ["UNLIKELY", "UNSURE"]})
    assert numbers(tmp_path / "a") == [0, 3]
    assert report.left_out == {"NSFW is not UNLIKELY or UNSURE": 2}
    assert report.columns == ["similarity", "NSFW"]
    table = pq.read_table(source)
    small = tmp_path / "b.parquet"
    names = [name.lower().replace("text", "caption") for name in table.column_names]
    pq.write_table(table.rename_columns(names), small)
    make("laion", small, tmp_path / "b", only={"NSFW": ["UNLIKELY", "UNSURE"]})
    assert listed(tmp_path / "b") == listed(tmp_path / "a")


def test_the_sample_is_exact_repeatable_and_spread(tmp_path):
    for part in range(3):
        rows = {"URL": [url(1000 * part + i) for i in range(1000)]}
        laion(tmp_path / f"in/{part}.parquet", 1000, **rows)
    source = tmp_path / "in"
    for count in (1, 7, 500, 2999):
        report = make("laion", source, tmp_path / str(count), sample=count)
        assert report.listed == count == len(set(numbers(tmp_path / str(count))))
        assert report.left_out == {"not drawn": 3000 - count}
    make("laion", source, tmp_path / "again", sample=500)
    make("laion", source, tmp_path / "other", sample=500, seed=5)
    assert numbers(tmp_path / "again") == numbers(tmp_path / "500") != numbers(tmp_path / "other")
    assert set(numbers(tmp_path / "7")) < set(numbers(tmp_path / "500"))
    spread = np.histogram(numbers(tmp_path / "500"), bins=10, range=(0, 3000))[0]
    assert spread.min() > 25 and spread.max() < 80  # 50 expected, sigma 6.5
    assert make("laion", source, tmp_path / "all", sample=5000).listed == 3000


def test_the_sample_is_drawn_from_what_passes(tmp_path):
    source = laion(tmp_path / "a.parquet", 100)
    report = make("laion", source, tmp_path / "list", sample=20, max_score={"punsafe": 0.2})
    assert report.left_out == {"punsafe above 0.2": 50, "not drawn": 30}
    assert report.listed == 20 and all(n % 2 == 0 for n in numbers(tmp_path / "list"))


def test_crowded_buckets_still_give_the_exact_number(tmp_path, monkeypatch):
    monkeypatch.setattr(url_list, "_BUCKET_BITS", 2)
    for part in range(4):
        laion(tmp_path / f"in/{part}.parquet", 25)
    for count in (1, 33, 60, 99):
        report = make("laion", tmp_path / "in", tmp_path / str(count), sample=count)
        assert report.listed == count


def test_files_of_the_list_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(url_list, "_ROWS_PER_FILE", 30)
    laion(tmp_path / "in/a.parquet", 50)
    laion(tmp_path / "in/b.parquet", 50)
    report = make("laion", tmp_path / "in", tmp_path / "list", Options(samples_per_shard=20))
    assert [rows for _, rows in report.files] == [30, 30, 30, 10]
    assert len(listed(tmp_path / "list")) == 100
    assert '"$done" -ne 7 ]' in (tmp_path / "list/download.sh").read_text()


def test_a_list_is_made_once(tmp_path):
    source = laion(tmp_path / "a.parquet", 10)
    arguments = (CORPORA["laion"], source, tmp_path / "list")
    assert url_list.write_url_list(*arguments, Selection(), Options())[1]
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "list").iterdir()}
    report, written = url_list.write_url_list(*arguments, Selection(), Options())
    assert not written and report.listed == 10
    with pytest.raises(PreprocessError, match="made with another selection and download"):
        url_list.write_url_list(*arguments, Selection(seed=1), Options(image_size=1))
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "list").iterdir()}


def test_wrong_corpora_are_clear_errors(tmp_path):
    source, out = laion(tmp_path / "in/a.parquet", 5), tmp_path / "list"
    assert "has no score clip" in refused("laion", source, out, min_score={"clip": 0.3})
    assert "it has: similarity (cosine" in refused("laion", source, out, min_score={"hash": 1})
    assert "no label LICENSE" in refused("laion", source, out, only={"LICENSE": ["?"]})
    assert "is left: listed 0 of 5 rows" in refused("laion", source, out, min_caption=99)
    assert "min_side is 0" in refused("laion", source, out, min_side=0)
    text = tmp_path / "a.tsv"
    text.write_text(f"{url(1)}\tcaption\n")
    assert "is not a file of laion" in refused("laion", text, out)
    assert "does not publish sizes" in refused("cc12m", text, out, min_side=10)
    laion(tmp_path / "in/b.parquet", 5, punsafe=None)
    assert "b.parquet has other columns than" in refused("laion", source.parent, out)
    other = tmp_path / "other.parquet"
    pq.write_table(pa.table({"a": [1]}), other)
    assert "no column url (it has a)" in refused("laion", other, out)
    data = source.read_bytes()
    other.write_bytes(data[:20] + bytes(60) + data[80:])
    assert "other.parquet cannot be read" in refused("laion", other, out)


PUBLISHED = {
    "coyo": {
        "id": [1],
        "url": [url(1)],
        "text": ["a caption"],
        "width": [600],
        "height": [300],
        "image_phash": ["e9e90c24f1d9c674"],
        "text_length": [9],
        "word_count": [2],
        "num_tokens_bert": [4],
        "num_tokens_gpt": [4],
        "num_faces": [0],
        "clip_similarity_vitb32": [0.30],
        "clip_similarity_vitl14": [0.25],
        "nsfw_score_opennsfw2": [0.001],
        "nsfw_score_gantman": [0.01],
        "watermark_score": [0.02],
        "aesthetic_score_laion_v2": [7.1],
    },
    "datacomp": {
        "uid": ["335db346a49045476677662a0067ce68"],
        "url": [url(1)],
        "text": ["a caption"],
        "original_width": [980],
        "original_height": [405],
        "clip_b32_similarity_score": [0.23],
        "clip_l14_similarity_score": [0.13],
        "face_bboxes": [[[0.1, 0.2, 0.3, 0.4]]],
        "sha256": ["0" * 64],
    },
}


def written_options(script: Path) -> dict[str, str]:
    """The options of the img2dataset command in a download.sh."""
    command = re.search(r"^img2dataset (?:.*\\\n)*.*$", script.read_text(), re.M)[0]
    words = shlex.split(command.replace("\\\n", ""))[1:]
    return {name[2:]: value for name, value in zip(words[::2], words[1::2], strict=True)}


@pytest.mark.parametrize("corpus", ["coyo", "datacomp"])
def test_published_columns(tmp_path, corpus):
    source = tmp_path / "a.parquet"
    pq.write_table(pa.table(PUBLISHED[corpus]), source)
    scores = CORPORA[corpus].scores
    limits = {"min_score": dict.fromkeys(scores, -1.0), "min_side": 300, "max_aspect": 3}
    report = make(corpus, source, tmp_path / "list", **limits)
    assert report.listed == 1 and set(scores) <= set(report.columns)
    assert set(report.columns) <= set(PUBLISHED[corpus])
    row = listed(tmp_path / "list")[0]
    assert row["caption"] == "a caption" and row["url"] == url(1)
    assert "width" not in row and "original_width" not in row  # img2dataset's own names
    options = written_options(tmp_path / "list/download.sh")
    saved = set(json.loads(options["save_additional_columns"]))
    assert options.keys() <= set(OPTIONS) and saved <= set(row)
    reserved = {"key", "caption", "url", "width", "height", "original_width", "original_height"}
    reserved |= {"status", "error_message", "exif", "md5", "sha256", "sha512"}
    assert not saved & reserved  # img2dataset refuses them
    assert options["min_image_size"] == "300" and options["max_aspect_ratio"] == "3"
    if corpus == "datacomp":
        assert options["bbox_col"] == "face_bboxes" and options["skip_reencode"] == "False"
        assert json.loads(options["verify_hash"]) == ["sha256", "sha256"]
    else:
        assert not options.keys() & {"bbox_col", "verify_hash"}
        assert options["skip_reencode"] == "True"


def run(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "tools/prepare_downloads.py", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)


def test_command_line(tmp_path):
    source = laion(tmp_path / "in/a.parquet", 40)
    arguments = ["--corpus", "laion", "--input", source.parent, "--output", tmp_path / "list"]
    arguments += ["--min-score", "similarity=0.31", "--max-score", "punsafe=0.2", "--sample", 10]
    result = run(*arguments, "--output-format", "files", "--image-size", 448)
    assert result.returncode == 0, result.stderr
    assert "listed 10 of 40 rows" in result.stdout and "15 x punsafe above 0.2" in result.stdout
    options = written_options(tmp_path / "list/download.sh")
    assert (options["output_format"], options["image_size"]) == ("files", "448")
    environment = os.environ | {"PATH": "/usr/bin:/bin"}
    script = ["bash", str(tmp_path / "list/download.sh")]
    result = subprocess.run(script, capture_output=True, text=True, env=environment)
    assert result.returncode != 0 and "usage: bash download.sh FOLDER" in result.stderr
    result = subprocess.run([*script, "x"], capture_output=True, text=True, env=environment)
    assert result.returncode == 1 and "img2dataset is not installed" in result.stderr
    result = run(*arguments, "--seed", 3)
    assert result.returncode == 1 and "error: " in result.stderr
    assert "--input is missing" in run("--corpus", "coyo", "--output", tmp_path / "x").stderr
    for wrong in ("similarity", "=1", "similarity=nan"):
        result = run(*arguments, "--min-score", wrong)
        assert result.returncode == 2 and f"{wrong!r} is not NAME=NUMBER" in result.stderr
    for wrong in (["--shard-size", 0], ["--image-size", -1], ["--quality", 101]):
        result = run(*arguments, *wrong)
        assert result.returncode == 1 and "must be positive" in result.stderr
    assert "clip_similarity_vitb32: cosine" in run("--help").stdout


def test_coco_has_archives(tmp_path):
    result = run("--corpus", "coco", "--output", tmp_path / "coco")
    assert result.returncode == 0 and "coco/download.sh FOLDER" in result.stdout
    script = tmp_path / "coco/download.sh"
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    assert "annotations/annotations_trainval2017 zips/train2017" in script.read_text()


def test_numbers_that_are_none_are_left_out_by_their_reason(tmp_path):
    texts = {"similarity": ["0.9", "zz", None, "0.1"], "WIDTH": ["300", "x", "300", "9"]}
    laion(tmp_path / "in/a.parquet", 4, **texts)
    report = make("laion", tmp_path / "in", tmp_path / "out", min_score={"similarity": 0.5})
    assert report.listed == 1
    assert report.left_out == {"no similarity": 2, "similarity below 0.5": 1}
    report = make("laion", tmp_path / "in", tmp_path / "sides", min_side=50)
    assert report.left_out == {"no size": 1, "side below 50": 1}
