"""Parity of mPLUG-Owl (version 1) with the official code's recorded outputs, under every parallel
configuration.

`python tests/helpers/owl1_parity.py` prints the worst deviations as a Markdown table. It starts
itself through torchrun, with a folder and the parallelisms of so many ranks as arguments."""

import copy
import json
import sys
from itertools import zip_longest
from pathlib import Path

import prepared  # noqa: F401
import runs_in_turn
import torch
from id_tokenizer import IdTokenizer
from official_parity import (
    PARALLELISMS,
    Deviations,
    _apart,
    follow,
    launch,
    table,
    write_worst,
)
from paths import DATA
from safetensors.torch import load_file

from megatron_owl2.config.load import load_config
from megatron_owl2.config.lora import is_adapter, parameters
from megatron_owl2.config.schema import RunConfig
from megatron_owl2.convert import adapters
from megatron_owl2.convert.mapping import rules
from megatron_owl2.convert.megatron_io import write_checkpoint
from megatron_owl2.convert.partition import unshard
from megatron_owl2.convert.sources import from_released
from megatron_owl2.convert.verify import verify as verification
from megatron_owl2.data.batch import Batch
from megatron_owl2.data.image_tokens import IGNORE_INDEX, IMAGE_TOKEN_ID
from megatron_owl2.inference.engine import Generator
from megatron_owl2.inference.loading import LoadedModel
from megatron_owl2.mcore import setup
from megatron_owl2.mcore.parallel import ParallelContext
from megatron_owl2.model.owl2 import Owl2
from megatron_owl2.training import optimizer as optim
from megatron_owl2.training import parameter_groups
from megatron_owl2.training.checkpoint import save_load
from megatron_owl2.training.step import forward_backward

OFFICIAL = DATA / "official_v1_tiny"
ADAPTER = OFFICIAL / "lora_adapter"
META = json.loads((OFFICIAL / "meta.json").read_text())
REFERENCE = load_file(OFFICIAL / "reference.safetensors")
LORA = load_file(OFFICIAL / "reference_lora.safetensors")
IMAGES = REFERENCE["batch/pixel_values"]
ORDER = META["batch_order"]
MEDIA = -1  # of an image's run in the recorded ids
TRAJECTORIES = {  # what trains in each
    "all": ["*"],
    "stage1_language_model_frozen": ["vision_model.*", "abstractor.*"],
    "stage2_language_model_only": ["embedding.*", "decoder.*", "final_norm.*", "output_layer.*"],
}
PROMPTS = ("text", "one_image", "two_images", "multi_turn")

# The largest deviation from the recording that is allowed, and how many values are compared.
BOUNDS = {
    "visual tokens": (2e-5, 4),  # 9e-6 of values up to 10.9; another processor rounds otherwise
    "logits": (1e-4, 4),
    "loss": (1e-5, 1),
    "gradients, relative": (1e-4, 98),
    "key bias gradient norms": (1e-5, 2),  # zero in exact arithmetic: softmax ignores the bias
    "AdamW losses": (1e-3, 18),
    "AdamW gradient norms, relative": (1e-3, 18),
    "greedy ids that differ": (0, 4),
    "LoRA logits": (1e-4, 2),
    "LoRA logits, merged": (1e-4, 2),
    "LoRA loss": (1e-5, 1),
    "LoRA gradients, relative": (1e-4, 8),
    "LoRA AdamW losses": (1e-3, 4),
    "LoRA AdamW gradient norms, relative": (1e-3, 4),
    "LoRA weights after 4 steps": (1e-3, 8),
}


def run(folder: Path) -> dict[str, dict[str, dict]]:
    """The worst deviation of each of BOUNDS under every parallelism: `deviation`, `where` it is and
    how many were `compared`. Writes into `folder`; raises RuntimeError if a process fails."""
    source = from_released(OFFICIAL / "hf_ckpt", adapter=ADAPTER)
    plain = from_released(OFFICIAL / "hf_ckpt")
    for name, one in {"plain": plain, "adapted": source, "merged": source.merged()}.items():
        write_checkpoint(folder / name, one.tensors, one.config)
    setup.shutdown()
    return launch(__file__, folder)


def collapsed(ids: list[int], *others: list[int], media: int = MEDIA) -> list[list[int]]:
    """Recorded ids with one placeholder for each run of `media`, and the entries of `others`
    that remain."""
    run_length = META["tokens_per_image"]
    kept, position = [], 0
    while position < len(ids):
        kept.append(position)
        position += run_length if ids[position] == media else 1
    placed = [IMAGE_TOKEN_ID if ids[p] == media else ids[p] for p in kept]
    return [placed, *([other[p] for p in kept] for other in others)]


