"""Parity with the official code's recorded outputs, under every parallel configuration.

`python tests/helpers/official_parity.py` prints the worst deviations as a Markdown table. It
starts itself through torchrun, with a folder and the parallelisms of so many ranks as arguments."""

import json
import sys
import tempfile
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path

import prepared  # noqa: F401
import runs_in_turn
import torch
from id_tokenizer import IdTokenizer
from paths import DATA
from processes import run_ranks
from safetensors.torch import load_file

from megatron_owl2.config.load import load_config, save_config
from megatron_owl2.config.schema import RunConfig
from megatron_owl2.convert.hf_config import read_model
from megatron_owl2.convert.hf_weights import load_hf_weights
from megatron_owl2.convert.verify import verify as verification
from megatron_owl2.data.batch import Batch
from megatron_owl2.data.image_tokens import IMAGE_TOKEN_ID
from megatron_owl2.inference.engine import Generator
from megatron_owl2.inference.loading import LoadedModel
from megatron_owl2.mcore import setup
from megatron_owl2.mcore.parallel import ParallelContext
from megatron_owl2.model.owl2 import Owl2
from megatron_owl2.training import optimizer as optim
from megatron_owl2.training import parameter_groups
from megatron_owl2.training.checkpoint import save_load
from megatron_owl2.training.step import forward_backward, gradient_norm, update

OFFICIAL = DATA / "official_tiny"
META = json.loads((OFFICIAL / "meta.json").read_text())
REFERENCE = load_file(OFFICIAL / "reference.safetensors")
IMAGES = REFERENCE["batch/images"]
SINGLES = [f"single_{sample}" for sample in META["batch_order"]]
CASES = ["batch", "frames_list", *SINGLES]

PARALLELISMS = {  # processes, overrides
    "one process": (1, []),
    "TP 2": (2, ["parallel.tensor=2"]),
    "TP 2 + SP": (2, ["parallel.tensor=2", "parallel.sequence=true"]),
    "PP 2": (2, ["parallel.pipeline=2"]),
    "recompute": (1, ["parallel.recompute=full"]),
    "TP 2 + SP + recompute": (
        2,
        ["parallel.tensor=2", "parallel.sequence=true", "parallel.recompute=full"],
    ),
    "PP 2 + recompute": (2, ["parallel.pipeline=2", "parallel.recompute=full"]),
}

# The largest deviation from the recording that is allowed (absolute where nothing else is said),
# and how many values are compared. Both sides are fp32, so only the order of sums may part them:
# on a CPU 2e-5 of logits up to 9, and 3e-6 of a gradient. The bounds of AdamW also tell which
# parameters decay: with the decoder's norms spared, losses are 7e-4 and gradient norms 2e-4 off.
BOUNDS = {
    "ViT features": (1e-5, 6),
    "visual tokens": (1e-5, 6),
    "logits": (1e-4, 7),
    "loss": (1e-5, 7),
    "gradients, relative": (1e-4, 29),
    "gradient norms, relative": (1e-4, 106),
    "key bias gradient norms": (1e-5, 2),  # zero in exact arithmetic: softmax ignores the bias
    "AdamW losses": (1e-4, 6),
    "AdamW gradient norms, relative": (1e-4, 6),
    "greedy ids that differ": (0, 4),
}

# A factor on the rate that changes nothing but gives the decoder's norms their own group.
_OWN_GROUP = 1 + 1e-9

Deviations = dict[str, float]
Bounds = dict[str, tuple[float, int]]
Verify = Callable[..., dict[str, torch.Tensor]]


def run(folder: Path) -> dict[str, dict[str, dict]]:
    """The worst deviation of each of BOUNDS under every parallelism: `deviation`, `where` it is and
    how many were `compared`. Writes into `folder`; raises RuntimeError if a process fails."""
    save_config(recorded_config(), folder / "run.yaml")
    return launch(__file__, folder)


