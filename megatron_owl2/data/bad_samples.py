"""The ledger of bad samples: what could not be used, for which slot and why; and how much is too
much."""

import dataclasses
import json
from pathlib import Path

from megatron_owl2.data.batch import Batch
from megatron_owl2.errors import DataError
from megatron_owl2.utils.files import truncate_jsonl

FRACTION_AFTER = 1000  # slots of a rank before max_bad_fraction is applied
_PATTERN = "bad_samples.rank*.jsonl"


class BadSampleLog:
    """Writes one JSON line for every unusable sample of the batches of one rank and stops the run.

    `path` None keeps no file.
    """

    def __init__(self, path: Path | None, max_bad_fraction: float, max_bad_in_a_row: int):
        self._path = path
        self._max_bad_fraction = max_bad_fraction
        self._max_bad_in_a_row = max_bad_in_a_row
        self._seen = self._bad = self._in_a_row = 0

    def add(self, batch: Batch) -> None:
        """Count a batch and list its bad samples.

        Raises DataError if more than `max_bad_fraction` of the slots needed a substitute (looked
        at from the 1000th slot on) or `max_bad_in_a_row` slots in a row did.
        """
        bad_slots = {sample.slot for sample in batch.bad_samples}
        self._seen += len(batch.slots)
        self._bad += len(bad_slots)
        if not bad_slots:
            self._in_a_row = 0
            return
        self._write(batch)
        for slot in batch.slots.tolist():
            self._in_a_row = self._in_a_row + 1 if slot in bad_slots else 0
            if self._in_a_row == self._max_bad_in_a_row:
                self._stop(
                    batch,
                    f"{self._in_a_row} slots in a row",
                    f"data.max_bad_in_a_row is {self._max_bad_in_a_row}",
                )
        if self._seen >= FRACTION_AFTER and self._bad > self._max_bad_fraction * self._seen:
            self._stop(
                batch,
                f"{self._bad} of {self._seen} slots ({self._bad / self._seen:.2%})",
                f"data.max_bad_fraction is {self._max_bad_fraction}",
            )

    def _write(self, batch: Batch) -> None:
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            lines = [json.dumps(dataclasses.asdict(sample)) for sample in batch.bad_samples]
            with self._path.open("a") as file:
                file.write("\n".join(lines) + "\n")

    def _stop(self, batch: Batch, amount: str, limit: str) -> None:
        raise DataError(
            f"{amount} had unusable samples ({limit}); the last: {batch.bad_samples[-1].reason}. "
            f"All are listed in {self._path or 'the batches'}"
        )


def path_of(output: Path, rank: int) -> Path:
    """The ledger of a rank in a run directory."""
    return output / _PATTERN.replace("*", str(rank))


def drop_after(output: Path, slots: int) -> None:
    """Forget what a resumed run, standing at `slots`, will meet again."""
    for path in output.glob(_PATTERN):
        truncate_jsonl(path, lambda row: row["slot"] < slots)
