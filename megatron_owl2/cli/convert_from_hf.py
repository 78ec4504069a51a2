"""Make a checkpoint from a released mPLUG-Owl2 directory, or from a LLaMA and a CLIP.

The result starts a stage (stage.initial_checkpoint), answers (tools/generate.py) and converts back
(tools/convert_to_hf.py). Without --config the sizes are those of the directories and the paper's
abstractor; with it, its model section must agree with them (image_size may differ, to
which positions are resized, max_positions may be smaller, modality_split may share branches that
are equal, and the standard deviations of random starts are free).
"""

import argparse
import math
import os
import sys
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--owl2", metavar="DIR", help="released-layout directory")
    parser.add_argument("--language-model", metavar="DIR", help="LlamaForCausalLM directory")
    parser.add_argument("--vision-model", metavar="DIR", help="CLIPModel or CLIPVisionModel")
    parser.add_argument("--config", metavar="FILE", help="run configuration (YAML)")
    parser.add_argument(
        "overrides", nargs="*", help="section.key=value or YAML files, for --config"
    )
    parser.add_argument("--tokenizer", metavar="FILE", help="SentencePiece model, if not in DIR")
    parser.add_argument("--seed", type=int, default=1234, help="of the abstractor's weights")
    parser.add_argument("--output", metavar="CKPT", required=True, help="new checkpoint directory")
    arguments = parser.parse_args()
    parts = (arguments.language_model, arguments.vision_model)
    if (arguments.owl2 is None) != all(parts) or (arguments.owl2 and any(parts)):
        parser.error("give either --owl2, or both --language-model and --vision-model")

    from megatron_owl2.config.load import load_config
    from megatron_owl2.convert import command
    from megatron_owl2.convert import sources as assemble
    from megatron_owl2.convert.megatron_io import write_checkpoint
    from megatron_owl2.errors import ConversionError
    from megatron_owl2.model import position_tables

    def convert() -> None:
        output = Path(arguments.output)
        if os.path.lexists(output):
            raise ConversionError(f"{output} exists already; name a new directory or remove it")
        config = load_config(arguments.config, arguments.overrides) if arguments.config else None
        options = {"config": config, "tokenizer": arguments.tokenizer}
        if arguments.owl2:
            whole = assemble.from_owl2(arguments.owl2, **options)
        else:
            whole = assemble.from_llama_and_clip(*parts, seed=arguments.seed, **options)
        write_checkpoint(output, whole.tensors, whole.config, progress=True)
        if not whole.config.data.tokenizer:
            print("warning: no tokenizer.model, so it cannot train or generate (--tokenizer)")
        tables = position_tables.NAMES
        sizes = (math.prod(t.shape) for n, t in whole.tensors.items() if n not in tables)
        print(f"wrote {output}: {sum(sizes):,} parameters")

    return command.run(convert)


if __name__ == "__main__":
    sys.exit(main())
