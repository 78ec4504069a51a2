"""Damage to any file that a user gives to a command line: an exit code and a message that names it.

2,000 runs in this process, of 17 kinds of damage and four of something else in a file's place; the
same draws every time. To try others, set FUZZ_SEED, and FUZZ_RUNS for more of them.
"""

import functools
import gzip
import json
import os
import random
import re
import shutil
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import hf_dirs
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tool
import yaml
from damage import damage
from foreign_tars import pack, parts
from paths import DATA
from safetensors.numpy import save_file
from tiny_data import encoded, make_image, record, write
from tiny_run import MODEL

from megatron_owl2.convert.megatron_io import write_checkpoint
from megatron_owl2.convert.sources import from_released
from megatron_owl2.inference import loading
from megatron_owl2.mcore import setup

SEED, RUNS = int(os.environ.get("FUZZ_SEED", "1")), int(os.environ.get("FUZZ_RUNS", "2000"))
INTERNALS = re.compile(r"0x[0-9a-f]{6,}|<_io\.|<class |Traceback|object at |omegaconf|pyarrow\.lib")


# A setting of a configuration is named by its key.
SETTING = re.compile(r"\b(model|data|train|optimizer|parallel|kernels|stage)\.[a-z_.]+")
TOLD = re.compile("^(error: |cannot be indexed: |DAMAGED$|.* does not fit)", re.MULTILINE)


@dataclass(frozen=True)
class Target:
    """A command line and what it reads: `write(folder)` makes the input, `arguments(folder)` are
    its options, `files` the files to damage, `weight` its share of the runs."""

    name: str
    write: Callable[[Path], None]
    arguments: Callable[[Path], list]
    files: tuple[str, ...]
    weight: int = 10


def images(folder: Path, count: int = 4) -> None:
    (folder / "images").mkdir(parents=True, exist_ok=True)
    kinds = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
    for i in range(count):
        kind = kinds[i % len(kinds)]
        (folder / f"images/{i}.jpg").write_bytes(encoded(make_image(i), kind))


def lines(path: Path, rows: list) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def tables(folder: Path) -> None:
    images(folder)
    rows = [{"image": f"{i}.jpg", "caption": f'a "b", é {i}', "score": i / 4} for i in range(4)]
    lines(folder / "t.jsonl", rows)
    text = "image,caption,score\n" + "".join(f'{i}.jpg,"a ""b"", {i}",{i / 4}\n' for i in range(4))
    (folder / "t.csv").write_text(text)
    (folder / "t.tsv").write_text(text.replace(", ", " ").replace(",", "\t").replace('"', ""))
    pq.write_table(pa.Table.from_pylist(rows), folder / "t.parquet")
    held = [{"image": {"bytes": encoded(make_image(i)), "path": "x"}, "text": "t"} for i in (0, 1)]
    pq.write_table(pa.Table.from_pylist(held), folder / "held.parquet")


def conversations(folder: Path) -> None:
    images(folder, 2)
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Red."}]
    rows = [{"id": i, "image": f"{i}.jpg", "conversations": turns} for i in range(2)]
    rows.append({"id": "t", "conversations": [turns[1] | {"from": "human"}, turns[1]]})
    (folder / "talk.json").write_text(json.dumps(rows))
    lines(folder / "talk.jsonl", rows)
    lines(folder / "documents.jsonl", [{"text": f"a text {i}"} for i in range(5)])
    content = {
        "images": [{"id": i, "file_name": f"{i}.jpg"} for i in range(2)],
        "annotations": [{"id": 9 + i, "image_id": i % 2, "caption": "c"} for i in range(4)],
    }
    (folder / "coco.json").write_text(json.dumps(content))


