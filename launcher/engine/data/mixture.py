"""Mixtures of several data sets, in proportions that hold over every stretch of a run.

The positions of an epoch are divided into blocks of `_BLOCK`. How many samples of a block come from
each source follows from its weight by rounding the number of samples up to the block, so that no
count drifts from its proportion, and a seeded order mixes the sources inside the block. Each source
has an order and epochs of its own: it goes on where the block before has left it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from launcher.engine.data.order import (
    Order,
    OrderedData,
    OrderRequest,
    Positions,
    WindowOrder,
    chunks_of,
    order_of,
)
from launcher.engine.data.sample_files import file_of
from launcher.engine.data.seeds import derive, mixed
from launcher.errors import RecipeError
from launcher.printable import kind_of, printable_line

_BLOCK = 16
"""Positions inside which the order of the sources is random."""

_MAX_PARTS = 1024
"""Parts of a run in each of which changing weights are constant."""

_MAX_UNITS = 1 << 30
"""Largest sum of whole numbers that stand for weights, so that products fit in 64 bits."""

_SOURCES, _BLOCKS = 16, 17
"""What a seed is derived for: the order of a source, and that of the sources in a block."""

Weight = float | Sequence[tuple[float, float]]
"""A weight, or its values at rising points of the run, from 0 to 1, as (point, weight)."""


@dataclass(frozen=True)
class Source:
    """A data set in a mixture, and its share."""

    data: Any
    """The data set: map-style, and no mixture itself."""

    _: KW_ONLY

    weight: Weight | None = None
    """The share of the samples, relative to the other weights. A list of (point of the run, weight)
    changes it linearly between these points, as in [(0, 0.9), (1, 0.5)]. None of all sources takes
    all samples of each, once per epoch."""

    repeat: int = 1
    """Without weights: how often an epoch of the mixture takes each sample."""

    limit: int | None = None
    """Number of samples that belong to the mixture, the first ones; None takes all."""


class Mixture:
    """A data set that mixes samples of several sources in exact proportions.

    Without weights, an epoch takes every sample of every source, `repeat` times, evenly spread over
    the epoch. With weights, each source goes through its samples at the speed of its share, again
    and again, and an epoch of the mixture is `samples` positions long: by default as many as the
    sources have samples together.

    Sample `i` of a source has the number `i` plus the sizes of the sources before it, plus the size
    of all sources for each pass over the source. The pass makes augmentation draw other numbers.

    Args:
        sources: The sources, or a mapping from names to sources.
        samples: Number of samples in an epoch; None for the numbers above.

    Raises:
        RecipeError: A source, weight, repeat or limit cannot be used.
    """

    def __init__(
        self, sources: Sequence[Source] | Mapping[str, Source], samples: int | None = None
    ) -> None:
        named = sources if isinstance(sources, Mapping) else dict(enumerate(sources))
        self._names = [name if isinstance(name, str) else f"source {name}" for name in named]
        self._sources = [
            _checked(name, each) for name, each in zip(self._names, named.values(), strict=True)
        ]
        if not self._sources:
            raise RecipeError("A mixture needs at least one source, and got none.")
        self._sizes = [_size(name, each) for name, each in self._named()]
        self._ends = np.cumsum(self._sizes)
        self._curves = self._make_curves()
        total = sum(
            size * each.repeat for size, each in zip(self._sizes, self._sources, strict=True)
        )
        if samples is not None and not (_is_whole(samples) and samples > 0):
            raise RecipeError(
                f"Mixture(samples={samples}): expected the number of samples of an epoch, at "
                "least 1."
            )
        self._samples = samples or total

    def __len__(self) -> int:
        return self._samples

    def __getitem__(self, index: int) -> Any:
        source, place = self._locate(index)
        return self._sources[source].data[place]

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        places = [self._locate(index) for index in indices]
        samples: list[Any] = [None] * len(places)
        for source in sorted({source for source, _ in places}):
            rows = [row for row, (owner, _) in enumerate(places) if owner == source]
            data = self._sources[source].data
            wanted = [places[row][1] for row in rows]
            batched = getattr(data, "__getitems__", None)
            found = batched(wanted) if callable(batched) else [data[place] for place in wanted]
            for row, sample in zip(rows, found, strict=True):
                samples[row] = sample
        return samples

    def _locate(self, index: int) -> tuple[int, int]:
        """Return the source of a sample, and its index there."""
        if index < 0:
            raise IndexError(f"sample {index} of a mixture")
        place = index % int(self._ends[-1])
        source = int(self._ends.searchsorted(place, side="right"))
        return source, place - int(self._ends[source]) + self._sizes[source]

    def fingerprint(self) -> str:
        """Return a text that changes with the sources, their shares and their indices."""
        parts = [
            f"{name}: {size:,} samples, weight {curve}, "
            f"{getattr(each.data, 'fingerprint', str)() if _has_fingerprint(each.data) else ''}"
            for (name, each), size, curve in zip(
                self._named(), self._sizes, self._curves, strict=True
            )
        ]
        digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
        return f"mixture of {', '.join(self._names)}, {self._samples:,} samples an epoch, {digest}"

    def file_of(self, index: int) -> str | None:
        """Return the file that holds a sample, if its source tells it."""
        source, place = self._locate(index)
        return file_of(self._sources[source].data, place)

    def make_order(self, request: OrderRequest) -> Order:
        """Return the order of the mixture in a run.

        Raises:
            RecipeError: The weights change over a run whose length is unknown, or samples are to be
                ordered by length.
        """
        if request.shuffle == "length":
            raise RecipeError(
                "shuffle=length orders one data set, and the training set is a mixture. Use "
                "shuffle=global or window."
            )
        if request.is_timed and any(len(curve) > 1 for curve in self._curves):
            raise RecipeError(
                "The weights of the mixture change over the run, and max_time leaves its length "
                "open until the speed is known. Use constant weights, or steps or epochs alone."
            )
        orders = [
            self._source_order(index, replace(request, seed=derive(request.seed, _SOURCES, index)))
            for index in range(len(self._sources))
        ]
        return MixtureOrder(
            sizes=self._sizes,
            orders=orders,
            samples=self._samples,
            seed=request.seed,
            quotas=make_quotas(self._curves, request.total_positions),
        )

    def _source_order(self, index: int, request: OrderRequest) -> Order:
        data, size = self._sources[index].data, self._sizes[index]
        if request.shuffle == "window":
            return WindowOrder(_cut(chunks_of(data, len(data)), size), request.window, request.seed)
        return order_of(data, size, request)

    def _named(self) -> list[tuple[str, Source]]:
        return list(zip(self._names, self._sources, strict=True))

    def _make_curves(self) -> list[Curve]:
        """Return the weight of each source at points of the run.

        Raises:
            RecipeError: Some sources have weights and others none, or all are 0 at some point.
        """
        without = [name for name, each in self._named() if each.weight is None]
        if without and len(without) < len(self._sources):
            raise RecipeError(
                f"{without[0]} of the mixture has no weight, and other sources have one. Give "
                "weights to all sources or to none."
            )
        if without:
            return [
                [(0.0, float(size * each.repeat))]
                for size, each in zip(self._sizes, self._sources, strict=True)
            ]
        curves = [_curve(name, each) for name, each in self._named()]
        points = sorted({point for curve in curves for point, _ in curve})
        for point in points:
            if not any(_value(curve, point) for curve in curves):
                raise RecipeError(
                    f"All weights of the mixture are 0 at {point:.0%} of the run. At least one "
                    "must be greater than 0."
                )
        return curves


Curve = list[tuple[float, float]]
"""(point of the run, weight) at rising points."""


def _checked(name: str, source: Any) -> Source:
    """Return a source, or a data set as a source.

    Raises:
        RecipeError: It cannot be one.
    """
    if not isinstance(source, Source):
        raise RecipeError(
            f"{name} of the mixture is {kind_of(source)}. Write it as launcher.Source(data, "
            "weight=...)."
        )
    if isinstance(source.data, OrderedData):
        raise RecipeError(
            f"{name} of the mixture is {kind_of(source.data)}, which has an order of its own. Give "
            "its sources to this mixture instead."
        )
    if not (_is_whole(source.repeat) and source.repeat > 0):
        raise RecipeError(
            f"{name} of the mixture: repeat={source.repeat}, expected a whole number of at least "
            "1. Leave a source out to take none of its samples."
        )
    if source.repeat > 1 and source.weight is not None:
        raise RecipeError(
            f"{name} of the mixture has repeat={source.repeat} and a weight. The weight alone says "
            "how many samples are taken; remove repeat."
        )
    if source.limit is not None and not (_is_whole(source.limit) and source.limit > 0):
        raise RecipeError(
            f"{name} of the mixture: limit={source.limit}, expected a number of samples of at "
            "least 1, or None for all."
        )
    return source


def _size(name: str, source: Source) -> int:
    """Return the number of samples that a source has in the mixture.

    Raises:
        RecipeError: It has no length, or no samples.
    """
    if not (hasattr(source.data, "__len__") and hasattr(source.data, "__getitem__")):
        raise RecipeError(
            f"{name} of the mixture is {kind_of(source.data)}, expected a data set with __len__ "
            "and __getitem__."
        )
    size = len(source.data)
    if not size:
        raise RecipeError(f"{name} of the mixture is empty: {kind_of(source.data)} has length 0.")
    return size if source.limit is None else min(size, source.limit)


def _curve(name: str, source: Source) -> Curve:
    """Return the weight of a source as a curve; a constant one has one point.

    Raises:
        RecipeError: It is no weight.
    """
    weight = source.weight
    points = [(0.0, weight)] if isinstance(weight, (int, float)) else weight
    try:
        curve = [(float(point), float(value)) for point, value in points]  # type: ignore[union-attr]
    except (TypeError, ValueError):
        curve = []
    if not curve:
        raise RecipeError(
            f"{name} of the mixture has weight={printable_line(repr(weight)[:80])}; expected a "
            "number, or a list of (point of the run, weight) such as [(0, 0.9), (1, 0.5)]."
        )
    if not all(0 <= value < math.inf for _, value in curve):
        wrong = next(value for _, value in curve if not 0 <= value < math.inf)
        raise RecipeError(
            f"{name} of the mixture has the weight {wrong:g}; expected a finite number of at least "
            "0."
        )
    where = [point for point, _ in curve]
    if where != sorted(set(where)) or not 0 <= where[0] <= where[-1] <= 1:
        raise RecipeError(
            f"{name} of the mixture has weights at {', '.join(f'{point:g}' for point in where)}; "
            "expected rising points of the run between 0 and 1."
        )
    return curve[:1] if len({value for _, value in curve}) == 1 else curve


def _value(curve: Curve, point: float) -> float:
    """Return the weight at a point of the run: linear between points, constant outside of them."""
    points, values = zip(*curve, strict=True)
    return float(np.interp(point, points, values))


@dataclass(frozen=True, kw_only=True)
class Quotas:
    """How many samples each source gives to each part of a run.

    The last part goes on for ever in its proportions.
    """

    size: int
    """Positions of each part."""

    units: NDArray[np.int64]
    """Whole numbers in the proportion of the sources, of shape (parts, sources)."""

    taken: NDArray[np.int64]
    """Samples of each source before each part, of shape (parts, sources)."""

    def before(self, positions: Positions) -> NDArray[np.int64]:
        """Return the samples of each source before positions of the run, of shape (N, sources)."""
        parts = np.minimum(positions // self.size, len(self.units) - 1)
        counts = np.empty((len(positions), self.units.shape[1]), np.int64)
        for part in np.unique(parts).tolist():
            rows = np.flatnonzero(parts == part)
            inside = positions[rows] - part * self.size
            counts[rows] = self.taken[part] + _divide(inside, self.units[part])
        return counts


def _divide(counts: NDArray[np.int64], units: NDArray[np.int64]) -> NDArray[np.int64]:
    """Divide numbers of samples among sources, in proportion to `units`.

    Half of the sources get their rounded share, the others the rest, and so on in each half. With
    every further sample, the number of exactly one source grows by one.

    Args:
        counts: Numbers of samples, of shape (N,).
        units: The proportions, of shape (sources,), whose sum is at most `_MAX_UNITS`.

    Returns:
        Samples of each source, of shape (N, sources).
    """
    if len(units) == 1:
        return counts[:, None]
    half = len(units) // 2
    first, total = int(units[:half].sum()), int(units.sum())
    if not total:
        return np.zeros((len(counts), len(units)), np.int64)
    whole, rest = np.divmod(counts, total)
    left = whole * first + (2 * rest * first + total) // (2 * total)
    return np.concatenate(
        [_divide(left, units[:half]), _divide(counts - left, units[half:])], axis=1
    )


def make_quotas(curves: list[Curve], total_positions: int) -> Quotas:
    """Return the quotas of sources whose weights follow `curves` over a run.

    Args:
        curves: The weight of each source.
        total_positions: Positions of the run.
    """
    num_sources = len(curves)
    if all(len(curve) == 1 for curve in curves):
        units = _whole_units([curve[0][1] for curve in curves])
        return Quotas(size=1, units=units[None], taken=np.zeros((1, num_sources), np.int64))
    size = max(-(-total_positions // _MAX_PARTS), _BLOCK)
    num_parts = -(-total_positions // size)
    units = np.zeros((num_parts, num_sources), np.int64)
    owed = [0.0] * num_sources
    for part in range(num_parts):
        weights = [_value(curve, (part + 0.5) / num_parts) for curve in curves]
        total = math.fsum(weights)
        owed = [debt + size * weight / total for debt, weight in zip(owed, weights, strict=True)]
        units[part] = apportion(owed, size)
        owed = [debt - int(given) for debt, given in zip(owed, units[part], strict=True)]
    return Quotas(size=size, units=units, taken=np.cumsum(units, axis=0) - units)


def apportion(shares: Sequence[float], total: int) -> list[int]:
    """Return whole numbers with the sum `total`, by the largest remainders of `shares`."""
    numbers = [max(math.floor(share), 0) for share in shares]
    remainders = [share - number for share, number in zip(shares, numbers, strict=True)]
    while (missing := total - sum(numbers)) != 0:
        step = 1 if missing > 0 else -1
        able = [index for index, number in enumerate(numbers) if number + step >= 0]
        chosen = max(able, key=lambda index: step * remainders[index])
        numbers[chosen] += step
        remainders[chosen] -= step
    return numbers


def _whole_units(weights: list[float]) -> NDArray[np.int64]:
    """Return whole numbers in the proportion of `weights`; exact if their sum is small enough."""
    fractions = [Fraction(repr(weight)) for weight in weights]
    denominator = math.lcm(*(fraction.denominator for fraction in fractions))
    numbers = [int(fraction * denominator) for fraction in fractions]
    divisor = math.gcd(*numbers)
    numbers = [number // divisor for number in numbers]
    total = sum(numbers)
    if total > _MAX_UNITS:
        numbers = apportion([number * _MAX_UNITS / total for number in numbers], _MAX_UNITS)
    return np.array(numbers, np.int64)


class MixtureOrder:
    """The order of a mixture.

    Args:
        sizes: Samples of each source.
        orders: The order of each source.
        samples: Positions of an epoch of the mixture.
        seed: The seed of the run.
        quotas: How many samples each source gives.
    """

    def __init__(
        self, *, sizes: list[int], orders: list[Order], samples: int, seed: int, quotas: Quotas
    ) -> None:
        self._sizes, self._orders, self._samples, self._quotas = sizes, orders, samples, quotas
        self._total = sum(sizes)
        self._starts = [sum(sizes[:index]) for index in range(len(sizes))]
        self._key = derive(seed, _BLOCKS)

    def elements_at(self, epoch: int, positions: Positions) -> Positions:
        """Return the samples at some positions of an epoch."""
        sources, counts = self.sources_at(epoch, positions)
        elements = np.empty_like(positions)
        for source in np.unique(sources).tolist():
            chosen = np.flatnonzero(sources == source)
            passes, places = np.divmod(counts[chosen], self._sizes[source])
            found = np.empty_like(places)
            for each in np.unique(passes).tolist():
                rows = passes == each
                found[rows] = self._orders[source].elements_at(each, places[rows])
            elements[chosen] = self._starts[source] + found + self._total * passes
        return elements

    def sources_at(self, epoch: int, positions: Positions) -> tuple[Positions, Positions]:
        """Return the source at each position of an epoch, and its samples that come before.

        Args:
            epoch: The epoch of the mixture.
            positions: Positions in the epoch, of shape (N,).

        Returns:
            The sources, and for each position the number of samples that its source has given since
            the start of the run.
        """
        blocks, rows = np.unique(positions // _BLOCK, return_inverse=True)
        starts, epoch_start = blocks * _BLOCK, epoch * self._samples
        stops = np.minimum(starts + _BLOCK, self._samples)
        before = self._quotas.before(epoch_start + starts)
        ends = np.cumsum(self._quotas.before(epoch_start + stops) - before, axis=1)
        places = starts[:, None] + np.arange(_BLOCK)
        keys = mixed((epoch_start + places).astype(np.uint64) ^ np.uint64(self._key))
        keys[places >= self._samples] = np.iinfo(np.uint64).max  # beyond the end of the epoch
        slots = np.argsort(np.argsort(keys, axis=1, kind="stable"), axis=1, kind="stable")
        sources = np.zeros_like(slots)
        for end in ends[:, :-1].T:
            sources += slots >= end[:, None]
        ranks = np.argsort(np.argsort(sources, axis=1, kind="stable"), axis=1, kind="stable")
        first = np.concatenate([np.zeros((len(blocks), 1), np.int64), ends[:, :-1]], axis=1)
        found = sources[rows, positions % _BLOCK]
        offsets = ranks[rows, positions % _BLOCK] - first[rows, found]
        return found, before[rows, found] + offsets


def _cut(chunks: NDArray[np.integer[Any]], limit: int) -> NDArray[np.integer[Any]]:
    """Return the chunks that hold the first `limit` samples."""
    ends = np.cumsum(chunks, dtype=np.int64)
    kept = chunks[: int(ends.searchsorted(limit)) + 1].copy()
    kept[-1] -= max(int(ends[len(kept) - 1]) - limit, 0)
    return kept


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _has_fingerprint(data: Any) -> bool:
    return callable(getattr(data, "fingerprint", None))
