"""Model card of an export: the README.md that people and the Hub of Hugging Face read."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_owl2.config.schema import ModelConfig
from megatron_owl2.convert.layouts import layout_of
from megatron_owl2.convert.provenance import TrainedStage
from megatron_owl2.convert.safetensors_io import read_json
from megatron_owl2.data.conversation import prompt
from megatron_owl2.data.shards.records import IMAGE_PLACEHOLDER
from megatron_owl2.errors import ConversionError

_USE = """\
# {name}

A model of the family [{name}]({paper}) for transformers 5.4 or later.
Its modelling code lies in this folder and runs with `trust_remote_code=True`. An image is {resized}
to {size} x {size} pixels and takes {tokens} of the {positions} positions, in place of its
`{placeholder}` in the text.{video}{lack}

```python
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

folder = "."  # this one
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, dtype="auto")
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
prompt = {prompt}
inputs = processor(images=[Image.open("owl.jpg")], text=[prompt]).to(model.device)
answer = model.generate(**inputs, max_new_tokens=64)
print(processor.batch_decode(answer[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```

`processor.apply_chat_template(messages, tokenize=True, add_generation_prompt=True)` takes messages
in place of a prompt. Their texts stay texts, whatever they spell. In a prompt `{placeholder}` is an
image and `</s>` is text; turns end where `apply_chat_template` ends them, in its ids or in the
string that it gives without `tokenize`, as long as nothing changes that string.
`pipeline("image-text-to-text", model=folder, trust_remote_code=True)` takes both.

## Fine-tuning

The processor follows a tokenizer's keywords: `padding`, `padding_side`, `pad_to_multiple_of`,
`truncation`, `truncation_side`, `max_length`, `add_special_tokens`, `return_tensors`. It refuses to
cut an image. Training put BOS before every text, which `add_special_tokens=False` leaves out.

{lora}

`gate_proj`, `up_proj` and `down_proj` are as usual; `target_modules="all-linear"` adapts ViT and
abstractor too.
"""
_SPLIT_LORA = """\
Keys and values have a linear for text, `multiway.0`, and one for images, `multiway.1`, so `k_proj`
and `v_proj` alone name no linear. LoRA with peft on the attention of the decoder:

```python
from peft import LoraConfig, get_peft_model

keys_and_values = [f"{name}_proj.multiway.{i}" for name in "kv" for i in (0, 1)]
config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", *keys_and_values, "o_proj"])
model = get_peft_model(model, config)
```"""
_PLAIN_LORA = """\
LoRA with peft, on what the released training script adapts:

```python
from peft import LoraConfig, get_peft_model

config = LoraConfig(r=8, lora_alpha=32, target_modules=r".*language_model.*\\.(q_proj|v_proj)")
model = get_peft_model(model, config)
```"""
# What a card says of the model by the layout of its directory.
_KINDS = {
    "owl2": {
        "name": "mPLUG-Owl2",
        "paper": "https://arxiv.org/abs/2311.04257",
        "placeholder": "<|image|>",
        "lora": _SPLIT_LORA,
    },
    "owl1": {
        "name": "mPLUG-Owl",
        "paper": "https://arxiv.org/abs/2304.14178",
        "placeholder": "<image>",
        "lora": _PLAIN_LORA,
    },
}
_RESIZED = {
    "stretch": "squashed",
    "pad": "padded to a square with the mean colour and resized",
    "crop": "resized by its shorter side and cropped",
}
_VIDEO = """ A video takes as many
positions in place of its `<|video|>`; `videos=[[frame, frame, ...]]` of the processor are its
frames, of which it takes four."""
_LACK = """

There is no `tokenizer.model` in this folder, as the export had none; without it the processor does
not load."""
_LICENSE = """\
## License

