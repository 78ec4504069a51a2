"""Export of a checkpoint as a Hugging Face directory in safetensors.

Layout owl2 has the names of the released mPLUG-Owl2, owl1 those of the first mPLUG-Owl; llama is
the decoder's text branch as a LlamaForCausalLM; clip is the ViT as a CLIPVisionModel. Adapters
(stage.lora) are merged into the weights; with --adapter they alone are written, in peft's layout
for the exported model.
"""

import argparse
import os

from megatron_owl2.cli.command import Command, UsageError
from megatron_owl2.errors import ConversionError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", metavar="CKPT", required=True, help="checkpoint or run")
    parser.add_argument("--output", metavar="DIR", required=True, help="new directory")
    parser.add_argument(
        "--dtype",
        choices=["bfloat16", "float16", "float32"],
        help="of the weights; the checkpoint's own by default",
    )
    parser.add_argument(
        "--layout",
        choices=["owl2", "owl1", "llama", "clip"],
        help="by default that of the two released models that can hold this one",
    )
    parser.add_argument("--adapter", action="store_true", help="write only the LoRA adapters")
    card = parser.add_argument_group("model card", "of a whole model; its README.md says this too")
    card.add_argument("--license", default="", metavar="ID", help="as the Hub names it: llama2")
    for option, what in (("base-model", "training started from"), ("dataset", "it was trained on")):
        card.add_argument(
            f"--{option}", nargs="+", default=[], metavar="ID", help=f"on the Hub, what {what}"
        )
    card.add_argument(
        "--scores", nargs="+", default=[], metavar="FILE", help="scores.json of owl2 evaluate"
    )
    parser.add_argument("--max-shard-gib", type=float, default=5.0, help="size of a weight file")


def run(options: argparse.Namespace) -> int:
    if not 0 < options.max_shard_gib < float("inf"):
        raise UsageError("--max-shard-gib must be a positive number")
    if options.adapter and options.layout:
        raise UsageError("--adapter has the names of the model's own layout; leave out --layout")

    given = (options.license, *options.base_model, *options.dataset, *options.scores)
    if any(given) and (options.layout in ("llama", "clip") or options.adapter):
        raise UsageError("only a whole model has a model card, and --adapter has none")

    import torch

    from megatron_owl2.mcore.setup import setup

    setup()
    from megatron_owl2.convert.adapters import export_adapter
    from megatron_owl2.convert.hf_weights import export_hf
    from megatron_owl2.convert.layouts import layout_of
    from megatron_owl2.convert.model_card import CardFacts, read_scores
    from megatron_owl2.convert.provenance import trained_stages
    from megatron_owl2.convert.sources import from_checkpoint

    if os.path.lexists(options.output):
        raise ConversionError(f"{options.output} exists already; name a new directory")
    source = from_checkpoint(options.checkpoint)
    dtype = getattr(torch, options.dtype) if options.dtype else None
    if options.adapter:
        lora = source.config.stage.lora
        export_adapter(source.tensors, source.config.model, lora, options.output, dtype=dtype)
        print(f"wrote {options.output}")
        # Released directories of version 1 are asked by other rules than they were trained by.
        if layout_of(source.config.model) == "owl1":
            rules = source.config.model.tokenization
            print(f"it was trained with model.tokenization={rules}, which its model must name too")
        return 0
    layout = options.layout or layout_of(source.config.model)
    facts = CardFacts(
        license=options.license,
        base_models=options.base_model,
        datasets=options.dataset,
        scores=[read_scores(file) for file in options.scores],
        stages=trained_stages(options.checkpoint),
    )
    export_hf(
        source.merged(dtype).tensors,
        source.config.model,
        options.output,
        tokenizer=source.config.data.tokenizer or None,
        layout=layout,
        dtype=dtype,
        max_shard_bytes=int(options.max_shard_gib * 1024**3),
        facts=facts,
        progress=True,
    )
    if layout != "clip" and not source.config.data.tokenizer:
        print("warning: the checkpoint has no tokenizer.model, so the directory has none either")
    print(f"wrote {options.output}")
    return 0


main = Command(
    verb="convert-to-hf",
    help=__doc__,
    add_arguments=add_arguments,
    run=run,
    interrupted="interrupted; nothing was written",
    sigterm_interrupts=True,
).main
