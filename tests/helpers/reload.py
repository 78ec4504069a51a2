"""torchrun tests/helpers/reload.py CKPT FOLDER SIZES...: go on under one parallelism after another.

SIZES are TENSORxPIPELINE. Each loads weights, optimizer and schedule of the checkpoint before it,
and saves them as FOLDER/SIZES with the rates of its groups, FOLDER/SIZES.json. What each rank has
read is FOLDER/SIZES.reads.json: the files it opened, with repetitions, and the tensors, each as
file and offset.
"""

import json
import sys
from pathlib import Path

import prepared  # noqa: F401
import torch
from megatron.core import parallel_state
from torch.distributed.checkpoint.filesystem import FileSystemReader

from megatron_owl2.mcore import setup
from megatron_owl2.mcore.parallel import ParallelContext
from megatron_owl2.model.layer_stack import weights
from megatron_owl2.model.owl2 import build
from megatron_owl2.training import optimizer as optim
from megatron_owl2.training import parameter_groups
from megatron_owl2.training.checkpoint import directories, save_load

RATES = ("wd_mult", "lr_mult", "max_lr", "min_lr", "lr", "weight_decay", "step")
opened: list[Path] = []
tensors: list[tuple[str, int]] = []


def note_reads() -> None:
    """Have all that this process reads written down in `opened` and `tensors`."""

    def hook(event, arguments):
        if event == "open" and isinstance(arguments[0], str | Path):
            opened.append(Path(arguments[0]))

    def slice_file(self, file, place):
        tensors.append((place.relative_path, place.offset))
        return given(self, file, place)

    given, FileSystemReader._slice_file = FileSystemReader._slice_file, slice_file
    sys.addaudithook(hook)


def write_reads(source: Path, output: Path) -> None:
    """Write down what all ranks have read of `source` since the last time."""
    files = [path.name for path in opened if path.parent == source]
    ranks: list = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(ranks, {"files": files, "tensors": list(tensors)})
    opened.clear(), tensors.clear()
    if torch.distributed.get_rank() == 0:
        output.write_text(json.dumps(ranks))


def reload(source: Path, folder: Path, parallelism: str) -> Path:
    """Load `source` under the parallelism and save it again; returns where."""
    config = directories.read_config(source)
    config.parallel.tensor, config.parallel.pipeline = map(int, parallelism.split("x"))
    groups = setup.initialize(config.parallel)
    chunks = build(ParallelContext(config, groups), config.model, initialize=False)
    for weight in weights(chunks[0]).values():  # none of them may be left as it was
        weight.data.fill_(float("nan"))
    parameter_groups.freeze(config, chunks)
    wrapped = optim.wrap_ddp(chunks, overlap=config.parallel.overlap)
    optimizer, scheduler = optim.build_optimizer(config, wrapped)
    opened.clear()
    save_load.load_training(source, chunks, optimizer, scheduler)
    write_reads(source, folder / f"{parallelism}.reads.json")
    for part in optimizer.chained_optimizers:  # each group holds the parameters of its factor
        parameters = part.model_float16_groups, part.model_fp32_groups
        for group, *owned in zip(part.param_groups, *parameters, strict=True):
            assert {p.rate_factor for ps in owned for p in ps} <= {group["lr_mult"]}
    rates = [{k: float(group[k]) for k in RATES if k in group} for group in optimizer.param_groups]
    output = folder / parallelism
    if torch.distributed.get_rank() == 0:
        output.with_suffix(".json").write_text(json.dumps(rates))
    progress = directories.read_progress(source)
    state = {"optimizer": optimizer, "scheduler": scheduler, "progress": progress}
    save_load.save(output, chunks, config, **state)
    parallel_state.destroy_model_parallel()
    return output


note_reads()
place, target = Path(sys.argv[1]), Path(sys.argv[2])
for name in sys.argv[3:]:
    place = reload(place, target, name)
