"""Prove what a checkpoint computes.

With --inputs and --output: logits, loss and gradients for the released model's raw inputs. Inputs
(safetensors) are input_ids [b, s] with -200 for an image, images [n, 3, H, W] normalised, and
optionally attention_mask, labels [b, s]. The result holds logits, loss and, with --gradients,
grad.<name in the released model> for every parameter, the same under every parallel layout:

    torchrun --nproc-per-node 2 tools/verify_checkpoint.py --checkpoint CKPT \\
        --inputs batch.safetensors --output result.safetensors --gradients parallel.tensor=2

With --against: the checkpoint and a Hugging Face directory in the released layout are held against
each other, settings, names, weights, and what both compute for a text, one image and two images.
One line for each check; the exit status is 1 if one failed, 2 if they could not be made.
"""

import argparse
import os
import sys


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", metavar="CKPT", required=True, help="checkpoint or run")
    parser.add_argument("--against", metavar="HF_DIR", help="directory in the released layout")
    parser.add_argument("--inputs", metavar="FILE", help="safetensors")
    parser.add_argument("--output", metavar="FILE", help="safetensors")
    parser.add_argument("--gradients", action="store_true", help="of the mean loss over the labels")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args()
    files = (arguments.inputs, arguments.output)
    if arguments.against is None and not all(files):
        parser.error("give either --against, or both --inputs and --output")
    if arguments.against is not None and (any(files) or arguments.gradients):
        parser.error("--against makes its own inputs and always compares gradients")

    from megatron_owl2.convert.verify.compare import compare
    from megatron_owl2.convert.verify.verify import read_inputs, verify, write_results
    from megatron_owl2.errors import CheckpointError, ConfigError, ConversionError

    first = os.environ.get("RANK", "0") == "0"
    try:
        if arguments.against is not None:
            findings = []
            for finding in compare(arguments.checkpoint, arguments.against, arguments.overrides):
                print(finding, flush=True)
                findings.append(finding)
            return 0 if all(finding.passed for finding in findings) else 1
        inputs = read_inputs(arguments.inputs)
        results = verify(
            arguments.checkpoint, inputs, arguments.overrides, gradients=arguments.gradients
        )
        if first:
            write_results(results, arguments.output)
    except (ConversionError, ConfigError, CheckpointError, OSError) as error:
        if first:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    if first:
        loss = f", loss {results['loss'].item():.6f}" if "loss" in results else ""
        print(f"wrote {arguments.output}: logits {list(results['logits'].shape)}{loss}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
