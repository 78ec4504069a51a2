"""Training runs beside learning: bad samples, broken shards, failures, subclasses."""

import gc
import gzip
import json
import os
import re
import shutil
import signal
from pathlib import Path

import faults
import pytest
import runs_in_turn
import tiny_data
import tiny_run
import torch
from paths import ROOT
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_owl2.config.load import load_config
from megatron_owl2.data.shards.records import Record
from megatron_owl2.errors import RunDirectoryError
from megatron_owl2.mcore import setup
from megatron_owl2.training import run_directory
from megatron_owl2.training.checkpoint import directories
from megatron_owl2.training.metrics import data_report
from megatron_owl2.training.signals import StopSignal
from megatron_owl2.training.step import forward_backward
from megatron_owl2.training.trainer import Trainer
from megatron_owl2.utils.files import locked

pytestmark = pytest.mark.distributed


def with_bad_images(folder, every):
    """Shards in which every n-th image is a JPEG in name only."""
    config = tiny_run.make(folder)

    def damaged(index):
        record = tiny_data.record(index)
        if index % every or not record.images:
            return record
        return Record(record.key, (b"\xff\xd8\xff" + bytes(50),), record.caption, record.turns)

    shards = tiny_data.write(folder / "damaged", map(damaged, range(60)))
    return config, f"data.sources=[{{path: {shards}}}]"


def test_bad_samples_are_substituted_counted_and_listed(tmp_path):
    config, sources = with_bad_images(tmp_path, every=12)
    options = {"DP 2": [], "PP 2": ["parallel.pipeline=2"]}
    runs = [(tmp_path / name, [sources, "train.steps=4", *options[name]]) for name in options]
    done = runs_in_turn.launch(config, runs, processes=2)
    assert done.returncode == 0, done.stderr
    said = iter(re.findall(r"4/4 .* bad samples (\d+)", done.stdout))
    for run, _ in runs:
        logs = sorted(run.glob("bad_samples.rank*.jsonl"))
        sample_indices = {json.loads(line)["slot"] for path in logs for line in path.open()}
        assert 0 < len(sample_indices) == tiny_run.rows(run)[-1]["bad_samples"] == int(next(said))
    assert not list(said)


def test_a_rank_that_cannot_go_on_says_so(tmp_path):
    config = tiny_run.make(tmp_path)
    (shard, *_) = (tmp_path / "shards").glob("*.tar")
    shard.write_bytes(shard.read_bytes()[:-512])
    done = tiny_run.train(config, tmp_path / "run", processes=2)
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: rank ")]
    assert lines and all(shard.name in line and "cut or replaced" in line for line in lines)


def test_a_run_that_fails_closes_what_it_opened(tmp_path):
    """The profile that was begun is written, the data workers are gone, and the error shows."""
    config = tiny_run.make(tmp_path, 4)
    done = tiny_run.train(
        config,
        tmp_path / "run",
        "data.workers=1",
        "watch.profiler=torch",
        "watch.profile_step=1",
        "watch.profile_steps=9",
        fault=faults.step_3_fails,
    )
    assert done.returncode != 0 and "a mistake in step 3" in done.stderr
    trace = gzip.decompress((tmp_path / "run" / "profile" / "rank-00000.json.gz").read_bytes())
    names = [event["name"] for event in json.loads(trace)["traceEvents"]]
    assert "step 2" in names and "step 4" not in names


def test_a_failure_while_closing_does_not_hide_the_error(tmp_path):
    config = tiny_run.make(tmp_path, 3)
    fault = faults.step_3_and_closing_fail
    done = tiny_run.train(config, tmp_path / "run", fault=fault)
    assert done.returncode != 0
    assert "warning: while closing after an error: RuntimeError: no way to close" in done.stderr
    assert done.stderr.rstrip().endswith("RuntimeError: a mistake in step 3")


def test_a_trainer_can_be_subclassed_and_run_in_place(tmp_path):
    """In this process, without a command line; its losses are those of the command."""
    config = tiny_run.make(tmp_path, 3)
    losses = []

    class Watching(Trainer):
        def log(self, norm, norms, validation):
            losses.append((self.state.step, self.state.consumed_samples))
            super().log(norm, norms, validation)

    settings = load_config(config, [f"train.output={tmp_path / 'here'}"])
    assert Watching(settings, StopSignal()).train() == 0
    assert losses == [(1, 8), (2, 16), (3, 24)]
    assert not torch.distributed.is_initialized()
    done = tiny_run.train(config, tmp_path / "there")
    assert done.returncode == 0, done.stderr
    here, there = tiny_run.rows(tmp_path / "here"), tiny_run.rows(tmp_path / "there")
    assert [row["loss"] for row in here] == pytest.approx([row["loss"] for row in there], rel=1e-6)


