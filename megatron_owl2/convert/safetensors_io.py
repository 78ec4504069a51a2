"""Tensor files of Hugging Face directories, read without unpickling code, written in shards."""

import json
import re
import struct
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from megatron_owl2.convert.lazy_tensor import LazyTensor, read_ahead
from megatron_owl2.errors import ConversionError
from megatron_owl2.utils.json_text import parse_json

MODEL_FILES = (("model", "safetensors"), ("pytorch_model", "bin"))
ADAPTER_FILES = (("adapter_model", "safetensors"), ("adapter_model", "bin"))  # peft's
ADAPTER_SETTINGS = "adapter_config.json"
_NAMES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_FLOATS = {dtype: name for name, dtype in _NAMES.items()}
_FOREIGN = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".ckpt")
_GIT_LFS = b"version https://git-lfs"
_MAPPED_BYTES = 512 * 1024**2  # of a .bin file, before it is mapped anew


class TensorReader:
    """The tensors of a Hugging Face directory by name, read one at a time.

    Accepts `model.safetensors` or `pytorch_model.bin`, whole or in shards with an index file, or
    the `files` of another kind of directory (stem and ending of each, the first that is there).
    Files are mapped into memory and unmapped soon, so that little of them stays resident.
    Raises ConversionError for files that are missing, damaged or outside the directory, and for
    an index that does not name exactly the tensors of its files.
    """

    def __init__(self, directory: str | Path, files: Sequence[tuple[str, str]] = MODEL_FILES):
        self.directory = Path(directory)
        self._mapped: tuple[str, dict[str, torch.Tensor]] = ("", {})  # the .bin file in use
        self._handed_out = 0  # bytes of it
        self._found: dict[str, _Stored] = {}
        for stem, ending in files:
            whole, index = f"{stem}.{ending}", self.directory / f"{stem}.{ending}.index.json"
            if (self.directory / whole).is_file():
                self._found = self._contents(whole)
                return
            if index.is_file():
                self._read_index(index)
                return
        wanted = ", ".join(f"{stem}.{ending}[.index.json]" for stem, ending in files)
        remedy = _found_instead(self.directory)
        raise ConversionError(f"{self.directory} holds no weights; looked for {wanted}{remedy}")

    def rename(self, names: Mapping[str, str]) -> None:
        """Renaming of tensors, and forgetting of those that have no new name."""
        self._found = {new: self._found[name] for name, new in names.items()}

    def names(self) -> set[str]:
        """The names of all tensors."""
        return set(self._found)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it."""
        return self._found[name].shape

    def dtype(self, name: str) -> torch.dtype | str:
        """A floating-point dtype of 16, 32 or 64 bit, or the name of any other kind of number."""
        return self._found[name].dtype

    def __getitem__(self, name: str) -> torch.Tensor:
        stored = self._found[name]
        path = self.directory / stored.file
        if not stored.file.endswith(".bin"):
            with _reading(path), safe_open(path, framework="pt") as file:
                return file.get_tensor(stored.name)
        file, tensors = self._mapped
        if file != stored.file or self._handed_out > _MAPPED_BYTES:
            tensors, self._handed_out = _load_bin(path), 0
            self._mapped = (stored.file, tensors)
        self._handed_out += tensors[stored.name].nbytes
        return tensors[stored.name]

    def _contents(self, name: str) -> dict[str, "_Stored"]:
        path = self.directory / name
        if not path.is_file():
            raise ConversionError(f"{path} is missing, but the index names it")
        if name.endswith(".bin"):
            return {
                n: _Stored(
                    name, n, tuple(t.shape), t.dtype if _plain(t) else f"{t.layout} {t.dtype}"
                )
                for n, t in _load_bin(path).items()
            }
        found = {}
        with _reading(path), safe_open(path, framework="pt") as file:
            for n in file.keys():  # noqa: SIM118
                entry = file.get_slice(n)
                kind: str = entry.get_dtype()
                dtype: torch.dtype | str = _NAMES.get(kind, kind)
                found[n] = _Stored(name, n, tuple(entry.get_shape()), dtype)
        return found

    def _read_index(self, path: Path) -> None:
        files = read_json(path).get("weight_map")
        if not isinstance(files, dict) or not files:
            raise ConversionError(f"{path} has no weight_map")
        for file in files.values():
            if not isinstance(file, str) or Path(file).name != file:
                raise ConversionError(f"{path} names {file!r}, which is not a file beside it")
        contents = {file: self._contents(file) for file in sorted(set(files.values()))}
        problems = [
            f"not there: {name} in {file}"
            for name, file in files.items()
            if name not in contents[file]
        ]
        problems += [
            f"not in the index: {name} in {file}"
            for file, found in contents.items()
            for name in found
            if files.get(name) != file
        ]
        if problems:
            listing = "\n  ".join(problems)
            raise ConversionError(f"{path} and its files do not agree:\n  {listing}")
        self._found = {name: contents[file][name] for name, file in files.items()}


@dataclass(frozen=True)
class _Stored:
    """Place of a tensor, its shape and its dtype."""

    file: str
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype | str


def has_weights(directory: Path, files: Sequence[tuple[str, str]]) -> bool:
    """Whether a directory has one of the `files`, or an index of several."""
    endings = ("", ".index.json")
    return any((directory / f"{s}.{e}{more}").is_file() for s, e in files for more in endings)


def _found_instead(directory: Path) -> str:
    """The remedy for a directory whose weights are there, but not as files that are read."""
    names = sorted(p.name for p in directory.iterdir()) if directory.is_dir() else []
    for name in names:
        if name.startswith("adapter_model."):
            return (
                f"; {name} is an adapter: merge it into its model with peft, and save that, or "
                "give it to owl2 convert-from-hf --adapter"
            )
        if shard := re.fullmatch(r"(model|pytorch_model)-\d+-of-\d+\.(safetensors|bin)", name):
            index = f"{shard[1]}.{shard[2]}.index.json"
            return f"; {name} is a part of them: fetch {index} and all parts"
    for name in names:
        if name.endswith(_FOREIGN):
            return f"; {name} is not read: save the model with transformers (save_pretrained)"
    return ""


@contextmanager
def _reading(path: Path):
    try:
        # safetensors does not tell what may not be read from what is broken
        with open(path, "rb") as file:
            pointer = file.read(len(_GIT_LFS)) == _GIT_LFS
        if pointer:
            raise ConversionError(f"{path} is a Git LFS pointer; fetch the file (git lfs pull)")
        yield
    except OSError as error:
        raise ConversionError(f"{path} cannot be read: {error.strerror or error}") from None
    except SafetensorError as error:
        raise ConversionError(f"{path} is damaged: {error}; fetch it again") from None


def _load_bin(path: Path) -> dict[str, torch.Tensor]:
    with _reading(path):
        if not zipfile.is_zipfile(path):  # what torch before 1.6 wrote cannot be mapped
            raise ConversionError(f"{path} is damaged or older than torch 1.6; fetch it again")
        try:
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # truncated or hostile: torch raises many kinds
            reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
            raise ConversionError(f"{path} cannot be read as plain tensors: {reason}") from None
    if not isinstance(tensors, dict) or not all(map(torch.is_tensor, tensors.values())):
        raise ConversionError(f"{path} holds more than named tensors")
    return tensors


def _plain(tensor: torch.Tensor) -> bool:
    return (
        tensor.dtype in _FLOATS and tensor.layout is torch.strided and tensor.device.type == "cpu"
    )


def read_json(path: Path) -> dict:
    """A JSON object; raises ConversionError if there is none."""
    try:
        tree = parse_json(path.read_bytes())
    except FileNotFoundError:
        raise ConversionError(f"{path} does not exist") from None
    except OSError as error:
        raise ConversionError(f"{path} cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise ConversionError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(tree, dict):
        raise ConversionError(f"{path} must hold an object, not a {type(tree).__name__}")
    return tree


def write_shards(
    directory: Path,
    tensors: dict[str, LazyTensor],
    max_shard_bytes: int,
    *,
    progress: bool = False,
) -> None:
    """Files `model*.safetensors` of named tensors, at most `max_shard_bytes` each (one tensor may
    be larger), with `model.safetensors.index.json` if they do not fit into one file.

    One tensor is in memory at a time, which safetensors' own writer cannot do.
    """
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    files = ["model.safetensors"]
    if len(shards) > 1:
        files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        index = {
            "metadata": {"total_size": sum(t.nbytes for t in tensors.values())},
            "weight_map": {
                n: file for file, names in zip(files, shards, strict=True) for n in names
            },
        }
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    with tqdm(total=len(tensors), desc="writing", unit="tensor", disable=not progress) as bar:
        for file, names in zip(files, shards, strict=True):
            write_safetensors(directory / file, {name: tensors[name] for name in names}, bar)


def write_safetensors(
    path: Path, tensors: dict[str, LazyTensor], progress: tqdm | None = None
) -> None:
    """One safetensors file: the header's length (8 bytes), the header in JSON, the numbers."""
    # Wide numbers first, so that all of them are aligned whatever the odd sizes of the others.
    tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize))
    header: dict[str, dict[str, Any]] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": _FLOATS[tensor.dtype],
            "shape": tensor.shape,
            "data_offsets": (start, end),
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, tensor in read_ahead(tensors):
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            if progress is not None:
                progress.update()
