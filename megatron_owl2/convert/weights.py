"""Tensor files of Hugging Face directories: read without unpickling code, written in shards."""

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

_KINDS = (("model", "safetensors"), ("pytorch_model", "bin"))
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class ConversionError(RuntimeError):
    """A directory that cannot be read or written as asked; the message says what to change."""


class TensorReader:
    """The tensors of a Hugging Face directory by name, read one at a time.

    Accepts `model.safetensors` or `pytorch_model.bin`, whole or in shards with an index file.
    Raises ConversionError for files that are missing, damaged or outside the directory, and for
    an index that names tensors its files do not have.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        self._handles = {}  # open safetensors files, or the one .bin file in use
        for stem, ending in _KINDS:
            whole, index = f"{stem}.{ending}", self.directory / f"{stem}.{ending}.index.json"
            if (self.directory / whole).is_file():
                self._file_of = dict.fromkeys(self._file(whole).keys(), whole)
                break
            if index.is_file():
                self._file_of = self._read_index(index)
                break
        else:
            wanted = ", ".join(f"{stem}.{ending}[.index.json]" for stem, ending in _KINDS)
            raise ConversionError(f"{self.directory} holds no weights; looked for {wanted}")
        self._stored_name = {name: name for name in self._file_of}

    def add_prefix(self, prefix: str) -> None:
        """Answer to `prefix + name` from now on."""
        self._stored_name = {prefix + n: stored for n, stored in self._stored_name.items()}

    def names(self) -> set[str]:
        return set(self._stored_name)

    def describe(self, name: str) -> tuple[tuple[int, ...], bool]:
        """The shape of a tensor, and whether its numbers are of 16, 32 or 64 bit floating point."""
        stored = self._stored_name[name]
        file = self._file(self._file_of[stored])
        if isinstance(file, dict):
            return tuple(file[stored].shape), file[stored].dtype in _FLOATS.values()
        entry = file.get_slice(stored)
        return tuple(entry.get_shape()), entry.get_dtype() in _FLOATS

    def __getitem__(self, name: str) -> torch.Tensor:
        stored = self._stored_name[name]
        file = self._file(self._file_of[stored])
        return file[stored] if isinstance(file, dict) else file.get_tensor(stored)

    def _file(self, name: str):
        """The open file: a dict of memory-mapped tensors for .bin, else a safetensors handle."""
        if name not in self._handles:
            path = self.directory / name
            if not path.is_file():
                raise ConversionError(f"{path} is missing, but the index names it")
            try:
                if name.endswith(".bin"):
                    self._handles = {name: _load_bin(path)}
                else:
                    self._handles[name] = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ConversionError(f"{path} is damaged: {error}; fetch it again") from None
        return self._handles[name]

    def _read_index(self, path: Path) -> dict[str, str]:
        files = read_json(path).get("weight_map")
        if not isinstance(files, dict) or not files:
            raise ConversionError(f"{path} has no weight_map")
        for file in set(files.values()):
            if Path(file).name != file:
                raise ConversionError(f"{path} names {file!r}, which is not a file beside it")
        tensors_of = {file: set(self._file(file).keys()) for file in sorted(set(files.values()))}
        lost = [f"{name} in {file}" for name, file in files.items() if name not in tensors_of[file]]
        if lost:
            listing = "\n  ".join(lost)
            raise ConversionError(f"{path} names tensors that are not there:\n  {listing}")
        return files


def _load_bin(path: Path) -> dict[str, torch.Tensor]:
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # truncated, legacy or hostile: torch raises many kinds
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise ConversionError(f"{path} cannot be read as plain tensors: {reason}") from None
    if not isinstance(tensors, dict) or not all(map(torch.is_tensor, tensors.values())):
        raise ConversionError(f"{path} holds more than named tensors")
    return tensors


def read_json(path: Path) -> dict:
    """A JSON object; raises ConversionError if there is none."""
    try:
        tree = json.loads(path.read_text())
    except FileNotFoundError:
        raise ConversionError(f"{path} does not exist") from None
    except (OSError, ValueError) as error:
        raise ConversionError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(tree, dict):
        raise ConversionError(f"{path} must hold an object, not a {type(tree).__name__}")
    return tree


def save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write a safetensors file with the permissions that any new file here gets (safetensors'
    own are the owner's alone). Raises ConversionError if the disk refuses."""
    try:
        path.touch()
        mode = path.stat().st_mode
        save_file(tensors, path, metadata={"format": "pt"})
        path.chmod(mode)
    except (OSError, SafetensorError) as error:
        raise ConversionError(f"{path} cannot be written: {error}") from None


def write_shards(
    directory: Path, tensors: Iterable[tuple[str, torch.Tensor]], max_shard_bytes: int
) -> None:
    """Write named tensors as `model*.safetensors`, at most `max_shard_bytes` each (one tensor may
    be larger), with `model.safetensors.index.json` if they do not fit into one file."""
    shards: list[list[str]] = []
    pending: dict[str, torch.Tensor] = {}
    total = size = 0

    def flush() -> None:
        save_tensors(pending, directory / f"{len(shards)}.partial")
        shards.append(list(pending))
        pending.clear()

    for name, tensor in tensors:
        if pending and size + tensor.nbytes > max_shard_bytes:
            flush()
            size = 0
        pending[name] = tensor.contiguous()
        size += tensor.nbytes
        total += tensor.nbytes
    flush()
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        weight_map = {
            tensor: file for file, shard in zip(names, shards, strict=True) for tensor in shard
        }
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    for i, name in enumerate(names):
        (directory / f"{i}.partial").rename(directory / name)
