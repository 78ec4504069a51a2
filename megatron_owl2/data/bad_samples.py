"""Log of samples that training had to substitute, and the limit of them that stops a run."""

import dataclasses
import json
from pathlib import Path

from megatron_owl2.data.batch import BadSample, Batch
from megatron_owl2.errors import DataError
from megatron_owl2.utils.files import truncate_jsonl

FRACTION_AFTER = 1000  # samples of a rank before max_bad_fraction is applied
_PATTERN = "bad_samples.rank*.jsonl"


class BadSampleLog:
    """JSON lines of the unusable samples in the batches of one rank, which stop the run if too
    many.

    `path` None keeps no file.
    """

    def __init__(self, path: Path | None, max_bad_fraction: float, max_bad_in_a_row: int):
        self._path = path
        self._max_bad_fraction = max_bad_fraction
        self._max_bad_in_a_row = max_bad_in_a_row
        self._seen = self._bad = self._in_a_row = 0

    def add(self, batch: Batch) -> None:
        """Count a batch and list its bad samples.

        Raises DataError if more than `max_bad_fraction` of the samples needed a substitute (looked
        at from the 1000th on) or `max_bad_in_a_row` samples in a row did.
        """
        bad_indices = {sample.sample_index for sample in batch.bad_samples}
        self._seen += batch.asked
        self._bad += batch.bad
        if not bad_indices:
            self._in_a_row = 0
            return
        self._write(batch)
        for sample_index, usable in zip(
            batch.sample_indices.tolist(), batch.samples_per_row, strict=True
        ):
            if sample_index not in bad_indices or (batch.packed and usable):
                self._in_a_row = 0
                continue
            self._in_a_row += batch.bad_in_row(sample_index)
            if self._in_a_row >= self._max_bad_in_a_row:
                self._stop(
                    batch,
                    f"{self._in_a_row} samples in a row",
                    f"data.max_bad_in_a_row is {self._max_bad_in_a_row}",
                )
        if self._seen >= FRACTION_AFTER and self._bad > self._max_bad_fraction * self._seen:
            self._stop(
                batch,
                f"{self._bad} of {self._seen} samples ({self._bad / self._seen:.2%})",
                f"data.max_bad_fraction is {self._max_bad_fraction}",
            )

    def _write(self, batch: Batch) -> None:
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            lines = [json.dumps(_to_json(sample)) for sample in batch.bad_samples]
            with self._path.open("a") as file:
                file.write("\n".join(lines) + "\n")

    def _stop(self, batch: Batch, amount: str, limit: str) -> None:
        raise DataError(
            f"{amount} had unusable samples ({limit}); the last: {batch.bad_samples[-1].reason}. "
            f"All are listed in {self._path or 'the batches'}"
        )


def _to_json(sample: BadSample) -> dict:
    tree = dataclasses.asdict(sample)
    return {"slot": tree.pop("sample_index"), **tree}


def path_of(output: Path, rank: int) -> Path:
    """The log of a rank in a run directory."""
    return output / _PATTERN.replace("*", str(rank))


def paths(output: Path) -> list[Path]:
    """The logs of all ranks in a run directory."""
    return sorted(output.glob(_PATTERN))


def drop_after(output: Path, consumed_samples: int) -> None:
    """Drop the lines that a run resumed at `consumed_samples` will write again."""
    for path in paths(output):
        truncate_jsonl(path, lambda row: row["slot"] < consumed_samples)
