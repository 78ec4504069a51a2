"""NVIDIA's Energon reads the shards and their indexes; skipped where it is not installed."""

import subprocess
import sys
from pathlib import Path

import pytest
from tiny_data import record, write

energon = pytest.importorskip("megatron.energon")

DATASET = """
__module__: megatron.energon
__class__: CrudeWebdataset
subflavors: {}
"""


def test_energon_prepares_and_reads_every_sample(tmp_path):
    records = [record(i) for i in range(30)]
    folder = write(tmp_path / "set", records)
    indexes = {path.name: path.read_bytes() for path in folder.glob("*.idx")}
    tool = Path(sys.executable).parent / "energon"
    prepare = [tool, "prepare", "--non-interactive", "--force-overwrite", "--split-ratio", "1,0,0"]
    done = subprocess.run([*prepare, folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout
    # Its own indexes are the ones that were there.
    assert {path.name: path.read_bytes() for path in folder.glob("*.tar.idx")} == indexes
    (folder / ".nv-meta" / "dataset.yaml").write_text(DATASET)

    class Raw(energon.DefaultTaskEncoder):
        """Hands over the parts of a sample as bytes."""

        decoder = None
        cookers = [energon.Cooker(energon.stateless(lambda sample: sample))]

    dataset = energon.get_train_dataset(
        folder,
        batch_size=None,
        shuffle_buffer_size=None,
        max_samples_per_sequence=None,
        repeat=False,
        worker_config=energon.WorkerConfig(rank=0, world_size=1, num_workers=0),
        task_encoder=Raw(),
    )
    samples = energon.get_loader(dataset)
    found = {sample["__key__"].rpartition("/")[2]: sample for sample in samples}
    assert len(found) == len(records)
    for item in records:
        parts = dict((name.split(".")[1], data) for name, data in item.to_members())
        assert all(found[item.key][extension] == data for extension, data in parts.items())
