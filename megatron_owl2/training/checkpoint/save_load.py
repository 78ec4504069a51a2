"""Saving and loading of checkpoints: megatron-core's distributed format and its companions.

`checkpoints/iter_0000100/` holds the sharded tensors (loadable under any parallel configuration),
the resolved `run.yaml`, `tokenizer.model` and `progress.json`. It is written beside its place and
renamed when complete, so a directory of that name is whole; `checkpoints/latest` names the newest.

No state of random generators is kept, for nothing draws from one during training: order, crops and
flips of the data, and the dropout of adapters, are functions of the seed and the sample index.
"""

import itertools
import logging
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.utils import (
    make_sharded_tensor_for_checkpoint,
    make_tp_sharded_tensor_for_checkpoint,
)
from torch.distributed.checkpoint.metadata import Metadata

from megatron_owl2.config.lora import is_adapter
from megatron_owl2.config.schema import LoraConfig, ModelConfig, RunConfig
from megatron_owl2.errors import CheckpointError
from megatron_owl2.model import position_tables
from megatron_owl2.model.layer_stack import weights as weights_of
from megatron_owl2.model.owl2 import Owl2
from megatron_owl2.training.checkpoint import directories
from megatron_owl2.training.checkpoint.async_writer import Writing, raise_on_all_ranks
from megatron_owl2.training.checkpoint.index import read_index, stored_optimizer, stored_weights
from megatron_owl2.training.checkpoint.optimizer_state import (
    allocate_optimizer_state,
    load_optimizer_state,
)
from megatron_owl2.training.checkpoint.reader import CheckpointReader
from megatron_owl2.training.checkpoint.resolution import OtherResolution
from megatron_owl2.training.checkpoint.staging import Staging
from megatron_owl2.training.from_rank_0 import from_rank_0
from megatron_owl2.utils.files import rename_durably

_logger = logging.getLogger(__name__)

_VOCABULARY = ("embedding.weight", "output_layer.weight")
_METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}


class Save:
    """A checkpoint on its way into `directory` (an `iter_*` name or any other).

    Made by all ranks together; from then on the model may change, for what is written are copies.
    `chunks` are this rank's parts of the model. `tokenizer` is the content of its file; without it
    that is copied from `config.data.tokenizer`, which may have moved since a run began. Without
    optimizer and scheduler the checkpoint holds weights only.
    The copies are made in `staging`, or in memory that is freed when they are written.
    Raises CheckpointIOError on all ranks if the disk refuses one.
    """

    def __init__(
        self,
        directory: Path,
        chunks: Sequence[Owl2],
        config: RunConfig,
        *,
        optimizer: ChainedOptimizer | None = None,
        scheduler: OptimizerParamScheduler | None = None,
        progress: dict | None = None,
        tokenizer: bytes | None = None,
        staging: Staging | None = None,
    ):
        self.directory = Path(directory)
        self._partial = _hidden(self.directory, "partial")
        self._main = torch.distributed.get_rank() == 0
        with raise_on_all_ranks(self.directory):
            if self._main:
                shutil.rmtree(self._partial, ignore_errors=True)
                self._partial.mkdir(parents=True)
        weights = sharded_weights(chunks)
        state = {"model": weights}
        if optimizer is not None and scheduler is not None:
            state["optimizer"] = optimizer.sharded_state_dict(weights, metadata=_METADATA)
            state["scheduler"] = scheduler.state_dict()
        self._writing = Writing(state, self._partial, staging or Staging())
        with raise_on_all_ranks(self.directory):
            if self._main:
                directories.write_companions(self._partial, config, progress or {}, tokenizer)

    @property
    def written(self) -> bool:
        """Whether this rank has nothing left to write."""
        return self._writing.ended

    def complete(self) -> None:
        """Wait for the files of all ranks and give them their name, replacing what had it; all
        ranks together. Raises CheckpointError on all ranks if one could not write."""
        self._writing.finish()
        with raise_on_all_ranks(self.directory):
            if self._main:
                read_index(self._partial)  # the folder of another node's disk would lack files
                replaced = _hidden(self.directory, "removed")
                shutil.rmtree(replaced, ignore_errors=True)
                if self.directory.exists():
                    self.directory.rename(replaced)
                rename_durably(self._partial, self.directory)
                shutil.rmtree(replaced, ignore_errors=True)


def save(directory: Path, *state, **more) -> None:
    """`Save` a checkpoint and wait for it."""
    Save(directory, *state, **more).complete()


def _hidden(directory: Path, ending: str) -> Path:
    return directory.with_name(f".{directory.name}.{ending}")


