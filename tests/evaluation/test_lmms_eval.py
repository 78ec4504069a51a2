"""lmms-eval's adapter on local tasks, without a network: answers and losses are the engine's."""

import json
from importlib.metadata import EntryPoint

import pytest
import torch
from generation import random_model, train
from tiny_data import make_image

pytest.importorskip("lmms_eval")

from lmms_eval.api.instance import Instance
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.models import registry_v2
from lmms_eval.tasks import TaskManager

from megatron_owl2.errors import TaskError
from megatron_owl2.evaluation.adapters import lmms_eval as adapter
from megatron_owl2.inference import api
from megatron_owl2.inference.api import InferenceModel

COLORS = ["red", "green", "blue"]
TASK = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: '{folder}/rows.json'}}}}
test_split: test
task: {task}
output_type: {kind}
doc_to_visual: !function images.of_row
doc_to_text: 'what color is the {{{{where}}}} one ?'
{more}
"""
CHOICE = "doc_to_choice: [red, green, blue]\ndoc_to_target: gold\nmetric_list: [{metric: acc}]"
GENERATE = """doc_to_target: answer
generation_kwargs: {max_new_tokens: 6, temperature: 0, top_p: 0, image_aspect_ratio: original}
metric_list: [{metric: exact_match}]"""
IMAGES = """from PIL import Image

def of_row(row, *args):
    return [Image.open(row["image"]).convert("RGB")]
"""


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return random_model(train(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture
def model(loaded, monkeypatch):
    monkeypatch.setattr(api, "load", lambda path, precision, adapter: InferenceModel(loaded))
    return adapter.MegatronOwl2("somewhere", batch_size=2, max_new_tokens=8)


@pytest.fixture
def rows(tmp_path):
    """Rows of a task, each with an image of its own."""
    found = []
    for number, where in enumerate(("top", "left", "right")):
        make_image(number).save(tmp_path / f"{number}.png")
        gold = {"gold": number % 3, "answer": COLORS[number % 3]}
        found.append({"where": where, "image": str(tmp_path / f"{number}.png"), **gold})
    return found


@pytest.fixture
def tasks(tmp_path, rows, monkeypatch):
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "rows.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "images.py").write_text(IMAGES)
    for task, kind, more in (
        ("local_choice", "multiple_choice", CHOICE),
        ("local_generate", "generate_until", GENERATE),
    ):
        text = TASK.format(folder=tmp_path, task=task, kind=kind, more=more)
        (tmp_path / f"{task}.yaml").write_text(text)
    return TaskManager(include_path=str(tmp_path), include_defaults=False)


def evaluated(model, tasks, name):
    done = simple_evaluate(model, tasks=[name], task_manager=tasks, bootstrap_iters=0)
    return done["results"][name], sorted(done["samples"][name], key=lambda row: row["doc_id"])


def question(row) -> str:
    return f"what color is the {row['where']} one ?"


def test_lmms_eval_finds_the_model(monkeypatch):
    value = "megatron_owl2.evaluation.adapters.lmms_eval:manifest"
    point = EntryPoint("megatron_owl2", value, "lmms_eval.models")
    registry = registry_v2.ModelRegistryV2()
    monkeypatch.setattr(registry, "_select_entry_points", lambda group: [point])
    registry.load_entrypoint_manifests()
    assert registry.get_model_class("megatron_owl2") is adapter.MegatronOwl2


def test_a_generation_task_is_answered_by_the_engine(model, tasks, rows):
    metrics, samples = evaluated(model, tasks, "local_generate")
    own = [model.model.generate(question(row), [row["image"]], max_new_tokens=6) for row in rows]
    assert [sample["resps"][0][0] for sample in samples] == own
    assert len(set(own)) > 1 and metrics["exact_match,none"] == 0


def test_a_multiple_choice_task_compares_losses(model, tasks, rows, loaded):
    metrics, samples = evaluated(model, tasks, "local_choice")
    right = 0
    for sample, row in zip(samples, rows, strict=True):
        messages = api.from_question(question(row), [row["image"]])
        asked = model.model.request(messages, api.GenerationOptions())
        ids = [loaded.tokenizer.encode(color) for color in COLORS]
        own = model.model.generator.log_likelihoods([asked.prompt] * 3, ids, [asked.images] * 3)
        losses = [-score.total / score.tokens for score in own]
        said = [float(answer[0][0]) for answer in sample["resps"]]
        assert said == pytest.approx(losses, abs=1e-4)
        right += losses.index(min(losses)) == row["gold"]
    assert metrics["acc,none"] == right / len(rows)


def test_what_cannot_be_shown_or_asked_is_refused(model, monkeypatch):
    metadata = {"task": "t", "doc_id": 0, "repeats": 1}
    model.task_dict = {"t": {"test": [{}]}}
    sound = lambda row: [{"array": torch.zeros(3)}]  # noqa: E731
    request = Instance("generate_until", ("x", {}, sound, 0, "t", "test"), 0, metadata)
    with pytest.raises(TaskError, match="the task shows a dict; this model sees images, videos"):
        model.generate_until([request])
    with pytest.raises(TaskError, match="several rounds"):
        model.generate_until_multi_round([request])
    text = Instance("generate_until", ("x", {}, lambda row: None, 0, "t", "test"), 0, metadata)
    assert model.generate_until([text]) == [model.model.generate("x", max_new_tokens=8)]
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(TaskError, match="in one process"):
        adapter.MegatronOwl2("somewhere")
