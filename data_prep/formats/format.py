"""Interface of an input format: `plan` cuts an input into splits, `read` turns one into records."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from data_prep.splits import InputPlan, ReadOptions, Skipped
from megatron_owl2.data.shards.records import Record


@runtime_checkable
class Format(Protocol):
    """A published form of data sets; `name` is the value of `--format`.

    An instance is pickled and sent to every worker process, so it holds no open files.
    """

    @property
    def name(self) -> str:
        """Name of the format on the command line."""
        ...

    def plan(self, source: Path, options: ReadOptions) -> InputPlan:
        """Splits of the input at `source`, and the files in it that are not read.

        Runs once, in the main process, on every machine that takes part; the same input and
        options must give the same splits. Names of splits are unique and consist of letters,
        digits, `_` and `-` (`common.inputs.sanitize_name`). The identity of a split must change
        whenever its samples may have changed. A payload must be picklable and small: a path and
        a range rather than the samples. Samples are best left to `read`, since nothing that is
        done here runs in parallel. Files are found by `corpus_files.find_files`, which follows
        links and passes over hidden files and `options.output`; whatever is not read is named.

        Raises PreprocessError, naming the file and the fix, if the input is not of this format,
        or if `options` lack what the format needs or hold what it has no use for.
        """
        ...

    def read(self, payload: Any) -> Iterator[Record | Skipped]:
        """Samples of the split with this payload, one at a time, so that memory stays bounded.

        Every sample of the input comes out exactly once: as a Record, or as a Skipped whose
        reason is one of few categories and whose detail says which sample it was. The order and
        the contents must be the same in every call, because a split may be read twice. Keys are
        unique in a split and do not depend on how the input was split. Image bytes are handed
        over undecoded; size limits, filters and re-encoding are applied by the caller.

        A damaged sample must not raise. OSError may pass through: it stops the run, which can be
        continued once the disk or network works again.
        """
        ...