def inputs_of(tensors: dict[str, torch.Tensor], rows: list[int]) -> dict[str, torch.Tensor]:
    """Recorded rows as `verify` takes them, without the padding of the official batch."""
    given, targets = [], []
    for row in rows:
        length = int(tensors["non_padding_mask"][row].sum()) + 1
        mask = tensors["prompt_mask"][row] * tensors["non_media_mask"][row]
        labels = tensors["input_ids"][row].clone()
        labels[1:][mask == 0] = IGNORE_INDEX
        labels[0] = IGNORE_INDEX
        ids, labels = collapsed(
            tensors["input_ids"][row, :length].tolist(), labels[:length].tolist()
        )
        given.append(torch.tensor(ids))
        targets.append(torch.tensor(labels))

    def padded(sequences: list[torch.Tensor], value: int) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=value)

    return {
        "input_ids": padded(given, 0),
        "labels": padded(targets, IGNORE_INDEX),
        "attention_mask": padded([torch.ones_like(ids) for ids in given], 0),
    }


def batch_inputs() -> dict[str, torch.Tensor]:
    recorded = {n.removeprefix("batch/"): t for n, t in REFERENCE.items() if n.startswith("batch/")}
    return inputs_of(recorded, [*range(len(ORDER))]) | {"images": IMAGES}


def lora_inputs() -> dict[str, torch.Tensor]:
    recorded = {n.removeprefix("batch/"): t for n, t in LORA.items() if n.startswith("batch/")}
    rows = META["batch_image_rows"]["two_images"]
    return inputs_of(recorded, [0, 1]) | {"images": IMAGES[rows]}


def single(inputs: dict[str, torch.Tensor], row: int, first_image: int) -> dict[str, torch.Tensor]:
    """One row of inputs with its images, the first of which is number `first_image`."""
    length = int(inputs["attention_mask"][row].sum())
    one = {name: inputs[name][row : row + 1, :length] for name in ("input_ids", "labels")}
    count = int((one["input_ids"] == IMAGE_TOKEN_ID).sum())
    images = inputs["images"][first_image : first_image + count]
    return one | ({"images": images} if count else {})


def micro_batches(inputs: dict[str, torch.Tensor], config: RunConfig, length: int) -> list[Batch]:
    """A micro-batch for each row, so that a pipeline has several in flight; all `length` long."""
    batches, first = [], 0
    for row in range(len(inputs["input_ids"])):
        one = single(inputs, row, first)
        first += len(one.get("images", ()))
        expanded, _ = verification._expand(one, config, length)
        batches.append(verification._batch(one, expanded, config).to(setup.device()))
    return batches


def build(config: RunConfig, checkpoint: Path) -> Owl2:
    """This rank's part of a checkpoint's model."""
    model = Owl2(ParallelContext(config, setup.initialize(config.parallel)), config.model)
    save_load.load_weights(checkpoint, [model])
    return model.to(setup.device())


def _measure(folder: Path, name: str) -> None:
    """Every rank's part of `run` under one parallelism."""
    runs_in_turn.join_group(name)
    overrides = PARALLELISMS[name][1]
    config = load_config(folder / "plain" / "run.yaml", overrides)
    model = build(config, folder / "plain")
    verify = verification.Verification(folder / "plain", overrides)
    found = {
        **_visual_tokens(model),
        **_outputs(verify),
        **_greedy(config, model),
        **_trajectories(config, folder / "plain"),
        **_lora(config, folder),
    }
    write_worst(found, folder / name)
    setup.shutdown()


def _visual_tokens(model: Owl2) -> dict[str, Deviations]:
    if not model.pre_process:
        return {}
    with torch.no_grad():
        tokens = model.encode_images(IMAGES.to(setup.device()))
    recorded = REFERENCE["batch/visual_tokens"]
    pairs = enumerate(zip(tokens, recorded, strict=True))
    return {"visual tokens": {f"image {i}": _apart(a, b) for i, (a, b) in pairs}}


def _outputs(verify: verification.Verification) -> dict[str, Deviations]:
    found = verify.run(batch_inputs(), gradients=True)
    if not found:  # not on rank 0
        return {"logits": {}, "loss": {}, "gradients, relative": {}, "key bias gradient norms": {}}
    official = load_file(OFFICIAL / "grads_batch.safetensors")
    whole, key_biases = {}, {}
    for name, theirs in official.items():
        ours = found[f"grad.{name}"].double()
        if name.endswith("attention.key.bias"):
            key_biases[name] = float(ours.norm())
        else:
            whole[name] = float((ours - theirs).norm() / theirs.norm())
    return {
        "logits": _logits_apart(found["logits"], REFERENCE, ORDER),
        "loss": {"batch": abs(found["loss"].item() - REFERENCE["batch/loss"].item())},
        "gradients, relative": whole,
        "key bias gradient norms": key_biases,
    }


