"""check_data and index_data as a user calls them: what they find, print and exit with."""

import os
import signal
import subprocess
import sys
import time

import pytest
import webdataset
from http_server import HttpServer
from paths import TOOLS
from processes import group_is_gone, wait_until
from tiny_data import encoded, make_image, record, write
from tool import run

from megatron_owl2.data.shards.dataset import ShardedDataset
from megatron_owl2.data.shards.records import Record

pytestmark = pytest.mark.slow


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "set", (record(i) for i in range(30)), samples_per_shard=8)


def test_a_sound_set_is_ok(folder):
    done = run("check_data", folder, "--decode", "1", "--workers", "2")
    assert done.returncode == 0, done.stdout
    assert "30 samples in 4 shards: 30 good (20 images decoded), 0 bad" in done.stdout
    assert done.stdout.splitlines()[-1] == "ok"


def test_every_kind_of_damage_is_counted_and_named(folder):
    tars = sorted(folder.glob("*.tar"))
    data = bytearray(tars[0].read_bytes())
    start, _ = ShardedDataset(folder).range_of(0, 2)
    data[start + 600] ^= 1
    tars[0].write_bytes(data)
    tars[1].write_bytes(tars[1].read_bytes()[:-2048])
    tars[2].rename(folder / "stray.tar")
    done = run("check_data", folder)
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert any(f"{tars[0]} at byte {start}: its bytes do not match" in line for line in lines)
    assert any(f"{tars[1]} has" in line and "cut or replaced" in line for line in lines)
    assert any(tars[2].name in line and "cannot be read" in line for line in lines)
    assert any(line.startswith("shard: stray.tar is not in the manifest") for line in lines)
    assert "30 samples in 4 shards: 13 good" in lines[-2] and "1 bad, 16 unreadable" in lines[-2]
    assert lines[-1] == "DAMAGED"


def test_images_that_were_broken_before_show_only_when_decoded(tmp_path):
    def records():
        for i in range(40):
            image = encoded(make_image(i, 100, 80))
            yield Record(f"{i:03d}", (image[:-200] if i % 8 == 0 else image,), caption="x")

    folder = write(tmp_path / "set", records(), samples_per_shard=40)
    assert run("check_data", folder).returncode == 0
    whole = run("check_data", folder, "--decode", "1", "--show", "2")
    assert whole.returncode == 1 and "35 good (35 images decoded), 5 bad" in whole.stdout
    assert whole.stdout.count("cannot be decoded") == 2
    start = ShardedDataset(folder).range_of(0, 8)[0]
    place = f"{next(folder.glob('*.tar')).name} at byte {start}: 008: image cannot be decoded"
    assert place in whole.stdout
    assert "and 3 more bad samples" in whole.stdout
    part = [run("check_data", folder, "--decode", "0.4").stdout for _ in range(2)]
    assert part[0] == part[1] != whole.stdout


def test_a_set_on_a_web_server(folder, tmp_path):
    with HttpServer(folder) as server:
        done = run("check_data", server.url, "--cache", tmp_path / "cache")
    assert done.returncode == 0 and "30 good" in done.stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_workers_end_with_an_interrupt_and_with_their_parent(folder, tmp_path, number):
    """SIGINT goes to the whole group, as a terminal sends it."""
    with HttpServer(folder) as server:
        server.fail("hang", name=".tar")
        process = subprocess.Popen(
            [sys.executable, TOOLS / "check_data.py", server.url, "--workers", "2"],
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        while len(server.ranges(".tar")) < 2:
            assert process.poll() is None
            time.sleep(0.05)
        send = os.killpg if number == signal.SIGINT else os.kill
        send(process.pid, number)
        _, text = process.communicate(timeout=20)
        assert "Traceback" not in text
        if number == signal.SIGINT:
            assert process.returncode == 130 and text.endswith("interrupted\n")
        wait_until(lambda: group_is_gone(process.pid))


def test_no_data_set(tmp_path):
    done = run("check_data", tmp_path)
    assert done.returncode == 2 and "holds no manifest.json" in done.stderr
    done = run("index_data", tmp_path)
    assert done.returncode == 2 and "holds no .tar file" in done.stderr


def test_foreign_shards_become_a_data_set_where_they_lie(tmp_path):
    pattern = str(tmp_path / "%05d.tar")
    with webdataset.ShardWriter(pattern, maxcount=10, verbose=0) as writer:
        for i in range(25):
            image = encoded(make_image(i))
            writer.write({"__key__": f"{i:05d}", "jpg": image, "txt": f"picture {i}"})
    before = {path.name: path.stat() for path in tmp_path.glob("*.tar")}
    done = run("index_data", tmp_path, "--workers", "2")
    assert done.returncode == 0, done.stderr
    assert "25 samples in 3 sound shards" in done.stdout
    after = {path.name: path.stat() for path in tmp_path.glob("*.tar")}
    assert {n: s.st_mtime_ns for n, s in before.items()} == {
        n: s.st_mtime_ns for n, s in after.items()
    }
    dataset = ShardedDataset(tmp_path)
    assert [dataset.read(2, i).caption for i in range(5)] == [f"picture {i}" for i in range(20, 25)]
    assert run("check_data", tmp_path, "--decode", "1").returncode == 0
    again = run("index_data", tmp_path)
    assert again.returncode == 2 and "holds a manifest.json already" in again.stderr


def test_a_damaged_foreign_shard_leaves_no_manifest(tmp_path):
    for number in range(2):
        with webdataset.TarWriter(str(tmp_path / f"{number}.tar")) as writer:
            for i in range(5):
                image = encoded(make_image(i))
                writer.write({"__key__": f"{number}{i}", "jpg": image, "txt": "x"})
    path = tmp_path / "1.tar"
    path.write_bytes(path.read_bytes()[:3000])
    done = run("index_data", tmp_path)
    assert done.returncode == 1
    assert f"cannot be indexed: {path}" in done.stderr and "--format webdataset" in done.stderr
    assert not (tmp_path / "manifest.json").exists()


def test_samples_without_a_part_are_counted_with_what_they_lack(tmp_path):
    image = encoded(make_image(0))
    parts = [{"jpg": image, "txt": "x"}] * 6 + [{"jpg": image}] * 2 + [{"txt": "x"}]
    parts += [{"jpg": image, "txt": "x", "cls": "1"}]
    for number in range(2):
        with webdataset.TarWriter(str(tmp_path / f"{number}.tar")) as writer:
            for i, part in enumerate(parts):
                writer.write({"__key__": f"{number}{i}", **part})
    done = run("index_data", tmp_path)
    assert done.returncode == 0, done.stderr
    first, second, *reasons, last = done.stdout.splitlines()
    assert last == "images were not decoded: tools/check_data.py --decode 1 does that"
    assert first.endswith("20 samples in 2 sound shards")
    assert second.startswith("8 of them cannot be used")
    assert reasons == [
        "  4 x no txt or json",
        "  2 x no image (jpg, jpeg, png or webp)",
        "  2 x a member that is neither an image (jpg, jpeg, png or webp) nor txt nor json",
    ]
    assert "12 good (0 images decoded), 8 bad" in run("check_data", tmp_path).stdout
