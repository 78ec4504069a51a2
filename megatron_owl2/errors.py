"""Errors that users see: one base class with the exit code of `train` and whether to try again.

Every message names the thing (file, key, rank, sample) and the fix. The children keep the built-in
type that callers may catch.
"""


class Owl2Error(Exception):
    """Base of all errors that are told in one line, without a traceback."""

    exit_code = 2  # what is wrong stays wrong
    may_be_retried = False  # whether the same command may succeed another time


class RetryableError(Owl2Error):
    """Base of errors of a disk, a network or a process, which the next try may not meet."""

    exit_code = 1
    may_be_retried = True


class ConfigError(Owl2Error, ValueError):
    """A configuration that cannot run; the message names the key and the fix."""


class MachineError(RetryableError, RuntimeError):
    """A GPU that does not run, as another machine's may; the message names the machine."""


class BadSampleError(Owl2Error, ValueError):
    """One sample that cannot be used because of its data; the message is the reason."""


class ShardError(Owl2Error, RuntimeError):
    """A data set that is unfinished, damaged or unreadable; the message names the file."""


class DataError(Owl2Error, RuntimeError):
    """Too much of the data cannot be used; the message says how much and where to look."""


class LoaderError(RetryableError, RuntimeError):
    """Data workers that do not work, which they may do on another machine or another day."""


class StorageError(RetryableError, RuntimeError):
    """Bytes that could not be had; names the place, the range, the attempts and the last cause."""


class StorageMissing(StorageError):
    """There is no such file."""


class CheckpointError(Owl2Error, RuntimeError):
    """A checkpoint that is not there, not whole, or does not fit; the message says which."""


class CheckpointIOError(CheckpointError, RetryableError):
    """A disk or device that did not read or write a checkpoint, which it may do another time."""

    exit_code = RetryableError.exit_code
    may_be_retried = RetryableError.may_be_retried


class RunDirectoryError(RetryableError, RuntimeError):
    """A run directory that another job uses, or that a disk does not let be made."""


class DivergedError(Owl2Error, FloatingPointError):
    """Gradients that were refused too often in a row; names the step and the settings."""


class ConversionError(Owl2Error, RuntimeError):
    """A directory that cannot be read or written as asked; the message says what to change."""


class InferenceError(Owl2Error, ValueError):
    """A prompt that this model cannot answer, or a model that cannot be loaded; says why."""


class ServingError(RetryableError, RuntimeError):
    """A server that cannot start, or whose engine failed; the message says why."""


class TaskError(Owl2Error, ValueError):
    """Files that are not what the benchmark reads; the message names the file and the fault."""


class ScoreError(Owl2Error, ValueError):
    """Predictions that do not belong to the gold."""


class MissingPredictionsError(ScoreError):
    """Questions of the gold without a prediction; the message lists them."""


class JudgeError(RetryableError, RuntimeError):
    """A judge's server that does not answer or refuses; names the request and the cause."""


class ReportError(Owl2Error, ValueError):
    """Inputs that cannot be reported; the message names the file or option."""


class PreprocessError(Owl2Error):
    """The input or the output folder cannot be used; the message names it and the fix."""
