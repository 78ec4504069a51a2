"""Observers of a training run: slow ranks, images of samples, profiles, wandb, curves."""

import gzip
import json
import re
import runpy
import sys

import faults
import pytest
import tiny_data
import tiny_run
import torch
from paths import TOOLS
from PIL import Image

from megatron_owl2.config.load import load_config
from megatron_owl2.config.schema import ParallelConfig, WatchConfig
from megatron_owl2.data.conversation import build_sample
from megatron_owl2.data.tokenizer import Tokenizer
from megatron_owl2.mcore import setup
from megatron_owl2.mcore.parallel import ParallelContext
from megatron_owl2.model.owl2 import Owl2
from megatron_owl2.training import optimizer as optim
from megatron_owl2.training import parameter_groups
from megatron_owl2.training.metrics import device, sample_sheet
from megatron_owl2.training.metrics.straggler import StragglerDetector
from megatron_owl2.training.metrics.wandb_logger import flat
from megatron_owl2.training.profiling import Profiler, Timers

pytestmark = pytest.mark.distributed

TOOL = TOOLS / "plot_run.py"


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """A run of four steps with everything on, stopped after two and gone on with, and the same
    run with nothing on."""
    folder = tmp_path_factory.mktemp("watch")
    config = tiny_run.make(folder, 4)
    options = [
        "wandb.enabled=true",
        "watch.picture_interval=2",
        "watch.profiler=torch",
        "watch.profile_step=1",
        "watch.profile_steps=2",
        "watch.peak_tflops=0.5",
        "train.save_interval=2",
    ]
    for name, more in (("plain", []), ("watched", options)):
        done = tiny_run.train(config, folder / name, *more)
        assert done.returncode == 0, done.stderr
        if name == "watched":
            (folder / name / "checkpoints" / "latest").write_text("iter_0000002")
            done = tiny_run.train(config, folder / name, *more, "watch.profiler=none")
            assert done.returncode == 0, done.stderr
    return folder


def test_watching_changes_nothing(watched):
    assert tiny_run.figures(watched / "watched") == tiny_run.figures(watched / "plain")


def test_images_are_of_their_steps(watched):
    found = sorted((watched / "watched" / "pictures").iterdir())
    assert [path.name for path in found] == ["step_0000002.png", "step_0000004.png"]
    assert not (watched / "plain" / "pictures").exists()
    first, second = (Image.open(path).tobytes() for path in found)
    assert first != second


def test_a_profile_has_the_spans_of_its_steps(watched):
    (path,) = (watched / "watched" / "profile").iterdir()
    assert path.name == "rank-00000.json.gz"
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    names = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    expected = {"step 1": 1, "step 2": 1, "optimizer": 2, "checkpoint": 1}
    expected |= {"forward-compute": 8, "backward-compute": 8}  # of 4 micro-batches
    assert {name: names.count(name) for name in expected} == expected
    spans = {e["name"]: (e["ts"], e["ts"] + e["dur"]) for e in events if e["name"] in expected}
    step, inner = spans["step 2"], spans["checkpoint"]
    assert step[0] <= inner[0] and inner[1] <= step[1]


@pytest.mark.parametrize("steps", [4, 2], ids=["a longer run", "a run that ends within"])
def test_nsys_gets_its_range_and_the_spans_in_it(monkeypatch, tmp_path, steps):
    """What is asked of CUDA, in order; it is really done only on a GPU."""
    asked = []
    monkeypatch.setattr(torch.cuda.profiler, "start", lambda: asked.append("start"))
    monkeypatch.setattr(torch.cuda.profiler, "stop", lambda: asked.append("stop"))
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", asked.append)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: asked.append("pop"))
    setup.initialize(ParallelConfig())
    settings = WatchConfig(profiler="nsys", profile_step=2, profile_steps=1 if steps == 4 else 9)
    profiler = Profiler(settings, tmp_path, records=False)
    timers = Timers(profiler)
    for step in range(1, steps + 1):
        profiler.begin_step(100 + step)
        timers("backward-compute", log_level=2).start()
        timers("backward-compute").stop()
        with profiler.span("optimizer"):
            pass
        profiler.end_step()
    profiler.close()
    setup.shutdown()
    spans = ["step 102", "backward-compute", "pop", "optimizer", "pop", "pop"]
    assert asked == ["start", *spans, "stop"]
    assert timers.backward.take() > 0 == timers.backward.take()


def test_a_run_that_goes_on_is_the_same_to_wandb(watched):
    folders = list((watched / "watched" / "wandb").glob("offline-run-*"))
    assert len(folders) == 2
    (name,) = {folder.name.rsplit("-", 1)[1] for folder in folders}
    assert name == (watched / "watched" / "wandb_id").read_text()
    for folder in folders:
        assert list(folder.glob("*.wandb"))
        assert list((folder / "files" / "media" / "images").glob("samples_*.png"))


def test_use_of_the_device_is_a_share_of_its_peak(watched):
    for row in tiny_run.rows(watched / "watched"):
        assert 0 < row["mfu"] == pytest.approx(row["tflops_per_device"] / 0.5)
        assert 0.05 < row["memory_gib"]["resident"] < 10
        assert row["slowest_rank"] == 0 and row["slowest_ratio"] == 1


def test_peaks_of_devices_by_name():
    names = {
        "NVIDIA A100-SXM4-80GB": 312,
        "NVIDIA H100 80GB HBM3": 989,
        "NVIDIA H100 PCIe": 756,
        "NVIDIA H200": 989,
        "NVIDIA B200": 2250,
        "NVIDIA L40S": 362,
        "NVIDIA A10": 125,
        "NVIDIA A10G": None,
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb": None,
        "Tesla V100-SXM2-32GB": None,
    }
    assert {name: device.get_peak_flops(name) for name in names} == names
    assert device.peak_tflops(77.0) == 77.0


