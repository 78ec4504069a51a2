"""What a training run does beside learning: bad samples, broken shards."""

import json

import pytest
import tiny_data
import tiny_run

from megatron_owl2.data.shards.records import Record


def with_bad_pictures(folder, every):
    """Shards in which every n-th picture is a JPEG in name only."""
    config = tiny_run.make(folder)

    def damaged(index):
        record = tiny_data.record(index)
        if index % every or record.image is None:
            return record
        return Record(record.key, b"\xff\xd8\xff" + bytes(50), record.caption, record.turns)

    shards = tiny_data.write(folder / "damaged", map(damaged, range(60)))
    return config, f"data.sources=[{{path: {shards}}}]"


@pytest.mark.parametrize("layout", [[], ["parallel.pipeline=2"]], ids=["DP 2", "PP 2"])
def test_bad_samples_are_substituted_counted_and_listed(tmp_path, layout):
    config, sources = with_bad_pictures(tmp_path, every=12)
    options = [sources, "train.steps=4", *layout]
    done = tiny_run.train(config, tmp_path / "run", *options, processes=2)
    assert done.returncode == 0, done.stderr
    ledgers = sorted((tmp_path / "run").glob("bad_samples.rank*.jsonl"))
    sample_indices = {json.loads(line)["slot"] for path in ledgers for line in path.open()}
    assert 0 < len(sample_indices) == tiny_run.rows(tmp_path / "run")[-1]["bad_samples"]
    assert f"bad samples {len(sample_indices)}" in done.stdout


def test_a_rank_that_cannot_go_on_says_so(tmp_path):
    config = tiny_run.make(tmp_path)
    (shard, *_) = (tmp_path / "shards").glob("*.tar")
    shard.write_bytes(shard.read_bytes()[:-512])
    done = tiny_run.train(config, tmp_path / "run", processes=2)
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: rank ")]
    assert lines and all(shard.name in line and "cut or replaced" in line for line in lines)
