"""Orders of samples: which sample each position of an epoch has, computed and never stored.

An order is a pure function of (seed, epoch, position). It knows neither ranks nor workers, so each
step has the same samples on any number of them, and a run resumes at any position without reading
what came before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from launcher.engine.data.permutation import Permutation
from launcher.engine.data.seeds import derive
from launcher.errors import RecipeError
from launcher.printable import kind_of

Positions = NDArray[np.int64]
"""Positions in an epoch, or samples, of shape (N,)."""

Shuffle = Literal["global", "window", "length"]
"""The settings of `Recipe.shuffle`."""

BLOCK = 1024
"""Samples in a chunk of a data set that does not say how its storage lies."""

_CHUNKS, _WINDOWS, _BATCHES, _SHORT = range(4)
"""What a seed is derived for: the order of chunks, samples in a window, batches in a window, and
the place of the short batch."""

_CACHED_WINDOWS = 8
"""Sorted windows that are kept: the positions of a lookup lie in few of them."""


class Order(Protocol):
    """Maps positions of an epoch to samples."""

    def elements_at(self, epoch: int, positions: Positions) -> Positions:
        """Return the samples at some positions of an epoch.

        Args:
            epoch: The epoch, counted from 0.
            positions: Positions of shape (N,), each in range(number of positions of an epoch).

        Returns:
            Samples of shape (N,).
        """
        ...


@dataclass(frozen=True, kw_only=True)
class OrderRequest:
    """What an order depends on, besides the data."""

    seed: int
    """The seed of the run."""

    shuffle: Shuffle = "global"
    """How samples are shuffled."""

    window: int
    """Samples of a window, for `window` and `length`."""

    batch_size: int
    """Samples of a global batch in the first stage."""

    total_positions: int
    """Positions of the whole run, over which proportions may change."""

    is_timed: bool = False
    """Whether the run's length follows from its speed, so that `total_positions` is only a limit.
    """


@runtime_checkable
class OrderedData(Protocol):
    """A data set with an order of its own, such as a mixture."""

    def make_order(self, request: OrderRequest) -> Order:
        """Return the order of the samples.

        Raises:
            RecipeError: The data set cannot be ordered as requested.
        """
        ...


class GlobalOrder:
    """Every epoch is a uniform permutation of all samples.

    Args:
        samples: Number of samples.
        seed: The seed.
    """

    def __init__(self, samples: int, seed: int) -> None:
        self._samples, self._seed = samples, seed

    def elements_at(self, epoch: int, positions: Positions) -> Positions:
        """Return the samples at some positions of an epoch."""
        return Permutation(self._samples, self._seed, epoch)(positions)


class SequentialOrder:
    """Samples come as the data set numbers them."""

    def elements_at(self, epoch: int, positions: Positions) -> Positions:
        """Return the positions themselves."""
        return positions


class WindowOrder:
    """Chunks come in a seeded order, and samples are shuffled inside windows of it.

    The chunks of an epoch are laid end to end. Windows of `window` positions divide this sequence,
    and each is shuffled by itself, so that the samples of a window lie in few chunks.

    Args:
        chunks: Number of samples in each chunk, in the order of the samples.
        window: Samples of a window.
        seed: The seed.
    """

    def __init__(
        self, chunks: Sequence[int] | NDArray[np.integer[Any]], window: int, seed: int
    ) -> None:
        self._sizes = compact(np.asarray(chunks))
        self._samples = int(self._sizes.sum(dtype=np.int64))
        self._dtype = np.min_scalar_type(-self._samples - 1)
        self._starts = np.cumsum(self._sizes, dtype=self._dtype) - self._sizes
        self._window, self._seed = window, seed
        self._layout: tuple[int, NDArray[Any], NDArray[Any]] = (-1, self._starts, self._starts)

    def elements_at(self, epoch: int, positions: Positions) -> Positions:
        """Return the samples at some positions of an epoch."""
        windows = positions // self._window
        places = np.empty_like(positions)
        seed = derive(self._seed, _WINDOWS, epoch)
        for number in np.unique(windows).tolist():
            start = number * self._window
            size = min(self._window, self._samples - start)
            inside = windows == number
            places[inside] = start + Permutation(size, seed, number)(positions[inside] - start)
        ends, shifts = self._lay_out(epoch)
        # Of one type, or NumPy would convert all ends in each lookup.
        return places + shifts[ends.searchsorted(places.astype(self._dtype), side="right")]

    def _lay_out(self, epoch: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return the end of each chunk in an epoch, and what turns its places into samples."""
        if self._layout[0] != epoch:
            count = len(self._sizes)
            order = Permutation(count, derive(self._seed, _CHUNKS), epoch)(np.arange(count))
            sizes = self._sizes[order]
            ends = np.cumsum(sizes, dtype=self._dtype)
            shifts = self._starts[order] - (ends - sizes)
            self._layout = (epoch, ends, shifts)
        return self._layout[1:]