def load_weights(directory: Path, chunks: Sequence[Owl2], *, any_resolution: bool = False) -> None:
    """Fill the model from a checkpoint, whatever parallel configuration it was saved under.

    Each weight is read once for all ranks that have the same share of it. Strict, but for the
    position tables that older checkpoints lack. A checkpoint without any adapter leaves those of
    the model as they are. With `any_resolution` its images may have another size: the ViT's
    position table is resized, as the conversion does, and a line says so.

    Raises CheckpointError listing every missing, unexpected or misshapen weight.
    """
    reader = CheckpointReader(directories.resolve(directory))
    wanted = _whole_shapes(chunks)
    vision = chunks[0].model.vision
    other = OtherResolution.find(reader.index, vision) if any_resolution else None
    if other is None:
        _read_weights(reader, chunks, _stored_weights(reader, chunks, wanted))
        return
    resized = {name: shape for name, shape in other.shapes.items() if name in wanted}
    weights = _stored_weights(reader, chunks, wanted | resized)
    with other.resizing(weights) as shares:
        _read_weights(reader, chunks, shares)
    _logger.info("%s", other)


def load_training(
    directory: Path,
    chunks: Sequence[Owl2],
    optimizer: ChainedOptimizer,
    scheduler: OptimizerParamScheduler,
) -> None:
    """Continue a run: weights, optimizer and schedule in place.

    The settings of AdamW and the length of the schedule stay those of the configuration, which may
    have changed; what trains, and the factors on the rate, must be the same
    (`parameter_groups.fingerprint`). Raises CheckpointError listing what is missing, unexpected or
    misshapen."""
    reader = CheckpointReader(directories.resolve(directory))
    weights = _stored_weights(reader, chunks, _whole_shapes(chunks))
    allocate_optimizer_state(optimizer)
    state = optimizer.sharded_state_dict(weights, is_loading=True, metadata=_METADATA)
    shares = [entry for entry in nested_values(state) if isinstance(entry, ShardedTensor)]
    _compare_optimizer(reader, shares)
    _read_weights(reader, chunks, weights)
    # Only now: in fp32 these are the same numbers, of which the file may have weights in bf16.
    reader.read(shares)
    configured = ("max_lr", "min_lr", "betas", "eps")  # the decay is the schedule's
    settings = [{key: group[key] for key in configured} for group in optimizer.param_groups]
    load_optimizer_state(optimizer, reader.common["optimizer"])
    for group, kept in zip(optimizer.param_groups, settings, strict=True):
        group.update(kept)
    scheduler.load_state_dict(reader.common["scheduler"])


def _read_weights(reader: CheckpointReader, chunks: Sequence[Owl2], weights: dict) -> None:
    reader.read_replicated(weights.values(), chunks[0].context.groups.dp_cp)


def sharded_weights(chunks: Sequence[Owl2]) -> dict[str, ShardedTensor | ShardedTensorFactory]:
    """Each local weight as its share of the whole model's, for megatron-core's checkpoints."""
    groups = chunks[0].context.groups
    where = {"tp_group": groups.tp, "dp_cp_group": groups.dp_cp}
    state = {}
    for name, parameter in _weights(chunks):
        if not getattr(parameter, "tensor_model_parallel", False):
            state[name] = make_sharded_tensor_for_checkpoint(parameter, name, **where)
            continue
        state[name] = make_tp_sharded_tensor_for_checkpoint(
            parameter, name, vars(parameter)["partition_dim"], **where
        )
        if vars(parameter)["partition_stride"] == 2:  # gate and up, each split over the ranks
            state[name] = apply_swiglu_sharded_factory(state[name], ())
    for number, share in enumerate(state.values()):  # each data-parallel rank writes some of them
        *others, rank = share.replica_id
        share.replica_id = (*others, (rank - number) % groups.dp_cp.size())
    return state


def _whole_shapes(chunks: Sequence[Owl2]) -> dict[str, tuple[int, ...]]:
    """The shapes of all of the model's weights, of which each pipeline stage has some."""
    pipeline = chunks[0].context.groups.pp
    shares: list[Any] = [None] * pipeline.size()
    torch.distributed.all_gather_object(shares, global_shapes(chunks), group=pipeline)
    return {name: shape for share in shares for name, shape in share.items()}


def _stored_weights(
    reader: CheckpointReader, chunks: Sequence[Owl2], wanted: dict[str, tuple[int, ...]]
) -> dict[str, ShardedTensor | ShardedTensorFactory]:
    """The local weights, once the `wanted` ones of the whole model are held against the
    checkpoint's, on all ranks alike; without the position tables that an older checkpoint lacks,
    and without adapters if it has none."""
    stored = from_rank_0(lambda: directories.read_config(reader.directory))
    _check_positions(reader.directory, stored.model, chunks[0].model)
    if any(map(is_adapter, stored_weights(reader.index))):
        _check_alpha(reader.directory, stored.stage.lora, chunks[0].context.lora)
    else:
        wanted = {name: shape for name, shape in wanted.items() if not is_adapter(name)}
    read = wanted.keys() - compare(reader.directory, reader.index, wanted)
    return {name: share for name, share in sharded_weights(chunks).items() if name in read}


