"""Verification of what a checkpoint computes, alone or against its HF export.

With --inputs and --output: logits, loss and gradients for the released model's raw inputs. Inputs
(safetensors) are input_ids [b, s] with -200 for an image, images [n, 3, H, W] normalised, and
optionally attention_mask, labels [b, s]. The result holds logits, loss and, with --gradients,
grad.<name in the released model> for every parameter, the same under every parallel configuration:

    torchrun --nproc-per-node 2 --no-python owl2 verify-checkpoint --checkpoint CKPT \\
        --inputs batch.safetensors --output result.safetensors --gradients parallel.tensor=2

With --against: the checkpoint and a Hugging Face directory in the released layout are held against
each other, settings, names, weights, and what both compute for a text, one image and two images.
One line for each check; the exit status is 1 if one failed, 2 if they could not be made.
"""

import argparse
import os

from megatron_owl2.cli.command import Command, UsageError, is_first_rank


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", metavar="CKPT", required=True, help="checkpoint or run")
    parser.add_argument("--against", metavar="HF_DIR", help="directory in the released layout")
    parser.add_argument("--inputs", metavar="FILE", help="safetensors")
    parser.add_argument("--output", metavar="FILE", help="safetensors")
    parser.add_argument("--gradients", action="store_true", help="of the mean loss over the labels")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")


def run(options: argparse.Namespace) -> int:
    """Returns 0, or 1 if a check against the directory failed."""
    files = (options.inputs, options.output)
    if options.against is None and not all(files):
        raise UsageError("give either --against, or both --inputs and --output")
    if options.against is not None and (any(files) or options.gradients):
        raise UsageError("--against makes its own inputs and always compares gradients")
    if all(files) and os.path.realpath(options.inputs) == os.path.realpath(options.output):
        raise UsageError(f"--output {options.output} is the file of the inputs")

    from megatron_owl2.mcore.setup import setup

    setup()
    from megatron_owl2.convert.verify.compare import compare
    from megatron_owl2.convert.verify.verify import read_inputs, verify, write_results

    if options.against is not None:
        results = []
        for result in compare(options.checkpoint, options.against, options.overrides):
            print(result, flush=True)
            results.append(result.passed)
        return 0 if all(results) else 1
    inputs = read_inputs(options.inputs)
    found = verify(options.checkpoint, inputs, options.overrides, gradients=options.gradients)
    if is_first_rank():
        write_results(found, options.output)
        loss = f", loss {found['loss'].item():.6f}" if "loss" in found else ""
        print(f"wrote {options.output}: logits {list(found['logits'].shape)}{loss}")
    return 0


main = Command(
    verb="verify-checkpoint",
    help=__doc__,
    add_arguments=add_arguments,
    run=run,
    intermixed=True,
).main