def test_a_signal_in_the_last_step_leaves_a_finished_run(tmp_path, caplog):
    """The data report is written; the validation, which takes its time, is left out and told."""

    class Signalled(Trainer):
        def forward_backward(self):
            if self.state.step == self.config.train.steps:
                os.kill(os.getpid(), signal.SIGUSR1)
            return super().forward_backward()

    config = tiny_run.make(tmp_path, 2)
    sources = f"validation.sources=['{tmp_path / 'shards'}']"
    options = [f"train.output={tmp_path / 'run'}", sources, "validation.interval=1"]
    with caplog.at_level("WARNING"):
        assert Signalled(load_config(config, options)).train() == 0
    assert "no validation after step 2" in caplog.text
    assert ["validation" in row for row in tiny_run.rows(tmp_path / "run")] == [True, False]
    assert (tmp_path / "run" / data_report.NAME).is_file()


def test_a_tokenizer_that_moves_during_a_run_is_in_its_checkpoints(tmp_path):
    class Moving(Trainer):
        def build_data(self):
            super().build_data()
            Path(self.config.data.tokenizer).rename(tmp_path / "moved.model")

    config = load_config(tiny_run.make(tmp_path), [f"train.output={tmp_path / 'run'}"])
    assert Moving(config).train() == 0
    saved = directories.resolve(tmp_path / "run") / "tokenizer.model"
    assert saved.read_bytes() == (tmp_path / "moved.model").read_bytes()


def test_one_job_at_a_time_trains_in_a_run_directory(tmp_path, monkeypatch):
    config = load_config(tiny_run.make(tmp_path), [f"train.output={tmp_path / 'run'}"])
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / run_directory.LOCK).touch()
    with locked(tmp_path / "run" / run_directory.LOCK):
        monkeypatch.setattr(run_directory, "PATIENCE", 0.0)
        with pytest.raises(RunDirectoryError, match="another job trains in .*/run; wait for it"):
            Trainer(config).train()
    setup.shutdown()
    assert Trainer(config).train() == 0  # the lock of the other is gone
    assert Trainer(config).train() == 0  # and this one's, too


class Reads(TorchDispatchMode):
    """Values that the host asks the device for; on a GPU it waits for each."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*arguments, **(options or {}))


def test_a_step_waits_for_the_device_once(tmp_path):
    """For the gradient norm, which says whether the gradients may be applied."""
    config = tiny_run.make(tmp_path, 2)
    reads = []

    class Counting(Trainer):
        def forward_backward(self):
            batches = [next(self.batches) for _ in range(self.micro_batches)]  # from the host
            with Reads() as mode:
                sums = forward_backward(self.config, self.model, iter(batches), len(batches))
            reads.append(("forward and backward", mode.count))
            return sums

        def gradient_norm(self):
            with Reads() as mode:
                norm = super().gradient_norm()
            reads.append(("norm", mode.count))
            return norm

    assert Counting(load_config(config, [f"train.output={tmp_path / 'run'}"])).train() == 0
    assert reads == [("forward and backward", 0), ("norm", 1)] * 2


def test_garbage_is_collected_by_step_while_a_run_lasts(tmp_path):
    config = tiny_run.make(tmp_path, 2)
    seen = []

    class Watching(Trainer):
        def train_step(self):
            seen.append(gc.isenabled())
            super().train_step()

    assert Watching(load_config(config, [f"train.output={tmp_path / 'run'}"])).train() == 0
    assert seen == [False, False] and gc.isenabled()


PADDING = """
    LoaderMetric(
        "padding",
        lambda batch: batch.tokens.numel() - int(batch.lengths.sum()),
        reported_as="padded_positions",
        report=lambda total, interval: total,
        over_run=True,
    ),
"""


def test_a_loader_metric_is_added_in_one_file(tmp_path, monkeypatch):
    """In a copy of the package: one more declaration in loader_metrics.py and nothing else."""
    shutil.copytree(ROOT / "megatron_owl2", tmp_path / "tree" / "megatron_owl2")
    path = tmp_path / "tree/megatron_owl2/training/metrics/loader_metrics.py"
    declarations = path.read_text()
    assert declarations.rstrip().endswith(")")
    path.write_text(declarations.rstrip()[:-1] + PADDING + ")\n")
    monkeypatch.chdir(tmp_path)  # `python -m` looks for packages here first
    config = tiny_run.make(tmp_path, 2)
    tree = os.pathsep.join([str(tmp_path / "tree"), os.environ["PYTHONPATH"]])
    done = tiny_run.train(config, tmp_path / "run", environment={"PYTHONPATH": tree})
    assert done.returncode == 0, done.stderr
    first, second = tiny_run.rows(tmp_path / "run")
    (one, other) = (
        sum(batch.tokens.numel() - int(batch.lengths.sum()) for batch in batches)
        for batches in _steps(load_config(config))
    )
    assert (first["padded_positions"], second["padded_positions"]) == (one, other)
    assert (first["padding"], second["padding"]) == (one, one + other)
    assert f"padding {one + other}" in done.stdout


def _steps(config):
    """The micro-batches of the two steps of one process."""
    batches = list(tiny_run.batches(config, 2, limit_samples=16))
    return batches[:4], batches[4:]
