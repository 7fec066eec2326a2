"""Per-sample weights: how often each sample of a data set occurs, without chance in the counts."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from launcher.engine.data.order import Order, OrderRequest, Positions, compact
from launcher.engine.data.permutation import Permutation
from launcher.engine.data.sample_files import file_of
from launcher.engine.data.seeds import derive
from launcher.errors import RecipeError
from launcher.printable import kind_of

_GOLDEN = 0.6180339887498949
"""Fraction of the golden ratio, whose multiples are spread most evenly between 0 and 1."""

_START, _ORDER = 32, 33
"""What a seed is derived for: where counts begin, and the order inside an epoch."""


_HASHED = 1 << 16
"""Groups of which a text is made at a time, for the fingerprint."""


class Weighted:
    """A data set whose samples occur in proportion to their weights; see `weighted`.

    Occurrence `r` of sample `i` in an epoch has the number `i` plus `r` times the number of
    samples, so that augmentation draws other numbers for each.
    """

    def __init__(
        self, data: Any, weights: NDArray[np.float64], groups: NDArray[Any] | None, samples: int
    ) -> None:
        self._data, self._weights, self._groups = data, weights, groups
        self._size, self._samples = len(weights), samples

    def __len__(self) -> int:
        return self._samples

    def __getitem__(self, index: int) -> Any:
        if index < 0:
            raise IndexError(f"sample {index}")
        return self._data[index % self._size]

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        places = [index % self._size for index in indices]
        batched = getattr(self._data, "__getitems__", None)
        return list(batched(places)) if callable(batched) else [self._data[each] for each in places]

    @property
    def dataset(self) -> Any:
        """Return the data set without weights."""
        return self._data

    def fingerprint(self) -> str:
        """Return a text that changes with the weights and the index of the data set."""
        inner = getattr(self._data, "fingerprint", None)
        index = inner() if callable(inner) else ""
        digest = hashlib.sha256(str(index).encode())
        digest.update(self._weights.data)
        groups = np.empty(0) if self._groups is None else self._groups
        for start in range(0, len(groups), _HASHED):
            digest.update(repr(groups[start : start + _HASHED].tolist()).encode())
        return f"weighted, {self._samples:,} samples an epoch, {digest.hexdigest()[:16]}"

    def file_of(self, index: int) -> str | None:
        """Return the file that holds a sample, if the data set tells it."""
        return file_of(self._data, index % self._size)

    def make_order(self, request: OrderRequest) -> Order:
        """Return the order in which a run draws the samples.

        Raises:
            RecipeError: The samples are to be shuffled in windows or by length.
        """
        if request.shuffle != "global":
            raise RecipeError(
                f"shuffle={request.shuffle} does not work with launcher.weighted, which takes "
                "samples from the whole data set. Use shuffle=global."
            )
        return WeightedOrder(self._weights, self._groups, self._samples, request.seed)


class WeightedOrder:
    """Each epoch has every sample as often as its weight says, rounded up or down.

    Samples lie on a line, each on an interval as long as its share of the epoch. Evenly spaced
    points pick them (systematic sampling), and the picks of an epoch are permuted. The points begin
    elsewhere in each epoch, so that over epochs the counts approach the shares. Samples of one
    group, or else of one weight, lie next to each other, so that their total is rounded as well.

    Args:
        weights: The weight of each sample.
        groups: The group of each sample; None groups samples of equal weight.
        samples: Number of picks in an epoch.
        seed: The seed of the run.
    """

    def __init__(
        self,
        weights: NDArray[np.float64],
        groups: NDArray[Any] | None,
        samples: int,
        seed: int,
    ) -> None:
        self._line = compact(np.argsort(weights if groups is None else groups, kind="stable"))
        along = weights[self._line]
        last = len(along) - 1 - int((along[::-1] > 0).argmax())
        self._ends = np.cumsum(along, out=along)
        self._ends *= samples / self._ends[-1]
        self._ends[last:] = samples
        self._samples, self._seed = samples, seed

    def elements_at(self, epoch: int, positions: Positions) -> Positions:
        """Return the samples at some positions of an epoch."""
        start = (derive(self._seed, _START) / 2**64 + epoch * _GOLDEN) % 1
        picks = Permutation(self._samples, derive(self._seed, _ORDER), epoch)(positions)
        places = self._ends.searchsorted(picks + start, side="right")
        interval_starts = np.where(places > 0, self._ends[places - 1], 0.0)
        # The picks of a sample are consecutive; the first lies at or after the start of its
        # interval.
        occurrences = picks - np.ceil(interval_starts - start).astype(np.int64)
        return self._line[places] + np.maximum(occurrences, 0) * len(self._line)


def weighted(
    data: Any, weights: Any, *, groups: Any = None, samples: int | None = None
) -> Weighted:
    """Return a data set whose samples occur in proportion to their weights.

    In an epoch of T samples, a sample with the share w of all weights occurs T x w times, rounded
    up or down, and so does each group of samples together. Nothing about the counts is left to
    chance. To balance classes, give each sample 1 / (size of its class), and its class as group.

    Args:
        data: The data set, map-style.
        weights: The weight of each sample, at least 0.
        groups: The group of each sample, such as its class; None groups samples of equal weight.
        samples: Number of samples in an epoch; None for the number of the data set.

    Raises:
        RecipeError: Weights or groups do not fit the data set, are negative, or are all 0.
    """
    size = len(data)
    array = _as_array(weights, "weights", size)
    if array.dtype.kind not in "iufb":
        raise RecipeError(f"weighted(weights=...): expected numbers, found {kind_of(weights)}.")
    array = np.ascontiguousarray(array, np.float64)
    wrong = np.flatnonzero(~((array >= 0) & (array < np.inf)))
    if len(wrong):
        raise RecipeError(
            f"weighted(weights=...): sample {wrong[0]:,} has the weight {array[wrong[0]]:g}; "
            "expected finite numbers of at least 0."
        )
    if not array.sum() > 0:
        raise RecipeError(
            f"weighted(weights=...): all {size:,} weights are 0, so that no sample would be taken. "
            "Give some samples a weight greater than 0."
        )
    if samples is not None and (not isinstance(samples, int) or samples < 1):
        raise RecipeError(
            f"weighted(samples={samples}): expected the number of samples of an epoch, at least 1."
        )
    grouped = None if groups is None else _as_array(groups, "groups", size)
    return Weighted(data, array, grouped, samples or size)


def _as_array(values: Any, name: str, size: int) -> NDArray[Any]:
    """Return one value for each sample as an array.

    Raises:
        RecipeError: There is not one for each sample.
    """
    array = np.asarray(values)
    if array.ndim != 1:
        raise RecipeError(
            f"weighted({name}=...): expected one value for each sample, found {kind_of(values)}."
        )
    if len(array) != size:
        raise RecipeError(
            f"weighted({name}=...) has {len(array):,} values, and the data set has {size:,} "
            "samples. Give one for each sample, in their order."
        )
    return array