def questions(folder: Path) -> None:
    images(folder, 2)
    for i in range(2):
        shutil.copy(folder / f"images/{i}.jpg", folder / f"images/{i:012d}.jpg")
    rows = [{"question_id": n, "image_id": n % 2, "question": f"What {n}?"} for n in range(4)]
    said = [{"answer": "a", "answer_confidence": "yes"}, {"answer": "b", "answer_confidence": "no"}]
    answered = [{"question_id": n, "image_id": n % 2, "answers": said} for n in range(4)]
    choice = {"choices": ["a", "b", "c"], "correct_choice_idx": 1}
    files = {
        "vqa_questions.json": {"questions": rows},
        "vqa_annotations.json": {"annotations": answered},
        "gqa.json": {
            f"0{n}": {"imageId": str(n % 2), "question": "What?", "answer": "a"} for n in range(4)
        },
        "ocrvqa.json": {
            str(n): {"imageURL": "u", "questions": ["Who?"], "answers": ["a"], "split": 1}
            for n in range(2)
        },
        "aokvqa.json": [row | choice for row in rows],
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))


def tars(folder: Path) -> None:
    members = [m for i in range(5) for m in parts(str(i), "jpg", "json", "txt")]
    pack(folder / "plain/a.tar", members)
    pack(folder / "index/a.tar", members)
    (folder / "packed").mkdir()
    (folder / "packed/a.tar.gz").write_bytes(
        gzip.compress((folder / "plain/a.tar").read_bytes(), mtime=0)
    )
    shutil.copytree(DATA / "img2dataset/webdataset", folder / "downloads")
    shutil.copytree(DATA / "img2dataset/parquet", folder / "downloads_parquet")
    write(folder / "set", [record(i) for i in range(12)], 6)


def preprocess(kind: str, source: str, *more: str) -> Callable[[Path], list]:
    def arguments(folder: Path) -> list:
        options = [str(folder / o) if o == "images" else o for o in more]
        return [
            "preprocess_data", "--input", folder / source, "--format", kind, *options,
            "--output", folder / "out",
        ]  # fmt: skip

    return arguments


def corpora(folder: Path) -> None:
    rows = [
        {"URL": f"https://e.org/{i}.jpg", "TEXT": f"t {i}", "similarity": 0.3} for i in range(6)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "laion.parquet")
    (folder / "cc3m.tsv").write_text("".join(f"{r['TEXT']}\t{r['URL']}\n" for r in rows))
    recipe = {"sources": {"laion": {"corpus": "laion", "metadata": "laion.parquet", "target": 4}}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))


def gold(folder: Path) -> None:
    images(folder, 2)
    lines(
        folder / "coco_pope_x.json",
        [
            {"question_id": i, "image": f"{i}.jpg", "text": "is it?", "label": "yes"}
            for i in range(2)
        ],
    )
    questions = [{"question_id": i, "image_id": i, "question": "what?"} for i in range(2)]
    answers = [{"answer": "red", "answer_id": k} for k in range(10)]
    rows = [
        {"question_id": i, "image_id": i, "question_type": "what", "answer_type": "other"}
        | {"multiple_choice_answer": "red", "answers": answers}
        for i in range(2)
    ]
    (folder / "questions.json").write_text(json.dumps({"questions": questions}))
    (folder / "annotations.json").write_text(json.dumps({"annotations": rows}))
    captions = {
        "images": [{"id": i, "file_name": f"{i}.jpg"} for i in range(2)],
        "annotations": [{"id": i, "image_id": i, "caption": "a red owl"} for i in range(2)],
    }
    (folder / "captions.json").write_text(json.dumps(captions))
    talk = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]
    (folder / "text").mkdir()
    (folder / "text/talk.json").write_text(
        json.dumps([{"id": i, "conversations": talk, "skill": "s"} for i in range(2)])
    )
    given = [{"question_id": i, "answer": "yes"} for i in range(2)]
    lines(folder / "pope.jsonl", given)
    (folder / "vqav2.jsonl").write_text(json.dumps(given))
    lines(folder / "caption.jsonl", [{"image_id": i, "caption": "a"} for i in range(2)])
    lines(folder / "text.jsonl", [{"id": i, "answer": "ho"} for i in range(2)])


GOLD = {
    "pope": "coco_pope_x.json",
    "vqav2": "annotations.json",
    "caption": "captions.json",
    "text": "text/talk.json",
}


def score(task: str) -> Target:
    def arguments(folder: Path) -> list:
        return [
            "evaluate", "score", "--task", task, "--gold", folder / GOLD[task],
            "--predictions", folder / f"{task}.jsonl",
        ]  # fmt: skip

    return Target(f"score {task}", gold, arguments, (GOLD[task], f"{task}.jsonl"), 16)


