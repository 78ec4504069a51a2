"""Index of a checkpoint, read without running code that somebody put there."""

import pickle
from collections.abc import Callable
from pathlib import Path

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron_owl2.errors import CheckpointError, CheckpointIOError

_OPTIMIZER = "optimizer."
_FILE = ".metadata"  # torch.distributed.checkpoint writes its index as a pickle
_CHECKPOINT = "torch.distributed.checkpoint."
_ALLOWED = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    *((_CHECKPOINT + "filesystem", name) for name in ("_StorageInfo", "_StoragePrefix")),
    *(
        (_CHECKPOINT + "metadata", name)
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ),
    *(
        (_CHECKPOINT + "planner", name)
        for name in ("SavePlan", "TensorWriteData", "WriteItem", "WriteItemType")
    ),
}


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        if (module, name) in _ALLOWED:
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no index needs")


def read_index(directory: Path) -> Metadata:
    """The index of a checkpoint directory, held against the files it names.

    Raises CheckpointError for an index that is absent, damaged or names anything but the parts of
    an index, and for files that are absent or shorter than the index says; CheckpointIOError where
    the disk refuses the index.
    """
    try:
        with open(directory / _FILE, "rb") as file:
            index = _IndexUnpickler(file).load()
    except OSError as error:
        raise unreadable(directory / _FILE, error) from None
    except Exception as error:  # a damaged pickle raises many kinds
        raise CheckpointError(f"{directory / _FILE} is damaged: {error}") from None
    if not isinstance(index, Metadata):
        raise CheckpointError(f"{directory / _FILE} holds no index")
    ends: dict[str, int] = {}
    for place in index.storage_data.values():
        ends[place.relative_path] = max(
            ends.get(place.relative_path, 0), place.offset + place.length
        )
    for name, end in sorted(ends.items()):
        path = directory / name
        if Path(name).name != name:
            raise CheckpointError(f"{directory / _FILE} names {name!r}, not a file beside it")
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; copy the whole checkpoint again")
        if path.stat().st_size < end:
            raise CheckpointError(
                f"{path} is cut off at {path.stat().st_size:,} of {end:,} bytes; copy it again"
            )
    return index


def stored_weights(index: Metadata) -> dict[str, TensorStorageMetadata]:
    """Size and dtype of every weight in a checkpoint, without the optimizer's tensors.

    Raises CheckpointError for one that is not stored whole or is no floating-point tensor.
    """
    return _whole(index, lambda name: not name.startswith(_OPTIMIZER))


def stored_optimizer(index: Metadata) -> dict[str, TensorStorageMetadata]:
    """The optimizer's tensors in a checkpoint; raises CheckpointError as `stored_weights`."""
    return _whole(index, lambda name: name.startswith(_OPTIMIZER))


def _whole(index: Metadata, wanted: Callable[[str], bool]) -> dict[str, TensorStorageMetadata]:
    tensors = {
        name: entry
        for name, entry in index.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata) and wanted(name)
    }
    stored = {(place.fqn, place.offset) for place in index.storage_data}
    for name, entry in tensors.items():
        kept = [chunk.sizes.numel() for chunk in entry.chunks if (name, chunk.offsets) in stored]
        if sum(kept) != entry.size.numel():
            raise CheckpointError(
                f"{name} is not whole: {sum(kept):,} of {entry.size.numel():,} numbers are stored"
            )
        if not entry.properties.dtype.is_floating_point:
            raise CheckpointError(f"{name} holds {entry.properties.dtype}, no weights")
    return tensors


def unreadable(what: object, error: BaseException) -> CheckpointError:
    """The error to raise when reading `what` has failed: CheckpointIOError if it was the disk, and
    the file is there, or the device or its memory, else CheckpointError."""
    root = _root(error)
    passing = (OSError, MemoryError, torch.OutOfMemoryError, torch.AcceleratorError)
    lasting = not isinstance(root, passing) or isinstance(root, FileNotFoundError)
    kind = CheckpointError if lasting else CheckpointIOError
    return kind(f"{what} cannot be read: {first_failure(error)}")


def first_failure(error: BaseException) -> str:
    """The first cause under torch's error, in one line: what the disk said, if it did.

    An interruption that torch took for a failure goes on as what it is.
    """
    root = _root(error)
    if isinstance(root, KeyboardInterrupt):
        raise root from None
    return (str(root).strip() or repr(root)).splitlines()[0]


def _root(error: BaseException) -> BaseException:
    if isinstance(error, CheckpointException):
        found = [_root(inner) for inner, _ in error.failures.values()]
        return next((e for e in found if isinstance(e, OSError)), next(iter(found), error))
    below = error.__cause__ or error.__context__
    found = error if below is None else _root(below)
    return found if isinstance(found, OSError) else error