def _logits_apart(
    logits: torch.Tensor, reference: dict[str, torch.Tensor], names: list[str], case: str = "batch"
) -> Deviations:
    lengths = (reference["batch/non_padding_mask"].sum(1) + 1).tolist()
    theirs = reference[f"{case}/logits"]
    return {
        name: _apart(logits[row, :length], theirs[row, :length])
        for row, (name, length) in enumerate(zip(names, lengths, strict=True))
    }


def _greedy(config: RunConfig, model: Owl2) -> dict[str, Deviations]:
    """With cached keys and values where the parallelism can answer, else with the whole sequence in
    every step."""
    steps = len(META["generation"]["generate_text"]["new_ids"])
    prompts = [
        collapsed(REFERENCE[f"generate_{name}/input_ids"][0].tolist())[0] for name in PROMPTS
    ]
    rows = [META["batch_image_rows"].get(name, []) for name in PROMPTS]
    if config.parallel.pipeline > 1 or config.parallel.sequence:
        found = _without_cache(config, model, prompts, rows, steps)
    else:
        loaded = LoadedModel(model, config.model, IdTokenizer(config.model.decoder.vocab_size))
        shown = [[IMAGES[row] for row in images] for images in rows]
        found = Generator(loaded).generate_ids(prompts, shown, steps)
    recorded = [META["generation"][f"generate_{name}"]["new_ids"] for name in PROMPTS]
    return {
        "greedy ids that differ": {
            name: sum(a != b for a, b in zip_longest(ours, theirs))
            for name, ours, theirs in zip(PROMPTS, found, recorded, strict=True)
        }
    }


def _without_cache(
    config: RunConfig, model: Owl2, prompts: list[list[int]], rows: list[list[int]], steps: int
) -> list[list[int]]:
    answers = []
    for prompt, images in zip(prompts, rows, strict=True):
        ids = list(prompt)
        for _ in range(steps):
            inputs = {"input_ids": torch.tensor([ids])}
            inputs |= {"images": IMAGES[images]} if images else {}
            multiple = config.parallel.tensor if config.parallel.sequence else 1
            expanded, length = verification._expand(inputs, config, multiple)
            verification._fit_config(config, expanded)
            batch = verification._batch(inputs, expanded, config).to(setup.device())
            logits = verification._forward(config, model, batch, with_labels=False)
            chosen = torch.zeros(1, dtype=torch.int64, device=setup.device())
            if logits is not None:
                chosen = logits[0, length - 1].argmax().view(1)
            torch.distributed.broadcast(chosen, src=torch.distributed.get_world_size() - 1)
            ids.append(int(chosen))
        answers.append(ids[len(prompt) :])
    return answers


def _trajectories(config: RunConfig, checkpoint: Path) -> dict[str, Deviations]:
    losses, norms = {}, {}
    for name, trainable in TRAJECTORIES.items():
        chosen = copy.deepcopy(config)
        chosen.stage.trainable = trainable
        model = build(chosen, checkpoint)
        recorded = META["adamw_trajectory"][name]
        apart = _adamw(chosen, model, batch_inputs(), recorded)
        losses |= {f"{name}, {step}": value for step, value in apart[0].items()}
        norms |= {f"{name}, {step}": value for step, value in apart[1].items()}
    return {"AdamW losses": losses, "AdamW gradient norms, relative": norms}