def ask(task: str, *files: str) -> Target:
    def arguments(folder: Path) -> list:
        source = folder / "text" if task == "text" else folder
        return [
            "evaluate", "--checkpoint", MODEL_OF["export"], "--task", task, "--data", source,
            "--output", folder / "out", "--max-new-tokens", "2", "--min-new-tokens", "1",
        ]  # fmt: skip

    return Target(f"evaluate {task}", gold, arguments, files, 5)


MODEL_OF: dict[str, Path] = {}  # made once for all runs, in `models`


@pytest.fixture(scope="module", autouse=True)
def models(tmp_path_factory):
    """A checkpoint and its export with a tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    pieces = hf_dirs.small_tokenizer(folder)
    shutil.copytree(hf_dirs.OWL2, folder / "export")
    shutil.copyfile(pieces, folder / "export/tokenizer.model")
    whole = from_released(folder / "export")
    write_checkpoint(folder / "checkpoint", whole.tensors, whole.config)
    settings = folder / "checkpoint/run.yaml"
    settings.write_text(settings.read_text().replace(f"{folder}/", ""))
    MODEL_OF.update(export=folder / "export", checkpoint=folder / "checkpoint")
    yield
    MODEL_OF.clear()


def copied(kind: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        shutil.copytree(MODEL_OF[kind], folder / kind)
        images(folder, 1)
        batch = {
            "input_ids": np.array([[1, -200, 5, 6]]),
            "images": np.zeros((1, 3, 56, 56), np.float32),
        }
        save_file(batch, folder / "batch.safetensors")

    return make


def requests(folder: Path) -> None:
    images(folder, 2)
    talk = [{"role": "user", "content": [{"type": "image", "image": "images/1.jpg"}]}]
    rows = [
        {"id": 1, "prompt": "What?", "images": ["images/0.jpg"], "temperature": 0.5},
        {"id": "b", "messages": talk, "max_new_tokens": 2},
    ]
    lines(folder / "requests.jsonl", rows)


def configuration(folder: Path) -> None:
    data = {"sources": [{"path": "shards", "weight": 1.0}], "tokenizer": "t", "sequence_length": 48}
    train = {"steps": 4, "global_batch_size": 8, "micro_batch_size": 2}
    train |= {"output": "run", "precision": "fp32"}
    (folder / "run.yaml").write_text(
        yaml.safe_dump(
            {"model": MODEL, "data": data, "train": train, "optimizer": {"warmup_steps": 1}}
        )
    )


def runs(folder: Path) -> None:
    (folder / "run").mkdir()
    rows = [{"step": s, "loss": 4 / s, "lr": 1e-3, "consumed_samples": 8 * s} for s in range(1, 9)]
    lines(folder / "run/metrics.jsonl", rows)
    (folder / "scored").mkdir()
    skills = {"what": {"accuracy": 50.0, "majority": 25.0, "n": 2}}
    scores = {"task": "vqav2", "blind": False, "overall": skills["what"], "skills": skills}
    (folder / "scored/scores.json").write_text(json.dumps(scores))
    images(folder, 2)
    answers = [
        {"question_id": i, "answer": "red", "score": 100.0, "question": "what?", "skill": "what"}
        | {"gold": "red", "images": [f"pristine/images/{i}.jpg"]}  # from the folder of the test
        for i in range(2)
    ]
    lines(folder / "scored/predictions.jsonl", answers)


def with_model(tool_: str, option: str, kind: str, *more: str) -> Callable[[Path], list]:
    def arguments(folder: Path) -> list:
        paths = [str(folder / m) if m.startswith(("out", "images", "batch")) else m for m in more]
        return [tool_, option, folder / kind, *paths]

    return arguments


_TABLE = ("--images", "images")
TARGETS = (
    *(
        Target(
            f"table {kind}",
            tables,
            preprocess("table", f"t.{kind}", *_TABLE),
            (f"t.{kind}",),
            20,
        )
        for kind in ("csv", "tsv", "jsonl", "parquet")
    ),
    Target("images", tables, preprocess("table", "t.jsonl", *_TABLE), tuple(
        f"images/{i}.jpg" for i in range(4)), 20),
    Target("images re-encoded", tables, preprocess(
        "table", "t.jsonl", *_TABLE, "--jpeg-quality", "80"), ("images/3.jpg",), 6),
    Target("parquet of images", tables, preprocess("table", "held.parquet"), ("held.parquet",)),
    Target("conversations", conversations, preprocess("conversations", "talk.json", *_TABLE), (
        "talk.json",), 20),
    Target("conversation lines", conversations, preprocess(
        "conversations", "talk.jsonl", *_TABLE), ("talk.jsonl",), 16),
    Target("documents", conversations, preprocess("documents", "documents.jsonl"), (
        "documents.jsonl",)),
    Target("coco", conversations, preprocess("coco", "coco.json", *_TABLE), ("coco.json",)),
    Target("coco, one caption", conversations, preprocess(
        "coco-one-caption", "coco.json", *_TABLE), ("coco.json",), 6),
    Target("questions of VQA", questions, preprocess("vqav2", "vqa_questions.json", *_TABLE), (
        "vqa_questions.json", "vqa_annotations.json"), 12),
    *(
        Target(f"questions of {name}", questions, preprocess(name, f"{name}.json", *_TABLE), (
            f"{name}.json",), 6)
        for name in ("gqa", "ocrvqa", "aokvqa")
    ),
    Target("webdataset", tars, preprocess("webdataset", "plain"), ("plain/a.tar",), 14),
    Target("compressed tar", tars, preprocess("webdataset", "packed"), ("packed/a.tar.gz",)),
    Target("img2dataset", tars, preprocess("img2dataset", "downloads"), (
        "downloads/00000.tar", "downloads/00000_stats.json")),
    Target("img2dataset parquet", tars, preprocess("img2dataset", "downloads_parquet"), (
        "downloads_parquet/00000.parquet", "downloads_parquet/00001_stats.json")),
    Target("index_data", tars, lambda folder: ["index_data", folder / "index"], ("index/a.tar",)),
    Target("check_data", tars, lambda folder: ["check_data", folder / "set", "--decode", "1"], (
        "set/manifest.json", "set/shard-000000.tar", "set/shard-000000.tar.idx",
        "set/shard-000000.tar.sums"), 14),
    Target("prepare_downloads", corpora, lambda folder: [
        "prepare_downloads", "--corpus", "laion", "--input", folder / "laion.parquet",
        "--output", folder / "out"], ("laion.parquet",)),
    Target("prepare_downloads of text", corpora, lambda folder: [
        "prepare_downloads", "--corpus", "cc3m", "--input", folder / "cc3m.tsv",
        "--output", folder / "out"], ("cc3m.tsv",)),
    Target("build_mixture", corpora, lambda folder: [
        "build_mixture", "--recipe", folder / "recipe.yaml", "--folder", folder / "mixture"], (
        "recipe.yaml",), 12),
    *(score(task) for task in GOLD),
    ask("pope", "coco_pope_x.json", "images/1.jpg"),
    ask("vqav2", "questions.json", "annotations.json"),
    ask("caption", "captions.json"),
    ask("text", "text/talk.json"),
    Target("generate", copied("export"), lambda folder: [
        "generate", "--checkpoint", MODEL_OF["export"], "--image", folder / "images/0.jpg",
        "--prompt", "What?", "--max-new-tokens", "2"], ("images/0.jpg",), 8),
    Target("generate from an export", copied("export"), with_model(
        "generate", "--checkpoint", "export", "--prompt", "What?", "--max-new-tokens", "2"), (
        "export/config.json", "export/tokenizer.model",
        "export/model.safetensors"), 8),
    Target("generate a file", requests, lambda folder: [
        "generate", "--checkpoint", MODEL_OF["export"], "--requests", folder / "requests.jsonl",
        "--output", folder / "out.jsonl", "--max-new-tokens", "2"], (
        "requests.jsonl", "images/0.jpg"), 12),
    Target("convert_from_hf", copied("export"), with_model(
        "convert_from_hf", "--owl2", "export", "--output", "out"), (
        "export/config.json", "export/tokenizer.model",
        "export/model.safetensors"), 12),
    Target("convert_to_hf", copied("checkpoint"), with_model(
        "convert_to_hf", "--checkpoint", "checkpoint", "--output", "out"), (
        "checkpoint/run.yaml", "checkpoint/progress.json", "checkpoint/metadata.json",
        "checkpoint/.metadata", "checkpoint/common.pt", "checkpoint/tokenizer.model"), 12),
    Target("verify_checkpoint", copied("checkpoint"), with_model(
        "verify_checkpoint", "--checkpoint", "checkpoint", "--inputs", "batch.safetensors",
        "--output", "out.safetensors"), ("batch.safetensors", "checkpoint/run.yaml"), 8),
    Target("plan", configuration, lambda folder: [
        "plan", "--config", folder / "run.yaml", "--gpus", "2", "--gpu-memory", "80"], (
        "run.yaml",), 12),
    Target("plot_run", runs, lambda folder: [
        "plot_run", folder / "run", "--output", folder / "out.png"], ("run/metrics.jsonl",), 4),
    Target("report", runs, lambda folder: [
        "report", "--run", f"a={folder / 'run'}", "--evaluation", f"b={folder / 'scored'}",
        "--output", folder / "out"], (
        "scored/scores.json", "scored/predictions.jsonl", "run/metrics.jsonl"), 4),
)  # fmt: skip


def share(target: Target) -> int:
    return -(-RUNS * target.weight // sum(t.weight for t in TARGETS))


def faults_of(done, path: Path) -> list[str]:
    """What is wrong with how a command took a damaged file."""
    said = done.stdout + done.stderr
    faults = [f"says {found[0]!r}" for found in [INTERNALS.search(said)] if found]
    if done.returncode not in (0, 1, 2):
        faults.append(f"exit code {done.returncode}")
    named = {path.name, path.stem, path.parent.name} & set(re.split(r"[\s/:;,()\'\"]+", said))
    if done.returncode and not (named or SETTING.search(said)):
        faults.append("does not name the file")
    if done.returncode and not TOLD.search(said):
        faults.append("no error line")
    return faults


def attempt(target: Target, pristine: Path, folder: Path, draw: random.Random) -> list[str]:
    """Faults of one run on a fresh copy of the input with one damaged file."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(pristine, folder, symlinks=True)
    path = folder / draw.choice(target.files)
    kind = damage(draw, path)
    name, *arguments = target.arguments(folder)
    try:
        done = tool.run(name, *arguments)
    except BaseException:
        return [f"{target.name}, {path.name}, {kind}: {traceback.format_exc(limit=-4)}"]
    said = (done.stdout + done.stderr)[-600:]
    where = f"{target.name}, {path.name}, {kind}"
    return [f"{where}: {fault}: {said}" for fault in faults_of(done, path)]


