"""The gradient noise scale: how large a batch is worth its samples.

McCandlish, Kaplan, Amodei et al., "An Empirical Model of Large-Batch Training" (arXiv:1812.06162).
The squared norm of a gradient over b items is, on average, |G|^2 + tr(S) / b, G being the true
gradient and S the covariance of one item's. Norms at two sizes of batch give both, and
B_simple = tr(S) / |G|^2 (their appendix A.1). Each of the two is averaged on its own before they
are divided: the mean of the ratios is far off.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

_BLOCKS = 20
"""Steps that follow each other are alike; the error is taken from the spread of so many blocks."""

_LEAST_MEASUREMENTS = 20
_SIGMAS = 2.0
"""The interval's half width: about 95 %."""

LARGEST = 2.0
"""Batches beyond so many times B_simple are not recommended: they save a sixth of the steps at
most, for half as many samples again or more."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Squared norms of the mean gradient over few and over many items, in one step."""

    step: int
    small: float
    """The mean over parts of the batch of |g_part|^2."""

    small_inverse: float
    """The mean over those parts of 1 / items."""

    big: float
    """|g|^2 of the whole batch."""

    big_items: float
    """Items in it."""

    @property
    def noise(self) -> float:
        """An unbiased estimate of tr(S)."""
        return (self.small - self.big) / (self.small_inverse - 1 / self.big_items)

    @property
    def signal(self) -> float:
        """An unbiased estimate of |G|^2."""
        return self.big - self.noise / self.big_items


@dataclass(frozen=True, kw_only=True)
class NoiseScale:
    """What a stretch of training says."""

    b_simple: float
    """tr(S) / |G|^2, in items."""

    low: float
    high: float
    """An interval that has it with about 95 %; `high` may be infinite."""

    noise: float
    """tr(S)."""

    signal: float
    """|G|^2."""

    measurements: int


def estimate(measurements: Sequence[Measurement]) -> NoiseScale | None:
    """Return the noise scale over some steps; None where they say too little.

    That is where they are few, or the gradient is so small that its square comes out negative. The
    interval is that of a jackknife over blocks of steps, on the logarithm; it is open where |G|^2
    cannot be told from zero.
    """
    usable = [
        each for each in measurements if math.isfinite(each.small) and math.isfinite(each.big)
    ]
    if len(usable) < _LEAST_MEASUREMENTS:
        return None
    noise = sum(each.noise for each in usable)
    signal = sum(each.signal for each in usable)
    if noise <= 0 or signal <= 0:
        return None
    size = math.ceil(len(usable) / _BLOCKS)
    blocks = [usable[start : start + size] for start in range(0, len(usable), size)]
    noises = [noise - sum(each.noise for each in block) for block in blocks]
    signals = [signal - sum(each.signal for each in block) for block in blocks]
    ratios = zip(noises, signals, strict=True)
    logs = [math.log(one / other) if min(one, other) > 0 else math.nan for one, other in ratios]
    error = _jackknife(logs)
    b_simple = noise / signal
    # A gradient that cannot be told from zero has no upper end to its noise scale.
    is_told = signal > _SIGMAS * _jackknife(signals) and math.isfinite(error)
    return NoiseScale(
        b_simple=b_simple,
        low=b_simple * math.exp(-_SIGMAS * error) if math.isfinite(error) else 0.0,
        high=b_simple * math.exp(_SIGMAS * error) if is_told else math.inf,
        noise=noise / len(usable),
        signal=signal / len(usable),
        measurements=len(usable),
    )


def _jackknife(values: Sequence[float]) -> float:
    """Return the standard error from what was found with one block left out at a time."""
    count = len(values)
    if count < 2:
        return math.inf
    mean = sum(values) / count
    return math.sqrt((count - 1) / count * sum((value - mean) ** 2 for value in values))


class RunningNoise:
    """The noise scale as it goes, from measurements that come one by one.

    Args:
        memory: Of so many measurements, exponentially.
    """

    def __init__(self, memory: float = 50.0) -> None:
        self._decay = 1 - 1 / memory
        self._noise = self._signal = 0.0

    def add(self, measurement: Measurement) -> float | None:
        """Take the next; return B_simple, None while it cannot be told."""
        if not (math.isfinite(measurement.small) and math.isfinite(measurement.big)):
            return None
        # Both averages begin at zero alike, which their ratio does not notice.
        self._noise = self._decay * self._noise + measurement.noise
        self._signal = self._decay * self._signal + measurement.signal
        if self._noise <= 0 or self._signal <= 0:
            return None
        return self._noise / self._signal


def steps_ratio(batch_size: float, other: float, critical: float) -> float:
    """Return the steps that a batch of `other` takes, over those that `batch_size` takes.

    S = S_min (1 + B_crit / B), their equation 2.12; B_simple stands for B_crit.
    """
    return (1 + critical / other) / (1 + critical / batch_size)


def items_ratio(batch_size: float, other: float, critical: float) -> float:
    """Return the items that a batch of `other` takes in all, over those that `batch_size` takes.

    E = E_min (1 + B / B_crit), the other half of the same trade-off.
    """
    return (1 + other / critical) / (1 + batch_size / critical)


def scaled_lr(lr: float, batch_size: float, other: float, noise_scale: float) -> float:
    """Return the learning rate for a batch of `other`, given what is right for `batch_size`.

    eps_opt(B) = eps_max / (1 + B_noise / B), their equation 2.10: linear far below the noise scale,
    level far above it.
    """
    return lr * (1 + noise_scale / batch_size) / (1 + noise_scale / other)


def fit_steps(batch_sizes: Sequence[float], steps: Sequence[float]) -> tuple[float, float]:
    """Return (S_min, B_crit) of the hyperbola S = S_min (1 + B_crit / B) through what was measured.

    Least squares of the logarithm of the steps, so that each batch counts the same; found by
    ternary search over the logarithm of B_crit (S is their equation 2.12).

    Args:
        batch_sizes: Global batches, two different ones at least.
        steps: That each took to one and the same loss.
    """

    def smallest(critical: float) -> float:
        ratios = [math.log(s / (1 + critical / b)) for b, s in zip(batch_sizes, steps, strict=True)]
        return math.exp(sum(ratios) / len(ratios))

    def error(log_critical: float) -> float:
        critical = math.exp(log_critical)
        least = smallest(critical)
        return sum(
            math.log(s / least / (1 + critical / b)) ** 2
            for b, s in zip(batch_sizes, steps, strict=True)
        )

    low, high = math.log(min(batch_sizes) / 1e3), math.log(max(batch_sizes) * 1e3)
    while high - low > 1e-6:
        third = (high - low) / 3
        if error(low + third) < error(high - third):
            high -= third
        else:
            low += third
    critical = math.exp(low)
    return smallest(critical), critical
