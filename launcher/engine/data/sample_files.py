"""The files that hold samples, for messages and records."""

from __future__ import annotations

import bisect
import os
from typing import Any

_MAX_DEPTH = 5
"""Number of data sets, one inside the other, that are looked into for a file."""


def file_of(dataset: Any, index: int) -> str | None:
    """Return the file that holds a sample, or None if that is not known; never raise an exception.

    It is the result of the data set's method `file_of(index)`, or the file in its list `samples`,
    as in an ImageFolder. What wraps a data set, such as a Subset, is looked into.
    """
    try:
        return _find_file(dataset, index)
    except Exception:  # noqa: BLE001  # the attributes of a recipe's data set may raise anything
        return None


def _find_file(dataset: Any, index: int) -> str | None:
    for _ in range(_MAX_DEPTH):
        if callable(getattr(dataset, "file_of", None)):
            found = dataset.file_of(index)
        elif isinstance(getattr(dataset, "samples", None), list):
            found = dataset.samples[index][0]
        elif isinstance(getattr(dataset, "datasets", None), list):  # a ConcatDataset
            ends = dataset.cumulative_sizes
            part = bisect.bisect_right(ends, index)
            dataset, index = dataset.datasets[part], index - (ends[part - 1] if part else 0)
            continue
        elif hasattr(dataset, "dataset"):
            indices = getattr(dataset, "indices", None)
            dataset, index = dataset.dataset, index if indices is None else int(indices[index])
            continue
        else:
            return None
        is_name = isinstance(found, str) or hasattr(found, "__fspath__")
        return os.fsdecode(found) if is_name else None
    return None
