"""Position tables of a checkpoint at another image size than the model's."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch.distributed.checkpoint.metadata import Metadata

from megatron_owl2.config.schema import VisionConfig
from megatron_owl2.model.position_tables import IMAGE_POSITIONS
from megatron_owl2.model.vision import POSITION_EMBEDDING, resize_positions
from megatron_owl2.training.checkpoint.index import stored_weights


@dataclass(frozen=True)
class OtherResolution:
    """Grid of `grid` x `grid` patches of a checkpoint, where that of the model, `vision`, differs.

    Two weights depend on it: the ViT's position table, [1, 1 + grid^2, h] in `dtype`, which is
    resized, and the abstractor's, which the model has made by its own configuration.
    """

    vision: VisionConfig
    grid: int
    dtype: torch.dtype

    @classmethod
    def find(cls, index: Metadata, vision: VisionConfig) -> "OtherResolution | None":
        """That of the checkpoint of this index; None if its table has the model's shape, or one
        that no image size explains."""
        stored = stored_weights(index).get(POSITION_EMBEDDING)
        if stored is None or len(stored.size) != 3:
            return None
        found = cls(vision, math.isqrt(max(stored.size[1] - 1, 0)), stored.properties.dtype)
        explained = found.grid > 0 and tuple(stored.size) == found.shapes[POSITION_EMBEDDING]
        return found if explained and found.grid != vision.grid_size else None

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes in the checkpoint of the weights that depend on the image size."""
        rows, width = 1 + self.grid**2, self.vision.hidden_size
        return {POSITION_EMBEDDING: (1, rows, width), IMAGE_POSITIONS: (rows, width)}

    @contextmanager
    def resizing(self, shares: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """What to read of the checkpoint for the shares of a rank's weights, those of `shapes`
        among them; at the end the ViT's table, where the rank has it, is filled."""
        others = {name: share for name, share in shares.items() if name not in self.shapes}
        if POSITION_EMBEDDING not in shares:
            yield others
            return
        parameter = shares[POSITION_EMBEDDING].data.detach()
        shape = self.shapes[POSITION_EMBEDDING]
        table = torch.empty(shape, dtype=self.dtype, device=parameter.device)
        yield others | {
            POSITION_EMBEDDING: ShardedTensor.from_rank_offsets(POSITION_EMBEDDING, table)
        }
        # On the CPU, as the conversion does: the same numbers.
        parameter.copy_(resize_positions(table.cpu(), self.vision.grid_size))

    def __str__(self) -> str:
        sizes = (
            f"{grid} x {grid} patches ({grid * self.vision.patch_size} px)"
            for grid in (self.grid, self.vision.grid_size)
        )
        return f"{POSITION_EMBEDDING} resized from {' to '.join(sizes)}"