@pytest.fixture
def loaded_once(monkeypatch):
    """The undamaged model is loaded once, which is most of the time of a run.

    `plan` needs a process without groups."""
    setup.shutdown()
    load = functools.lru_cache(loading.load_model)

    def cached(path, precision="fp32", **more):
        whole = Path(path) == MODEL_OF["export"]
        return (load if whole else engine_load)(path, precision, **more)

    engine_load = loading.load_model
    monkeypatch.setattr(loading, "load_model", cached)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_a_damaged_file_ends_in_no_traceback(target, tmp_path, loaded_once, monkeypatch):
    monkeypatch.chdir(tmp_path)  # inputs name no folder of this run, so damage falls alike in all
    pristine, folder = tmp_path / "pristine", tmp_path / "input"
    pristine.mkdir()
    target.write(pristine)
    shutil.copytree(pristine, folder)
    name, *arguments = target.arguments(folder)
    whole = tool.run(name, *arguments)
    assert whole.returncode == 0, whole.stderr
    faults = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number in range(share(target)):
            draw = random.Random(f"{SEED} {target.name} {number}")
            faults += [f"run {number}: {f}" for f in attempt(target, pristine, folder, draw)]
    assert not faults, f"{len(faults)} faults\n\n" + "\n\n".join(faults[:20])


def test_there_are_2000_runs_of_many_kinds():
    assert sum(map(share, TARGETS)) >= RUNS
    assert len({target.name for target in TARGETS}) == len(TARGETS)
