"""Samples that cannot be read and are left out of their batch: what is known about them."""

from __future__ import annotations

from typing import Any, NamedTuple

from launcher.engine.data.sample_files import file_of
from launcher.engine.data.sampler import MicroBatchRequest
from launcher.errors import SampleError
from launcher.printable import error_line, printable_line, shortened, text_of

_MAX_TEXT = 500
"""Number of characters of a reason, and of the name of a file, that are kept."""


class BadSample(NamedTuple):
    """A sample that could not be read."""

    split: str
    """The data set: `train`, `evaluation` or `evaluation/NAME`."""

    epoch: int
    """The epoch, counted from 1."""

    sample: int
    """The index of the sample, or its position in the epoch of a stream."""

    file: str | None
    """The file that holds it, if that is known."""

    reason: str
    """What reading it raised, in one line."""


def bad_sample(
    request: MicroBatchRequest, index: int, dataset: Any, error: SampleError
) -> BadSample:
    """Return what is known about a sample that could not be read.

    Args:
        request: The request that was read.
        index: The index of the sample.
        dataset: The data set.
        error: The error that names the sample.
    """
    cause = error.__context__ or error
    reason = error_line(cause) if cause is not error else printable_line(text_of(error))
    return BadSample(
        split=request.split,
        epoch=request.epoch + 1,
        sample=index,
        file=_file_of(dataset, index, cause),
        reason=shortened(reason, _MAX_TEXT),
    )


def may_be_skipped(error: SampleError) -> bool:
    """Return whether an error is about one sample, and not about the process that reads it."""
    cause = error.__context__
    return cause is None or (isinstance(cause, Exception) and not isinstance(cause, MemoryError))


def _file_of(dataset: Any, index: int, cause: BaseException) -> str | None:
    """Return the file of a sample, by the error or by the data set, for a record."""
    found = getattr(cause, "filename", None)
    found = found if isinstance(found, str) else file_of(dataset, index)
    return None if found is None else printable_line(shortened(found, _MAX_TEXT))