The weights stand under {}, and under the terms of what they were made from: the models that
training started from and the data that it read. The modelling code in this folder is under
Apache-2.0.
"""
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_NO_SCORES = {"n", "majority"}  # of a scores.json's overall row


@dataclass(frozen=True)
class CardFacts:
    """What a card says beyond the model itself: names on the Hub, and how the model came about.

    `license`, `base_models` and `datasets` are the Hub's identifiers; `scores` are the contents of
    scores.json files of `owl2 evaluate`. Raises ConversionError for what is no identifier.
    """

    license: str = ""
    base_models: Sequence[str] = ()
    datasets: Sequence[str] = ()
    scores: Sequence[dict] = ()
    stages: Sequence[TrainedStage] = ()

    def __post_init__(self):
        names = {"license": [self.license] if self.license else []}
        names |= {"base-model": self.base_models, "dataset": self.datasets}
        for option, given in names.items():
            if wrong := [name for name in given if not _NAME.fullmatch(name)]:
                raise ConversionError(
                    f"--{option} {wrong[0]!r} is no identifier of the Hub, such as llama2 or "
                    "meta-llama/Llama-2-7b-hf"
                )


def read_scores(path: str | Path) -> dict:
    """A scores.json of `owl2 evaluate`; raises ConversionError for any other file."""
    scores = read_json(Path(path))
    if not isinstance(scores.get("task"), str) or not isinstance(scores.get("overall"), dict):
        raise ConversionError(
            f"{path} has no scores of a task; give a scores.json that owl2 evaluate wrote"
        )
    return scores


def write_model_card(directory: Path, model: ModelConfig, facts: CardFacts | None = None) -> None:
    """README.md of an export of a whole model, whose other files are there already."""
    facts, kind = facts or CardFacts(), _KINDS[layout_of(model)]
    question = prompt(f"{IMAGE_PLACEHOLDER}What is this?", model.conversation)
    use = _USE.format(
        **kind,
        tokens=model.tokens_per_image,
        positions=model.decoder.max_positions,
        resized=_RESIZED[model.image_mode],
        size=model.vision.image_size,
        prompt=json.dumps(question.replace(IMAGE_PLACEHOLDER, kind["placeholder"])),
        video=_VIDEO if model.vision.temporal else "",
        lack="" if (directory / "tokenizer.model").exists() else _LACK,
    )
    name = kind["name"]
    named = f"the license `{facts.license}`" if facts.license else "no license that is named here"
    sections = [use, _training(facts), _data(facts), _scores(facts), _LICENSE.format(named)]
    text = f"---\n{_front_matter(facts, name)}---\n\n" + "\n".join(filter(None, sections))
    (directory / "README.md").write_text(text, encoding="utf-8")


def _front_matter(facts: CardFacts, name: str) -> str:
    """The settings that the Hub reads."""
    settings = {
        "license": facts.license,
        "base_model": list(facts.base_models),
        "datasets": list(facts.datasets),
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": [name.lower(), "custom_code"],
    }
    return yaml.safe_dump({k: v for k, v in settings.items() if v}, sort_keys=False)


def _training(facts: CardFacts) -> str:
    """The configuration of every stage, one column each."""
    if not facts.stages:
        return ""
    rows: dict[str, list[Any]] = {}
    for number, stage in enumerate(facts.stages, 1):
        config = stage.config
        found = {
            "setting": f"{number}. {config.stage.name}",
            "steps": f"{stage.step:,}",
            "global batch size": f"{config.train.global_batch_size:,}"
            + (" packed rows" if config.data.packing else ""),
            "positions of a row": f"{config.data.sequence_length:,}",
            "image size": config.model.vision.image_size,
            "learning rate": f"{config.optimizer.lr:g} to {config.optimizer.min_lr:g}",
            "warm-up steps": f"{config.optimizer.warmup_steps:,}",
            "weight decay": f"{config.optimizer.weight_decay:g}",
            "precision": config.train.precision,
            "seed": config.train.seed,
            "trainable": " ".join(f"`{pattern}`" for pattern in config.stage.trainable) or "-",
            "frozen": " ".join(f"`{pattern}`" for pattern in config.stage.frozen) or "-",
            "LoRA": f"rank {config.stage.lora.rank}" if config.stage.lora.targets else "-",
        }
        for name, value in found.items():
            rows.setdefault(name, []).append(value)
    return "## Training\n\n" + _table([[name, *values] for name, values in rows.items()])


def _data(facts: CardFacts) -> str:
    """The sources of every stage by the names of their folders, which say nothing of a machine."""
    rows = [
        [
            f"{number}. {stage.config.stage.name}",
            source["path"].rstrip("/").rpartition("/")[2],
            f"{source['samples']:,}",
            f"{source['weight']:.2%}",
        ]
        for number, stage in enumerate(facts.stages, 1)
        for source in stage.sources
    ]
    head = ["stage", "source", "samples", "share of the mixture"]
    return "## Training data\n\n" + _table([head, *rows]) if rows else ""


def _scores(facts: CardFacts) -> str:
    rows = [["benchmark", "score", "questions", "asked"]]
    for scores in facts.scores:
        overall = scores["overall"]
        numbers = [
            f"{name} {value:.2f}"
            for name, value in overall.items()
            if isinstance(value, int | float) and name not in _NO_SCORES
        ]
        asked = [f"rule `{scores['variant']}`"] if scores.get("variant") else []
        asked += ["without images"] if scores.get("blind") else []
        asked += [f"the first {scores['limit']} questions"] if scores.get("limit") else []
        rows.append(
            [scores["task"], ", ".join(numbers), overall.get("n", "-"), ", ".join(asked) or "-"]
        )
    return "## Scores\n\n" + _table(rows) if facts.scores else ""


def _table(rows: Sequence[Sequence[Any]]) -> str:
    """A table in Markdown, the first row its head."""
    cells = [[str(cell).replace("|", r"\|").replace("\n", " ") for cell in row] for row in rows]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return "\n".join([lines[0], "|---" * len(cells[0]) + "|", *lines[1:], ""])
