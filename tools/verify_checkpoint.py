"""Compute logits, loss and gradients of a checkpoint for the released model's raw inputs.

Inputs (safetensors): input_ids [b, s] with -200 for an image, images [n, 3, H, W] normalised, and
optionally attention_mask, labels [b, s]. The result holds logits, loss and, with --gradients,
grad.<name in the released model> for every parameter, the same under every parallel layout:

    torchrun --nproc-per-node 2 tools/verify_checkpoint.py --checkpoint CKPT \\
        --inputs batch.safetensors --output result.safetensors --gradients parallel.tensor=2
"""

import argparse
import os
import sys


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", metavar="CKPT", required=True, help="checkpoint or run")
    parser.add_argument("--inputs", metavar="FILE", required=True, help="safetensors")
    parser.add_argument("--output", metavar="FILE", required=True, help="safetensors")
    parser.add_argument("--gradients", action="store_true", help="of the mean loss over the labels")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args()

    from megatron_owl2.config import ConfigError
    from megatron_owl2.convert.verify import read_inputs, verify, write_results
    from megatron_owl2.convert.weights import ConversionError
    from megatron_owl2.training.checkpoint import CheckpointError

    first = os.environ.get("RANK", "0") == "0"
    try:
        inputs = read_inputs(arguments.inputs)
        results = verify(
            arguments.checkpoint, inputs, arguments.overrides, gradients=arguments.gradients
        )
        if first:
            write_results(results, arguments.output)
    except (ConversionError, ConfigError, CheckpointError) as error:
        if first:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    if first:
        loss = f", loss {results['loss'].item():.6f}" if "loss" in results else ""
        print(f"wrote {arguments.output}: logits {list(results['logits'].shape)}{loss}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
