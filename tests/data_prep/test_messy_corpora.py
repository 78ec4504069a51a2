"""Tables of published corpora as downloads and other systems leave them, and what is listed."""

import gzip
import json
from pathlib import Path

import pytest
import tool

from data_prep.downloads import published


def listing(source: Path, output: Path, capfd) -> str:
    """Lines of prepare_downloads, which must be all that the process writes but progress bars."""
    done = tool.run("prepare_downloads", "--corpus", "cc3m", "--input", source, "--output", output)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr + capfd.readouterr().err
    return done.stdout


def row(number: int) -> bytes:
    return b"caption %d\thttps://example.com/%d.jpg\n" % (number, number)


def test_files_that_are_not_listed_are_named(tmp_path, capfd):
    folder = tmp_path / "in"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.tsv").write_bytes(row(0))
    (folder / "deep/b.TSV").write_bytes(row(1))
    (folder / "c.tsv.gz").write_bytes(gzip.compress(row(2)))
    (folder / "._a.tsv").write_bytes(bytes(9))
    (folder / "empty.tsv").touch()
    said = listing(folder, tmp_path / "out", capfd)
    assert "listed 2 of 2 rows" in said
    for reason, name in (
        ("extension .gz is not read", "c.tsv.gz"),
        ("hidden file", "._a.tsv"),
        ("empty file", "empty.tsv"),
    ):
        assert f"not read: 1 x {reason} (such as {folder / name})" in said
    report = json.loads((tmp_path / "out/report.json").read_bytes())
    assert {reason: entry["files"] for reason, entry in report["unread"].items()} == {
        "empty file": 1,
        "extension .gz is not read": 1,
        "hidden file": 1,
    }


def test_a_list_of_an_earlier_version_is_left_alone(tmp_path, capfd):
    (tmp_path / "a.tsv").write_bytes(row(0))
    listing(tmp_path / "a.tsv", tmp_path / "out", capfd)
    path = tmp_path / "out/report.json"
    report = json.loads(path.read_bytes())
    del report["unread"]
    path.write_text(json.dumps(report))
    assert "was complete already" in listing(tmp_path / "a.tsv", tmp_path / "out", capfd)


@pytest.mark.parametrize("block", [1, 7, 64, 1 << 24])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_a_row_with_wrong_bytes_and_columns_costs_no_other(
    tmp_path, capfd, monkeypatch, block, end
):
    monkeypatch.setattr(published, "_BLOCK", block)
    rows = [b"\xef\xbb\xbf" + row(0), b"\xff\xfe\n", b"\n", row(1), b"a\tb\t\xe9\n", row(2)[:-1]]
    (tmp_path / "a.tsv").write_bytes(b"".join(rows).replace(b"\n", end))
    said = listing(tmp_path / "a.tsv", tmp_path / "out", capfd)
    assert "listed 3 of 5 rows" in said and "2 x row has another number of columns" in said