def _check_positions(directory: Path, stored: ModelConfig, model: ModelConfig) -> None:
    """Hold the abstractor's positions, whose tables a checkpoint may lack, against the model's."""
    theirs, ours = stored.abstractor.positions, model.abstractor.positions
    if theirs != ours:
        versions = {"sincos": "mPLUG-Owl2", "none": "version 1"}
        raise CheckpointError(
            f"{directory} has model.abstractor.positions={theirs}, as {versions[theirs]} "
            f"does, not {ours}; take a checkpoint of the same kind, or its configuration"
        )


def _check_alpha(directory: Path, stored: LoraConfig, lora: LoraConfig) -> None:
    """Hold alpha, which the adapters do not show, against that of the checkpoint's own run."""
    if lora.targets and stored.alpha != lora.alpha:
        raise CheckpointError(
            f"the adapters of {directory} were trained with stage.lora.alpha={stored.alpha:g}, not "
            f"{lora.alpha:g}; go on with the same, or merge them first (owl2 convert-to-hf)"
        )


def _compare_optimizer(reader: CheckpointReader, shares: Sequence[ShardedTensor]) -> None:
    """Hold the names of the optimizer's tensors against the checkpoint's, on all ranks alike."""
    main = torch.distributed.get_rank() == 0
    names: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.gather_object({share.key for share in shares}, names if main else None)
    with raise_on_all_ranks(reader.directory):
        if main:
            wanted, stored = set().union(*names), stored_optimizer(reader.index).keys()
            _refuse(
                reader.directory,
                [f"missing: {name}" for name in sorted(wanted - stored)]
                + [f"unexpected: {name}" for name in sorted(stored - wanted)],
                "optimizer",
            )


def compare(directory: Path, index: Metadata, wanted: dict[str, tuple[int, ...]]) -> set[str]:
    """Raise CheckpointError unless the checkpoint of this index has exactly the weights `wanted`;
    the message lists every missing, unexpected and misshapen one.

    Returns the names of the position tables that it lacks, as older checkpoints do.
    """
    stored = {n: tuple(t.size) for n, t in stored_weights(index).items()}
    absent: set[str] = set(position_tables.NAMES) & wanted.keys() - stored.keys()
    missing = sorted(wanted.keys() - stored.keys() - absent)
    problems = [f"missing: {n} {wanted[n]}" for n in missing]
    problems += [f"unexpected: {n} {stored[n]}" for n in sorted(stored.keys() - wanted.keys())]
    problems += [
        f"shape: {n} is {stored[n]} in the checkpoint, {wanted[n]} in the model"
        for n in sorted(wanted.keys() & stored.keys())
        if wanted[n] != stored[n]
    ]
    misfits = {n for n in stored.keys() | wanted.keys() if stored.get(n) != wanted.get(n)}
    if any(is_adapter(n) for n in misfits) and any(is_adapter(n) for n in stored):
        problems.append(
            "its adapters need the stage.lora that they were made with, or are merged into the "
            "weights by owl2 convert-to-hf and brought back by owl2 convert-from-hf"
        )
    if any(wanted[n] != stored[n] for n in _VOCABULARY if n in wanted and n in stored):
        problems.append(
            "the vocabulary's rows are model.decoder.vocab_size up to a multiple of "
            "model.decoder.vocab_multiple, which is 1 for a checkpoint whose run.yaml lacks it"
        )
    _refuse(directory, problems, "model")
    return absent


def _refuse(directory: Path, problems: list[str], what: str) -> None:
    if problems:
        listing = "\n  ".join(problems)
        raise CheckpointError(f"checkpoint {directory} does not fit the {what}:\n  {listing}")


def global_shapes(chunks: Sequence[Owl2]) -> dict[str, tuple[int, ...]]:
    """The whole shape of each local weight, over its tensor-parallel ranks."""
    shapes = {}
    for name, parameter in _weights(chunks):
        shape = list(parameter.shape)
        if getattr(parameter, "tensor_model_parallel", False):
            shape[vars(parameter)["partition_dim"]] *= chunks[0].context.tensor_parallel_size
        shapes[name] = tuple(shape)
    return shapes


def _weights(chunks: Sequence[Owl2]) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights of all chunks; their names are those of the whole model."""
    return itertools.chain.from_iterable(weights_of(chunk).items() for chunk in chunks)