def launch(script: str, folder: Path) -> dict[str, dict[str, dict]]:
    """What a script of parity writes to `folder / NAME / worst.json` under every parallelism."""
    for ranks in (1, 2):
        names = [name for name, (processes, _) in PARALLELISMS.items() if processes == ranks]
        done = run_ranks(ranks, script, folder, *names, timeout=900)
        if done.returncode != 0:
            raise RuntimeError(f"{names} ended with {done.returncode}:\n{done.stderr}")
    return {name: json.loads((folder / name / "worst.json").read_text()) for name in PARALLELISMS}


def write_worst(found: dict[str, Deviations], folder: Path) -> None:
    """The worst of the deviations of each quantity, by rank 0, for `launch`."""
    if torch.distributed.get_rank() == 0:
        folder.mkdir(exist_ok=True)
        worst = {quantity: _worst(deviations) for quantity, deviations in found.items()}
        (folder / "worst.json").write_text(json.dumps(worst, indent=1))


def beyond(found: dict[str, dict], bounds: Bounds) -> dict[str, dict]:
    """What is beyond its bound; AssertionError if not just what `bounds` has was compared."""
    compared = {quantity: worst["compared"] for quantity, worst in found.items()}
    assert compared == {quantity: count for quantity, (_, count) in bounds.items()}
    return {
        quantity: found[quantity]
        for quantity, (bound, _) in bounds.items()
        if not found[quantity]["deviation"] <= bound  # true of NaN
    }


