"""The tiny recipes of version 1 from corpus to answer, shortened: both stages learn, what is frozen
stays, and the export answers."""

import pytest
import stored
import tiny_run
from paths import EXAMPLES
from processes import killed_by_errors, start, torchrun
from tool import run

from data_prep import shapes
from megatron_owl2.config.lora import is_adapter
from megatron_owl2.training.checkpoint import directories

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

HELD_OUT = ("questions", "captions", "text")
INPUTS = {  # shards: format and file of the corpus
    "pairs": ("img2dataset", "pairs"),
    "retellings": ("conversations", "text/sharegpt_retellings.json"),
    "questions": ("conversations", "instructions/llava_shapes.json"),
    "captions": ("conversations", "instructions/llava_captions.json"),
    "text": ("conversations", "text/sharegpt_instructions.json"),
    "seen": ("coco", "eval/seen/captions_val.json"),
    "heldout": ("coco", "eval/heldout/captions_val.json"),
}
IMAGES = {"questions": "instructions", "captions": "instructions"}
IMAGES |= {name: f"eval/{name}/images" for name in ("seen", "heldout")}
STAGES = {  # ranks, recipe, overrides
    "text": (
        1,
        "tiny/text",
        [
            *("train.steps=40", "train.global_batch_size=32"),
            *("data.packing=false", "data.sequence_length=96"),
        ],
    ),
    "pretrain": (2, "owl1_tiny/pretrain", ["train.steps=45", "validation.interval=15"]),
    "finetune": (2, "owl1_tiny/finetune", ["train.steps=30", "validation.interval=15"]),
}
SHORT = ["validation.samples=20", "train.log_interval=5"]


def shard(folder, name):
    kind, source = INPUTS[name]
    given = ["--format", kind, "--input", folder / "corpus" / source, "--workers", "1"]
    if name in IMAGES:
        given += ["--images", folder / "corpus" / IMAGES[name]]
    held = ["--hold-out", "20"] if name in HELD_OUT else []
    done = run("preprocess_data", *given, *held, "--output", folder / "shards" / name)
    assert done.returncode == 0, done.stderr
    if held:
        output = folder / "shards" / "validation" / name
        done = run("preprocess_data", *given, *held, "--only-held-out", "--output", output)
        assert done.returncode == 0, done.stderr


def train(folder, name):
    ranks, recipe, overrides = STAGES[name]
    batch = "train.micro_batch_size=32"
    options = ["--config", EXAMPLES / f"{recipe}.yaml", *overrides, *SHORT, batch]
    command = torchrun(ranks, "-m", "megatron_owl2.train", *options)[1:]
    with start(command, ranks, folder=folder) as job, killed_by_errors(job):
        _, err = job.communicate(timeout=300)
    assert job.returncode == 0, err[-5000:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A directory as examples/owl1.sh makes it."""
    folder = tmp_path_factory.mktemp("recipes")
    sizes = shapes.Parameters(seed=7, pairs=600, instructions=200, texts=300, eval=40)
    shapes.build_corpus(folder / "corpus", sizes)
    for name in INPUTS:
        shard(folder, name)
    train(folder, "text")
    for layout, directory in (("llama", "start/llama"), ("clip", "start/clip")):
        given = ("--checkpoint", folder / "runs/text", "--output", folder / directory)
        assert run("convert_to_hf", *given, "--layout", layout).returncode == 0
    done = run(
        "convert_from_hf",
        *("--vision-model", folder / "start/clip", "--language-model", folder / "start/llama"),
        *("--config", EXAMPLES / "owl1_tiny/pretrain.yaml"),
        *("--tokenizer", folder / "corpus/tokenizer/tokenizer.model"),
        *("--output", folder / "checkpoints/start"),
    )
    assert done.returncode == 0, done.stderr
    for name in ("pretrain", "finetune"):
        train(folder, name)
    return folder


def test_both_stages_learn(folder):
    for name in ("pretrain", "finetune"):
        first, *_, last = tiny_run.rows(folder / "runs" / name)
        assert last["loss"] < 0.8 * first["loss"], name


def weights(path):
    found = stored.read(directories.resolve(path))
    return {name: tensor for name, tensor in found.items() if not name.startswith("optimizer.")}


def test_what_is_frozen_stays_as_it_was(folder):
    start, pretrained, tuned = (
        weights(folder / name) for name in ("checkpoints/start", "runs/pretrain", "runs/finetune")
    )
    changed = {name for name in start if not start[name].equal(pretrained[name])}
    learnt = {name for name in start if name.startswith(("vision_model.", "abstractor."))}
    # Softmax ignores the bias of a key: its gradient is nothing but rounding.
    assert changed >= {n for n in learnt if not n.endswith("key.bias")} and changed <= learnt
    assert all(pretrained[name].equal(tuned[name]) for name in pretrained)
    added = tuned.keys() - pretrained.keys()
    # A and B of two linears in each of three layers.
    assert len(added) == 12 and all(map(is_adapter, added))


def test_every_step_has_as_many_texts_as_images(folder):
    for row in tiny_run.rows(folder / "runs/finetune"):
        *images, text = [source["seen"] for source in row["sources"]]
        assert sum(images) == text == 32 * row["step"]


def test_the_export_is_the_run_and_answers_in_its_template(folder):
    model = folder / "model"
    done = run("convert_to_hf", "--checkpoint", folder / "runs/finetune", "--output", model)
    assert done.returncode == 0, done.stderr
    image = next((folder / "corpus/eval/seen/images").glob("*.jpg"))
    answers = []
    for checkpoint in (folder / "runs/finetune", model):
        question = ("--image", image, "--prompt", "how many shapes are there ?")
        done = run("generate", "--checkpoint", checkpoint, *question, "--max-new-tokens", "8")
        assert done.returncode == 0, done.stderr
        answers.append(done.stdout)
    assert answers[0] == answers[1] and answers[0].strip()
