"""Storage on an S3-compatible server; skipped where s3fs and moto are not installed."""

import os
import socket

import numpy as np
import pytest
from streams import config, loader, pairs, rows_of
from tiny_data import write

from megatron_owl2.config.schema import StorageConfig
from megatron_owl2.data.storage import StorageOptions, open_storage
from megatron_owl2.errors import StorageError, StorageMissing

pytest.importorskip("s3fs")
boto3 = pytest.importorskip("boto3")
moto_server = pytest.importorskip("moto.server")
DATA = np.random.default_rng(0).bytes(200_000)


@pytest.fixture(scope="module")
def endpoint():
    """One for all tests: a process keeps its client, with the endpoint that it found first."""
    server = moto_server.ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    url = "http://{}:{}".format(*server.get_host_and_port())
    settings = {"ENDPOINT_URL": url, "ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b"}
    settings["DEFAULT_REGION"] = "us-east-1"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(f"AWS_{name}", value)
        client = boto3.client("s3")
        client.create_bucket(Bucket="corpus")
        client.put_object(Bucket="corpus", Key="set/a b.tar", Body=DATA)
        yield url
    server.stop()


def opened(tmp_path, **options):
    options = {"cache": str(tmp_path / "cache"), "backoff": 0.001, "attempts": 2} | options
    return open_storage("s3://corpus/set", StorageOptions(**options))


def test_ranges_come_through_the_cache(endpoint, tmp_path):
    storage = opened(tmp_path)
    assert storage.size("a b.tar") == len(DATA)
    assert storage.read_file("a b.tar") == DATA
    assert storage.read("a b.tar", 2000, 3000, (1000, 5000)) == DATA[2000:3000]
    assert storage.read("a b.tar", 1000, 5000, (1000, 5000)) == DATA[1000:5000]
    assert storage.counters["bytes_fetched"] == len(DATA) + 4000
    assert storage.counters["cache_hits"] == 1 and storage.counters["retries"] == 0


def test_forked_children_read(endpoint, tmp_path):
    storage = opened(tmp_path)
    storage.read("a b.tar", 0, 10)
    child = os.fork()
    if child == 0:
        os._exit(0 if storage.read("a b.tar", 100, 200) == DATA[100:200] else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert storage.read("a b.tar", 300, 400) == DATA[300:400]
    assert storage.counters["retries"] == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_training_reads_the_same_as_from_a_folder(endpoint, tmp_path, workers):
    folder = write(tmp_path / "set", pairs("s", 300), samples_per_shard=100)
    for path in folder.iterdir():
        boto3.client("s3").upload_file(str(path), "corpus", f"train{workers}/{path.name}")
    expected = rows_of(loader(config(folder, weights=(1,)), micro=20, limit_samples=600))
    storage = StorageConfig(cache=str(tmp_path / "cache"), attempts=2, timeout=20.0)
    url = f"s3://corpus/train{workers}"
    data = config(url, weights=(1,), workers=workers, storage=storage)
    assert rows_of(loader(data, micro=20, limit_samples=600)) == expected


def test_missing_and_cut_objects_say_so(endpoint, tmp_path):
    storage = opened(tmp_path)
    for ask in (storage.size, storage.read_file, lambda name: storage.read(name, 0, 1)):
        with pytest.raises(StorageMissing, match="b.tar"):
            ask("b.tar")
    with pytest.raises(StorageError, match="ended at byte 200000"):
        storage.read("a b.tar", 199_000, 201_000)
    with pytest.raises(StorageError, match="nowhere"):
        open_storage("s3://nowhere/set", storage.options).read("a.tar", 0, 1)


def test_an_endpoint_that_does_not_answer_is_given_up_in_time(endpoint, tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(StorageError, match="2 attempts.*no whole answer within 0.7 s"):
            opened(tmp_path, timeout=0.7).read("a b.tar", 0, 1)
