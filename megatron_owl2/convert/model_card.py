"""Model card of an export: the README.md that people and the Hub of Hugging Face read."""

import json
from pathlib import Path

from megatron_owl2.config.schema import ModelConfig
from megatron_owl2.config.templates import TEMPLATES
from megatron_owl2.data.conversation import prompt

_CARD = """\
---
library_name: transformers
pipeline_tag: image-text-to-text
tags:
- mplug-owl2
- custom_code
---

# mPLUG-Owl2

A model of the family [mPLUG-Owl2](https://arxiv.org/abs/2311.04257) for transformers 5.4 or later.
Its modelling code lies in this folder and runs with `trust_remote_code=True`. An image is {resized}
to {size} x {size} pixels and takes {tokens} of the {positions} positions, in place of its
`<|image|>` in the text.{lack}

```python
from PIL import Image
from transformers import AutoModelForCausalLM, AutoProcessor

folder = "."  # this one
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="auto")
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
prompt = {prompt}
inputs = processor(images=[Image.open("owl.jpg")], text=[prompt]).to(model.device)
answer = model.generate(**inputs, max_new_tokens=64)
print(processor.batch_decode(answer[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```

`processor.apply_chat_template(messages, tokenize=True, add_generation_prompt=True)` takes messages
in place of a prompt. Their texts stay texts, whatever they spell. In a prompt `<|image|>` is an
image and `</s>` is text; turns end where `apply_chat_template` ends them, in its ids or in the
string that it gives without `tokenize`, as long as nothing changes that string.

## Fine-tuning

The processor follows a tokenizer's keywords: `padding`, `padding_side`, `pad_to_multiple_of`,
`truncation`, `truncation_side`, `max_length`, `add_special_tokens`, `return_tensors`. It refuses to
cut an image. Training put BOS before every text, which `add_special_tokens=False` leaves out.

Keys and values have a linear for text, `multiway.0`, and one for images, `multiway.1`, so `k_proj`
and `v_proj` alone name no linear. LoRA with peft on the attention of the decoder:

```python
from peft import LoraConfig, get_peft_model

keys_and_values = [f"{{name}}_proj.multiway.{{i}}" for name in "kv" for i in (0, 1)]
config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", *keys_and_values, "o_proj"])
model = get_peft_model(model, config)
```

`gate_proj`, `up_proj` and `down_proj` are as usual; `target_modules="all-linear"` adapts ViT and
abstractor too.
"""
_RESIZED = {
    "stretch": "squashed",
    "pad": "padded to a square with the mean colour and resized",
    "crop": "resized by its shorter side and cropped",
}
_LACK = """

There is no `tokenizer.model` in this folder, as the export had none; without it the processor does
not load."""


def write_model_card(directory: Path, model: ModelConfig) -> None:
    """README.md of an export in the layout "owl2", whose other files are there already."""
    text = _CARD.format(
        tokens=model.tokens_per_image,
        positions=model.decoder.max_positions,
        resized=_RESIZED[model.image_mode],
        size=model.vision.image_size,
        prompt=json.dumps(prompt("<|image|>What is this?", TEMPLATES[model.template])),
        lack="" if (directory / "tokenizer.model").exists() else _LACK,
    )
    (directory / "README.md").write_text(text)
