"""Lengths of the samples of a data set, counted once, so that rows are packed before it is read.

They hold for one tokenizer, one conversation template and its rules of tokenisation; a file beside
the shards holds those of each: `lengths.<16 hexadecimal digits>.safetensors`, with text and images,
int32 [n] in the order of the data set, and manifest, uint8 [32], the fingerprint of the manifest
that it belongs to.
"""

import hashlib
from dataclasses import dataclass, fields

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from megatron_owl2.config.templates import Template
from megatron_owl2.data.shards.dataset import ShardedDataset
from megatron_owl2.data.tokenizer import Tokenizer
from megatron_owl2.errors import DataError, StorageMissing

_NAMED = {"name", "system", "user", "assistant", "after_image"}  # of a template, in every digest
ENCODING = 1  # raised whenever `conversation.measure` gives other numbers for the same record


@dataclass(frozen=True)
class SampleLengths:
    """Ids of text and number of images of every sample of a data set, int32 [n] each.

    A sample that cannot be read has no ids.
    """

    text: np.ndarray
    images: np.ndarray


def file_name(tokenizer: Tokenizer, template: Template) -> str:
    """Name of the file that holds the lengths for a tokenizer and a template."""
    identity = f"{ENCODING} {tokenizer.fingerprint} Template({_identity(template)})"
    return f"lengths.{hashlib.sha256(identity.encode()).hexdigest()[:16]}.safetensors"


def _identity(template: Template) -> str:
    """The fields of a template. Those that came later count where they are not the default, so that
    files which are there keep their names."""
    values = ((each, getattr(template, each.name)) for each in fields(template))
    return ", ".join(
        f"{each.name}={value!r}"
        for each, value in values
        if each.name in _NAMED or value != each.default
    )


def to_bytes(lengths: SampleLengths, dataset: ShardedDataset) -> bytes:
    """Content of the file."""
    manifest = np.frombuffer(bytes.fromhex(dataset.fingerprint), dtype=np.uint8)
    return save({"text": lengths.text, "images": lengths.images, "manifest": manifest})


def load_lengths(
    dataset: ShardedDataset, tokenizer: Tokenizer, template: Template
) -> SampleLengths:
    """The lengths of a data set's samples. Raises DataError if they were not measured, or not of
    these shards, and StorageError if they cannot be read."""
    name = file_name(tokenizer, template)
    where = f"{dataset.location.rstrip('/')}/{name}"
    folder, fix = dataset.location, "measure them"
    if "://" in dataset.location:
        folder, fix = "COPY", "measure a copy on a disk, and put its file beside these shards"
    fix += (
        f": owl2 measure-lengths {folder} --tokenizer {tokenizer.path} --template {template.name}"
    )
    if template.tokenization != "turns":
        fix += f" --tokenization {template.tokenization}"
    try:
        tensors = load(dataset.storage.read_file(name))
    except StorageMissing:
        raise DataError(
            f"{dataset.location} holds no lengths of its samples for this tokenizer and template "
            f"({name}), which data.packing needs; {fix}"
        ) from None
    except SafetensorError as error:
        raise DataError(f"{where} is damaged ({error}); {fix}") from None
    shapes = {name: (str(values.dtype), values.shape) for name, values in tensors.items()}
    each = ("int32", (len(dataset),))
    if shapes != {"text": each, "images": each, "manifest": ("uint8", (32,))} or (
        tensors["manifest"].tobytes().hex() != dataset.fingerprint
    ):
        raise DataError(f"{where} is not of these shards, which were written since; {fix}")
    return SampleLengths(tensors["text"], tensors["images"])
