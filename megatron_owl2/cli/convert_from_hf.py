"""Conversion of a released directory, or of LLaMA and CLIP, to a checkpoint.

--owl2 is mPLUG-Owl2, --owl1 the first mPLUG-Owl; --config of examples/owl1_7b makes LLaMA and CLIP
the start of that one.

The result starts a stage (stage.initial_checkpoint), answers (tools/generate.py) and converts back
(tools/convert_to_hf.py). Without --config the sizes are those of the directories and the paper's
abstractor; with it, its model section must agree with them (image_size may differ, to
which positions are resized, max_positions may be smaller, modality_split of mPLUG-Owl2 may share
branches that are equal, vocab_multiple, attention_dropout and the standard deviations of random
starts are free). What --adapter brings stays apart from the weights: a stage with the same
stage.lora goes on with it.
"""

import argparse
import math
import os
from pathlib import Path

from megatron_owl2.cli.command import Command, UsageError
from megatron_owl2.errors import ConversionError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--owl2", metavar="DIR", help="mPLUG-Owl2 as released")
    parser.add_argument(
        "--owl1", metavar="DIR", help="mPLUG-Owl (version 1) in its released layout"
    )
    parser.add_argument(
        "--adapter", metavar="DIR", help="peft's LoRA adapter of that model, which stays apart"
    )
    parser.add_argument(
        "--adapter-alpha",
        type=float,
        metavar="ALPHA",
        help="of an --adapter that is a checkpoint of version 1's trainer, which does not tell it",
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
    whole = {"owl2": options.owl2, "owl1": options.owl1}
    given = [(layout, directory) for layout, directory in whole.items() if directory]
    if len(given) > 1 or any(parts) == bool(given) or any(parts) != all(parts):
        raise UsageError("give --owl2 or --owl1, or both --language-model and --vision-model")
    if options.adapter and not given:
        raise UsageError("--adapter goes with --owl2 or --owl1, the model that it was made for")
    if options.overrides and not options.config:
        raise UsageError("section.key=value needs --config")
    if options.adapter_alpha is not None and not options.adapter:
        raise UsageError("--adapter-alpha goes with --adapter")
    if options.adapter_alpha is not None and not 0 < options.adapter_alpha < float("inf"):
        raise UsageError("--adapter-alpha must be a positive number")

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
    common = {"config": config, "tokenizer": options.tokenizer}
    if given:
        ((layout, directory),) = given
        adapter = {"adapter": options.adapter, "adapter_alpha": options.adapter_alpha}
        source = sources.from_released(directory, layout, **adapter, **common)
    else:
        source = sources.from_llama_and_clip(*parts, seed=options.seed, **common)
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