class LengthOrder:
    """Batches hold samples of similar length, and come in a random order.

    A global permutation is divided into windows. Inside a window, samples are sorted by length and
    divided into batches, and these are shuffled. The short batch of an epoch stays at its end.

    Args:
        lengths: The length of each sample.
        window: Samples of a window; it is rounded down to a multiple of the batch size.
        batch_size: Samples of a batch.
        seed: The seed.
    """

    def __init__(
        self, lengths: NDArray[np.integer[Any]], window: int, batch_size: int, seed: int
    ) -> None:
        self._lengths, self._batch_size, self._seed = lengths, batch_size, seed
        self._window = max(window // batch_size, 1) * batch_size
        self._base = GlobalOrder(len(lengths), seed)
        self._sorted: dict[tuple[int, int], Positions] = {}

    def elements_at(self, epoch: int, positions: Positions) -> Positions:
        """Return the samples at some positions of an epoch."""
        windows = positions // self._window
        elements = np.empty_like(positions)
        for number in np.unique(windows).tolist():
            inside = windows == number
            offsets = positions[inside] - number * self._window
            elements[inside] = self._sorted_window(epoch, number)[offsets]
        return elements

    def _sorted_window(self, epoch: int, number: int) -> Positions:
        key = (epoch, number)
        if key not in self._sorted:
            while len(self._sorted) >= _CACHED_WINDOWS:
                del self._sorted[next(iter(self._sorted))]
            self._sorted[key] = self._sort(epoch, number)
        return self._sorted[key]

    def _sort(self, epoch: int, number: int) -> Positions:
        start = number * self._window
        stop = min(start + self._window, len(self._lengths))
        elements = self._base.elements_at(epoch, np.arange(start, stop))
        elements = elements[np.argsort(self._lengths[elements], kind="stable")]
        batches, rest = divmod(len(elements), self._batch_size)
        if rest:  # of any length, so that the last batch is not always that of the longest samples
            place = derive(self._seed, _SHORT, epoch) % (batches + 1) * self._batch_size
            short = elements[place : place + rest]
            elements = np.concatenate([elements[:place], elements[place + rest :]])
        if batches:
            order = Permutation(batches, derive(self._seed, _BATCHES, epoch), number)
            elements = elements.reshape(batches, -1)[order(np.arange(batches))].ravel()
        return np.concatenate([elements, short]) if rest else elements


def look_up(order: Order, epoch: int, ranges: list[range]) -> list[list[int]]:
    """Return the samples at several ranges of positions of an epoch, computed together.

    Args:
        order: The order.
        epoch: The epoch, counted from 0.
        ranges: Ranges of positions, each with step 1.

    Returns:
        A list of samples for each range.
    """
    positions = np.concatenate([np.arange(span.start, span.stop) for span in ranges])
    flat = order.elements_at(epoch, positions).tolist()
    elements, start = [], 0
    for span in ranges:
        elements.append(flat[start : start + len(span)])
        start += len(span)
    return elements


def order_of(dataset: Any, samples: int, request: OrderRequest, lengths: Any = None) -> Order:
    """Return the order in which a run reads a data set.

    Args:
        dataset: The training set.
        samples: Number of its samples.
        request: How they are shuffled.
        lengths: The length of each sample, which `shuffle=length` needs.

    Raises:
        RecipeError: The data set lacks what the order needs, or says something that cannot be.
    """
    if isinstance(dataset, OrderedData):
        return dataset.make_order(request)
    if request.shuffle == "global":
        return GlobalOrder(samples, request.seed)
    if request.shuffle == "window":
        return WindowOrder(chunks_of(dataset, samples), request.window, request.seed)
    if lengths is None:
        raise RecipeError(
            "shuffle=length puts samples of similar length in a batch, and the data function gave "
            "no lengths. Give Data(lengths=...) the length of each training sample."
        )
    array = whole_numbers(lengths, "Data(lengths=...)", samples)
    return LengthOrder(array, request.window, request.batch_size, request.seed)


def chunks_of(dataset: Any, samples: int) -> NDArray[np.integer[Any]]:
    """Return the samples of each chunk of a data set that its storage reads in sequence.

    They are its attribute `chunks`; those of the parts of a ConcatDataset; or else blocks of
    `BLOCK` samples.

    Raises:
        RecipeError: `chunks` are no whole numbers, or their sum is not the number of samples.
    """
    chunks = getattr(dataset, "chunks", None)
    if chunks is not None:
        sizes = whole_numbers(chunks, f"The attribute chunks of {kind_of(dataset)}")
        total = int(sizes.sum(dtype=np.int64))
        if total != samples:
            raise RecipeError(
                f"The attribute chunks of {kind_of(dataset)} counts {total:,} samples, and the "
                f"data set has {samples:,}. It must have the number of samples in each part that "
                "is read in sequence, in the order of the samples."
            )
        return sizes[sizes > 0]
    parts = getattr(dataset, "datasets", None)
    if isinstance(parts, list) and sum(map(len, parts)) == samples:
        return np.concatenate([chunks_of(part, len(part)) for part in parts])
    full, rest = divmod(samples, BLOCK)
    return np.array([BLOCK] * full + [rest] * (rest > 0), np.int32)


def compact(array: NDArray[np.integer[Any]]) -> NDArray[np.integer[Any]]:
    """Return whole numbers in 32 bits, signed, if they fit, and in 64 otherwise."""
    fits = not len(array) or int(array.max()) <= np.iinfo(np.int32).max
    return array.astype(np.int32 if fits else np.int64, copy=False)


def whole_numbers(values: Any, name: str, count: int | None = None) -> NDArray[np.integer[Any]]:
    """Return whole numbers of at least 0 as an array of 32 or 64 bits; a mapped file stays one.

    Args:
        values: The numbers.
        name: Where they come from, for the message.
        count: How many there must be; None for any number.

    Raises:
        RecipeError: They are something else, or of another number.
    """
    try:
        array = np.asarray(values)
    except Exception:  # noqa: BLE001  # the object is the recipe's own
        array = np.empty((0, 0))
    if array.ndim != 1 or array.dtype.kind not in "iu" or (len(array) and array.min() < 0):
        raise RecipeError(
            f"{name}: expected a list or array of whole numbers of at least 0, found "
            f"{_found(values, array)}."
        )
    if count is not None and len(array) != count:
        raise RecipeError(
            f"{name} has {len(array):,} numbers, and there are {count:,} samples. Give one for "
            "each sample, in the order of the samples."
        )
    return array if isinstance(array, np.memmap) else compact(array)


def _found(values: Any, array: NDArray[Any]) -> str:
    if array.ndim == 1 and array.dtype.kind in "iu":
        index = int((array < 0).argmax())
        return f"{array[index]} at index {index:,}"
    if array.ndim == 1 and array.dtype.kind == "f":
        return "numbers with fractions"
    return kind_of(values)