def table(run: Callable[[Path], dict[str, dict[str, dict]]], bounds: Bounds) -> str:
    """The worst deviations under all parallelisms, one row per quantity, in Markdown."""
    with tempfile.TemporaryDirectory() as folder:
        found = run(Path(folder))
    lines = [f"| largest deviation | allowed | {' | '.join(PARALLELISMS)} |"]
    lines.append("|---" * (len(PARALLELISMS) + 2) + "|")
    for quantity, (bound, _) in bounds.items():
        cells = [f"{found[name][quantity]['deviation']:.2g}" for name in PARALLELISMS]
        lines.append(f"| {quantity} | {bound:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def case_inputs(case: str) -> dict[str, torch.Tensor]:
    """The recorded inputs of a case, as `verify` takes them."""
    names = ("input_ids", "attention_mask", "labels")
    inputs = {n: REFERENCE[f"{case}/{n}"] for n in names if f"{case}/{n}" in REFERENCE}
    if case == "batch":
        inputs["images"] = IMAGES
    elif case == "frames_list":
        rows = META["frames_list_image_rows"]
        inputs["images"] = IMAGES[sum(rows, [])]
        inputs["images_per_placeholder"] = torch.tensor([len(row) for row in rows])
    elif case != "single_text_only":
        inputs["images"] = IMAGES[META["batch_image_slots"][case.removeprefix("single_")]]
    return inputs


def micro_batch(case: str, config: RunConfig, multiple_of: int = 1) -> Batch:
    """A case as the training step takes it, padded to a multiple of so many positions."""
    inputs = case_inputs(case)
    expanded, _ = verification._expand(inputs, config, multiple_of)
    return verification._batch(inputs, expanded, config).to(setup.device())


def build(config: RunConfig, directory: Path) -> Owl2:
    """This rank's part of the model with the weights of a Hugging Face directory."""
    groups = setup.initialize(config.parallel)
    model = Owl2(ParallelContext(config, groups), config.model).to(setup.device())
    load_hf_weights(directory, model)
    return model


def recorded_config() -> RunConfig:
    """The tiny model with the settings of the recorded AdamW steps."""
    config = RunConfig(model=read_model(OFFICIAL / "hf_ckpt"))
    recorded = META["adamw_trajectory"]
    config.train.precision = "fp32"
    config.train.steps = len(recorded["loss_before_each_step"])
    chosen = config.optimizer
    chosen.lr = chosen.min_lr = recorded["lr"]
    chosen.warmup_steps = 0
    chosen.beta1, chosen.beta2 = recorded["betas"]
    chosen.eps, chosen.weight_decay = recorded["eps"], recorded["weight_decay"]
    chosen.clip_grad = recorded["clip_grad_norm"]
    config.stage.rates = {"decoder.*norm.weight_*": _OWN_GROUP, "final_norm.weight": _OWN_GROUP}
    return config


def _measure(folder: Path, name: str) -> None:
    """Every rank's part of `run` under one parallelism."""
    runs_in_turn.join_group(name)
    overrides = PARALLELISMS[name][1]
    config = load_config(folder / "run.yaml", overrides)
    folder = folder / name
    folder.mkdir(exist_ok=True)
    model = build(config, OFFICIAL / "hf_ckpt")
    save_load.save(folder / "checkpoint", [model], config)

    def verify(inputs: dict[str, torch.Tensor], **options) -> dict[str, torch.Tensor]:
        return verification.verify(folder / "checkpoint", inputs, overrides, **options)

    found = {
        **_vision(model),
        **_outputs(verify),
        **_gradients(verify),
        **_greedy(config, model),
        **_adamw(config, model),  # last, as it changes the weights
    }
    write_worst(found, folder)
    setup.shutdown()


def _worst(deviations: Deviations) -> dict:
    values = torch.tensor([*deviations.values()], dtype=torch.float64)
    index = int(values.argmax())  # a NaN, where there is one
    where = [*deviations][index]
    return {"deviation": deviations[where], "where": where, "compared": len(deviations)}


def _vision(model: Owl2) -> dict[str, Deviations]:
    if not model.pre_process:
        return {}
    with torch.no_grad():
        features = model.vision_model(IMAGES.to(setup.device())).transpose(0, 1)
        tokens = model.encode_images(IMAGES.to(setup.device()))
    pairs = {
        "ViT features": (features, REFERENCE["batch/vit_features"]),
        "visual tokens": (tokens, REFERENCE["batch/visual_tokens"]),
    }
    return {
        quantity: {f"image {i}": _apart(a, b) for i, (a, b) in enumerate(zip(*pair, strict=True))}
        for quantity, pair in pairs.items()
    }


def _outputs(verify: Verify) -> dict[str, Deviations]:
    logits, losses = {}, {}
    for case in CASES:
        found = verify(case_inputs(case))
        if not found:  # not on rank 0
            continue
        reference = REFERENCE[f"{case}/logits"]
        everywhere = torch.ones(reference.shape[:2], dtype=torch.bool)
        valid = REFERENCE.get(f"{case}/expanded_attention_mask", everywhere)
        logits[case] = _apart(found["logits"][valid], reference[valid])
        losses[case] = _apart(found["loss"], REFERENCE[f"{case}/loss"])
    return {"logits": logits, "loss": losses}


def _gradients(verify: Verify) -> dict[str, Deviations]:
    found = verify(case_inputs("batch"), gradients=True)
    whole, norms, key_biases = {}, {}, {}
    official = load_file(OFFICIAL / "grads_batch.safetensors")
    for name, statistics in META["grad_stats_all_params"].items() if found else ():
        gradient, norm = found[f"grad.{name}"].double(), statistics["l2"]
        if name.endswith("attention.key.bias"):
            key_biases[name] = float(gradient.norm())
            continue
        norms[name] = abs(float(gradient.norm()) - norm) / norm
        if name in official:
            whole[name] = float((gradient - official[name]).norm() / official[name].norm())
    return {
        "gradients, relative": whole,
        "gradient norms, relative": norms,
        "key bias gradient norms": key_biases,
    }


def _greedy(config: RunConfig, model: Owl2) -> dict[str, Deviations]:
    """With cached keys and values where the parallelism can answer, else with the whole sequence in
    every step."""
    recorded = META["generation"]
    prompts = [recorded[sample]["prompt_ids"] for sample in recorded]
    images = [list(IMAGES[META["batch_image_slots"][sample]]) for sample in recorded]
    steps = len(recorded["text_only"]["new_ids"])
    if config.parallel.pipeline > 1 or config.parallel.sequence:
        found = _without_cache(config, model, prompts, sum(images, []), steps)
    else:
        # The image of the text-only sample is a dummy, which takes its turn but is not shown.
        pairs = zip(prompts, images, strict=True)
        shown = [row if IMAGE_TOKEN_ID in ids else [] for ids, row in pairs]
        loaded = LoadedModel(model, config.model, IdTokenizer(config.model.decoder.vocab_size))
        found = Generator(loaded).generate_ids(prompts, shown, steps)
    differ = {
        sample: sum(a != b for a, b in zip_longest(ids, recorded[sample]["new_ids"]))
        for sample, ids in zip(recorded, found, strict=True)
    }
    return {"greedy ids that differ": differ}


def _without_cache(
    config: RunConfig,
    model: Owl2,
    prompts: list[list[int]],
    images: list[torch.Tensor],
    steps: int,
) -> list[list[int]]:
    rows = [torch.tensor(prompt) for prompt in prompts]
    multiple_of = config.parallel.tensor if config.parallel.sequence else 1
    for _ in range(steps):
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        lengths = torch.tensor([len(row) for row in rows]).unsqueeze(1)
        mask = torch.arange(ids.shape[1]) < lengths
        inputs = {"input_ids": ids, "attention_mask": mask, "images": torch.stack(images)}
        expanded, _ = verification._expand(inputs, config, multiple_of)
        verification._fit_config(config, expanded)
        batch = verification._batch(inputs, expanded, config).to(setup.device())
        logits = verification._forward(config, model, batch, with_labels=False)
        chosen = torch.zeros(len(rows), dtype=torch.int64, device=setup.device())
        if logits is not None:
            last = expanded.valid.sum(1) - 1
            chosen = logits[torch.arange(len(rows)), last].argmax(-1)
        torch.distributed.broadcast(chosen, src=torch.distributed.get_world_size() - 1)
        rows = [torch.cat([row, new.view(1)]) for row, new in zip(rows, chosen.cpu(), strict=True)]
    return [row[-steps:].tolist() for row in rows]


def _adamw(config: RunConfig, model: Owl2) -> dict[str, Deviations]:
    """The recorded steps on `batch`, by the training step, with a micro-batch for each sample so
    that a pipeline has several in flight."""
    tensor = config.parallel.tensor
    length = -(-REFERENCE["batch/logits"].shape[1] // tensor) * tensor
    batches = [micro_batch(case, config, multiple_of=length) for case in SINGLES]
    config.data.sequence_length, config.train.micro_batch_size = length, 1
    parameter_groups.freeze(config, [model])
    wrapped = optim.wrap_ddp([model], overlap=False)
    optimizer, scheduler = optim.build_optimizer(config, wrapped)
    # One-dimensional weights do not decay here. The recording spared only biases and LayerNorms
    # (`optimizer_no_decay_params`), so the decoder's RMSNorms have to decay for once.
    for group in optimizer.param_groups:
        if group["lr_mult"] == _OWN_GROUP:
            group["wd_mult"] = 1.0
    losses, norms = follow(config, wrapped, optimizer, scheduler, batches, META["adamw_trajectory"])
    return {"AdamW losses": losses, "AdamW gradient norms, relative": norms}


def follow(
    config: RunConfig, wrapped, optimizer, scheduler, batches: list[Batch], recorded: dict
) -> tuple[Deviations, Deviations]:
    """Deviations of losses and gradient norms from those of recorded steps on the same batches."""
    losses, norms = {}, {}
    wanted = zip(recorded["loss_before_each_step"], recorded["grad_norm_before_clip"], strict=True)
    for step, (official_loss, official_norm) in enumerate(wanted):
        for chunk in wrapped:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        sums = forward_backward(config, wrapped, iter(batches), len(batches))
        torch.distributed.all_reduce(sums)  # tensor ranks have the same, early stages zeros
        scheduler.step(1)
        norm = gradient_norm(optimizer)
        update(optimizer, norm)
        losses[f"step {step}"] = abs(float(sums[0] / sums[1]) - official_loss)
        norms[f"step {step}"] = abs(norm - official_norm) / official_norm
    return losses, norms


def _apart(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest absolute difference of two tensors of the same shape."""
    assert ours.shape == theirs.shape, f"{list(ours.shape)} against {list(theirs.shape)}"
    return float((ours.cpu() - theirs).abs().max())


if __name__ == "__main__":
    if sys.argv[1:]:
        for name in sys.argv[2:]:
            _measure(Path(sys.argv[1]), name)
    else:
        print(table(run, BOUNDS))
