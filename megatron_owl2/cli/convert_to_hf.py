"""Write a checkpoint as a Hugging Face directory in safetensors.

Layout owl2 has the names of the released model; llama is the decoder's text branch as a
LlamaForCausalLM; clip is the ViT as a CLIPVisionModel.
"""

import argparse
import os
import sys


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", metavar="CKPT", required=True, help="checkpoint or run")
    parser.add_argument("--output", metavar="DIR", required=True, help="new directory")
    parser.add_argument(
        "--dtype",
        choices=["bfloat16", "float16", "float32"],
        help="of the weights; the checkpoint's own by default",
    )
    parser.add_argument("--layout", choices=["owl2", "llama", "clip"], default="owl2")
    parser.add_argument("--max-shard-gib", type=float, default=5.0, help="size of a weight file")
    arguments = parser.parse_args()

    if not 0 < arguments.max_shard_gib < float("inf"):
        parser.error("--max-shard-gib must be a positive number")

    import torch

    from megatron_owl2.convert import command
    from megatron_owl2.convert.hf_weights import export_hf
    from megatron_owl2.convert.sources import from_checkpoint
    from megatron_owl2.errors import ConversionError

    def convert() -> None:
        if os.path.lexists(arguments.output):
            raise ConversionError(f"{arguments.output} exists already; name a new directory")
        whole = from_checkpoint(arguments.checkpoint)
        export_hf(
            whole.tensors,
            whole.config.model,
            arguments.output,
            tokenizer=whole.config.data.tokenizer or None,
            layout=arguments.layout,
            dtype=getattr(torch, arguments.dtype) if arguments.dtype else None,
            max_shard_bytes=int(arguments.max_shard_gib * 1024**3),
            progress=True,
        )
        if arguments.layout != "clip" and not whole.config.data.tokenizer:
            print(
                "warning: the checkpoint has no tokenizer.model, so the directory has none either"
            )
        print(f"wrote {arguments.output}")

    return command.run(convert)


if __name__ == "__main__":
    sys.exit(main())