def _adamw(
    config: RunConfig, model: Owl2, inputs: dict[str, torch.Tensor], recorded: dict
) -> tuple[Deviations, Deviations]:
    """The recorded steps by the training step; deviations of losses and gradient norms."""
    chosen = config.optimizer
    chosen.lr = chosen.min_lr = recorded["lr"]
    chosen.warmup_steps = 0
    chosen.beta1, chosen.beta2 = recorded["betas"]
    chosen.eps, chosen.weight_decay = recorded["eps"], recorded["weight_decay"]
    chosen.clip_grad = recorded["clip_grad_norm"]
    config.train.steps = len(recorded["loss_before_each_step"])
    longest = int(max(verification._expand(inputs, config, 1)[0].lengths))
    length = -(-longest // config.parallel.tensor) * config.parallel.tensor
    batches = micro_batches(inputs, config, length)
    config.data.sequence_length, config.train.micro_batch_size = length, 1
    parameter_groups.freeze(config, [model])
    wrapped = optim.wrap_ddp([model], overlap=False)
    optimizer, scheduler = optim.build_optimizer(config, wrapped)
    for group in optimizer.param_groups:  # every parameter decays in the recording
        group["wd_mult"] = 1.0
    return follow(config, wrapped, optimizer, scheduler, batches, recorded)


def _lora(config: RunConfig, folder: Path) -> dict[str, Deviations]:
    adapted = copy.deepcopy(config)
    adapted.stage.lora = load_config(folder / "adapted" / "run.yaml").stage.lora
    adapted.stage.trainable = []
    model = build(adapted, folder / "adapted")
    found = {}
    for name, (used, one) in {
        "LoRA logits": (adapted, model),
        "LoRA logits, merged": (config, build(config, folder / "merged")),
    }.items():
        case = "merged" if name.endswith("merged") else "batch"
        logits = _logits(used, one, lora_inputs())
        found[name] = (
            {} if logits is None else _logits_apart(logits, LORA, META["lora"]["batch_rows"], case)
        )
    found |= _lora_gradients(adapted, build(adapted, folder / "adapted"))
    losses, norms = _adamw(adapted, model, lora_inputs(), META["lora"]["adamw_trajectory"])
    after = {
        name: float((tensor - LORA[f"after_4_steps/{name}"]).abs().max())
        for name, tensor in _adapter_tensors(adapted, model, gradients=False).items()
    }
    return found | {
        "LoRA AdamW losses": losses,
        "LoRA AdamW gradient norms, relative": norms,
        "LoRA weights after 4 steps": after,
    }


def _lora_gradients(config: RunConfig, model: Owl2) -> dict[str, Deviations]:
    config = copy.deepcopy(config)
    inputs = lora_inputs()
    multiple = config.parallel.tensor if config.parallel.sequence else 1
    expanded, _ = verification._expand(inputs, config, multiple)
    verification._fit_config(config, expanded)
    batch = verification._batch(inputs, expanded, config).to(setup.device())
    parameter_groups.freeze(config, [model])
    (wrapped,) = optim.wrap_ddp([model], overlap=False)
    wrapped.zero_grad_buffer()
    sums = forward_backward(config, [wrapped], iter([batch]), 1)
    torch.distributed.all_reduce(sums)
    gradients = _adapter_tensors(config, model, gradients=True)
    apart = {
        name: float((tensor - LORA[f"grad/{name}"]).norm() / LORA[f"grad/{name}"].norm())
        for name, tensor in gradients.items()
    }
    loss = abs(float(sums[0] / sums[1]) - LORA["batch/loss"].item())
    return {"LoRA gradients, relative": apart, "LoRA loss": {"batch": loss}}


def _logits(config: RunConfig, model: Owl2, inputs: dict[str, torch.Tensor]) -> torch.Tensor | None:
    """On rank 0, which may have them of the last pipeline stage."""
    config = copy.deepcopy(config)
    multiple = config.parallel.tensor if config.parallel.sequence else 1
    expanded, length = verification._expand(inputs, config, multiple)
    verification._fit_config(config, expanded)
    batch = verification._batch(inputs, expanded, config).to(setup.device())
    logits = verification._forward(config, model, batch, with_labels=False)
    results = {} if logits is None else {"logits": logits[:, :length]}
    return verification._collect(results, model).get("logits")


def _adapter_tensors(config: RunConfig, model: Owl2, *, gradients: bool) -> dict[str, torch.Tensor]:
    """A and B of all adapters, or their gradients, by the names of a live PeftModel; on rank 0."""
    found, ours = {}, dict(model.named_parameters())
    names = {rule.ours: rule for rule in rules("owl1", config.model)}
    assert all(name in names or is_adapter(name) for name in ours)
    for linear in adapters._linears(config.model, "owl1"):
        for ending, name in zip("AB", parameters(linear.target), strict=True):
            if name in ours:
                parameter = ours[name]
                tensor = parameter.main_grad if gradients else parameter.detach()
                key = f"base_model.model.{linear.modules[0]}.lora_{ending}.default.weight"
                found[key] = unshard(tensor, parameter, model.context)
    return verification._collect(found, model)


if __name__ == "__main__":
    if sys.argv[1:]:
        for name in sys.argv[2:]:
            _measure(Path(sys.argv[1]), name)
    else:
        print(table(run, BOUNDS))