def test_the_slow_one_of_two_ranks_is_named(tmp_path):
    """It reads slowly in two steps and computes slowly in two. With one micro-batch a step, so
    that every pass begins or ends with an exchange between the ranks."""
    config = tiny_run.make(tmp_path, 4)
    done = tiny_run.train(
        config,
        tmp_path / "run",
        "train.micro_batch_size=4",
        "train.log_interval=2",
        processes=2,
        fault=faults.rank_1_is_slow,
    )
    assert done.returncode == 0, done.stderr
    rows = tiny_run.rows(tmp_path / "run")
    assert [row["slowest_rank"] for row in rows] == [1, 1]
    assert all(row["slowest_ratio"] > 1.25 and row["slowest_host"] for row in rows)
    said = re.findall(r"straggler: rank 1 on \S+ takes .* (\d+)% of it waiting", done.stdout)
    reading, computing = map(int, said)
    assert reading > 50 > computing


def test_ranks_are_compared_within_their_stage():
    peers = object.__new__(StragglerDetector)
    peers._ranks = [(0, "a"), (0, "b"), (0, "c"), (1, "d"), (1, "e"), (1, "f")]
    slowest = peers.slowest([0.0] * 6, [9.0, 9.0, 9.9, 1.0, 1.5, 1.0])
    assert (slowest.rank, slowest.host, slowest.ratio) == (4, "e", 1.5)
    slowest = peers.slowest([0, 3.0, 0, 0, 0, 0], [9.0] * 6)
    assert (
        str(slowest)
        == "rank 1 on b takes 1.33 times as long as its peers, 25% of it waiting for data"
    )


def test_rates_are_those_of_the_optimizer(tmp_path):
    path = tiny_run.make(tmp_path, 20)
    config = load_config(path, ["stage.rates={'abstractor.*': 3}", "stage.frozen=['embedding.*']"])
    context = ParallelContext(config, setup.initialize(ParallelConfig()), fuses_gradients=True)
    model = Owl2(context, config.model)
    plan = parameter_groups.freeze(config, [model])
    optimizer, scheduler = optim.build_optimizer(config, optim.wrap_ddp([model], overlap=False))
    for _ in range(7):
        scheduler.step(1)
    rates = parameter_groups.learning_rates(plan, scheduler, config)
    assert list(rates)[:3] == ["ViT lowest", "ViT highest", "abstractor"]
    assert "embedding" not in rates
    assert rates["ViT lowest"] == pytest.approx(rates["decoder"] * 0.9**3)
    assert rates["abstractor"] == pytest.approx(rates["decoder"] * 3)
    assert set(rates.values()) <= {group["lr"] for group in optimizer.param_groups}
    assert max(rates.values()) == max(group["lr"] for group in optimizer.param_groups)
    setup.shutdown()


def test_an_image_shows_pixels_and_text_of_its_rows(tmp_path):
    tiny_run.make(tmp_path)
    tokenizer = Tokenizer(tmp_path / "tokenizer.model")
    samples = [build_sample(tiny_data.record(index), tokenizer, 5, 48) for index in (1, 2)]
    for number, sample in enumerate(samples):
        sample.key = f"key{number}"
    red = torch.tensor([200, 0, 0], dtype=torch.uint8).view(3, 1, 1).expand(3, 28, 28)
    samples[0].images = [red]
    batch = tiny_data.one_per_row(samples[::-1], 28, 48)
    text, question = (
        sample_sheet._words(batch, sample, tokenizer) for sample in sample_sheet._samples(batch)
    )
    green = sample_sheet._TARGET
    assert [word for word, color in question if color == green] == ["1</s>", "yes</s>"]
    assert " ".join(word for word, _ in question).startswith("<s>USER: [5 vision tokens] what")
    assert [word for word, color in text if color == green] == ["it", "is", "2</s>"]
    assert not any("vision tokens" in word for word, _ in text)
    page = sample_sheet.draw(batch, tokenizer)
    upper, lower = (page.getpixel((100, y)) for y in (100, 100 + 224 + 12))
    assert (upper, lower) == ((0, 0, 0), (200, 0, 0))


def test_nested_rows_are_flattened_for_plots():
    row = {"step": 1, "grad_norms": {"ViT": 2.0}, "sources": [{"seen": 3}, {"seen": 4}]}
    expected = {"step": 1, "grad_norms/ViT": 2.0, "sources/0/seen": 3, "sources/1/seen": 4}
    assert flat(row) == expected


def plot(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, arguments)])
    return runpy.run_path(str(TOOL))["main"]()


def test_curves_of_runs_side_by_side(watched, tmp_path, monkeypatch, capsys):
    one, two = tmp_path / "one.png", tmp_path / "two.png"
    assert plot(monkeypatch, watched / "watched", "--output", one) == 0
    assert plot(monkeypatch, watched / "watched", watched / "plain", "--output", two) == 0
    single, double = Image.open(one), Image.open(two)
    assert (double.width, double.height) == (2 * single.width, single.height)
    assert plot(monkeypatch, watched / "plain", "--output", one) == 0
    assert Image.open(one).height < single.height, "no peak, no MFU"
    assert plot(monkeypatch, tmp_path, "--output", one) == 2
    assert "metrics.jsonl does not exist" in capsys.readouterr().err
