"""Conversion of a released directory, or of LLaMA and CLIP, to a checkpoint.

The result starts a stage (stage.initial_checkpoint), answers (tools/generate.py) and converts back
(tools/convert_to_hf.py). Without --config the sizes are those of the directories and the paper's
abstractor; with it, its model section must agree with them (image_size may differ, to
which positions are resized, max_positions may be smaller, modality_split may share branches that
are equal, vocab_multiple and the standard deviations of random starts are free). What --adapter
brings stays apart from the weights: a stage with the same stage.lora goes on with it.
"""

import argparse
import math
import os
from pathlib import Path

from megatron_owl2.cli.command import Command, UsageError
from megatron_owl2.errors import ConversionError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--owl2", metavar="DIR", help="released-layout directory")
    parser.add_argument(
        "--adapter", metavar="DIR", help="peft's LoRA adapter of --owl2, which stays apart"
    )
    parser.add_argument("--language-model", metavar="DIR", help="LlamaForCausalLM directory")
    parser.add_argument("--vision-model", metavar="DIR", help="CLIPModel or CLIPVisionModel")
    parser.add_argument("--config", metavar="FILE", help="run configuration (YAML)")
    parser.add_argument(
        "overrides", nargs="*", help="section.key=value or YAML files, for --config"
    )
    parser.add_argument("--tokenizer", metavar="FILE", help="SentencePiece model, if not in DIR")
    parser.add_argument("--seed", type=int, default=1234, help="of the abstractor's weights")
    parser.add_argument("--output", metavar="CKPT", required=True, help="new checkpoint directory")


def run(options: argparse.Namespace) -> int:
    parts = (options.language_model, options.vision_model)
    if (options.owl2 is None) != all(parts) or (options.owl2 and any(parts)):
        raise UsageError("give either --owl2, or both --language-model and --vision-model")
    if options.adapter and not options.owl2:
        raise UsageError("--adapter goes with --owl2, the model that it was made for")

    from megatron_owl2.mcore.setup import setup

    setup()
    from megatron_owl2.config.load import load_config
    from megatron_owl2.convert import sources
    from megatron_owl2.convert.megatron_io import write_checkpoint
    from megatron_owl2.model import position_tables

    output = Path(options.output)
    if os.path.lexists(output):
        raise ConversionError(f"{output} exists already; name a new directory or remove it")
    config = load_config(options.config, options.overrides) if options.config else None
    given = {"config": config, "tokenizer": options.tokenizer}
    if options.owl2:
        source = sources.from_owl2(options.owl2, adapter=options.adapter, **given)
    else:
        source = sources.from_llama_and_clip(*parts, seed=options.seed, **given)
    write_checkpoint(output, source.tensors, source.config, progress=True)
    if not source.config.data.tokenizer:
        print("warning: no tokenizer.model, so it cannot train or generate (--tokenizer)")
    tables = position_tables.NAMES
    sizes = (math.prod(t.shape) for n, t in source.tensors.items() if n not in tables)
    print(f"wrote {output}: {sum(sizes):,} parameters")
    if options.adapter:
        lora = source.config.stage.lora
        print(
            f"stage.lora of its adapters: targets={lora.targets} rank={lora.rank} "
            f"alpha={lora.alpha:g} dropout={lora.dropout:g}"
        )
    return 0


main = Command(
    verb="convert-from-hf",
    help=__doc__,
    add_arguments=add_arguments,
    run=run,
    interrupted="interrupted; nothing was written",
    sigterm_interrupts=True,
).main
