"""The gradient noise scale: how large a global batch can grow before it wastes samples.

McCandlish, Kaplan, Amodei et al., "An Empirical Model of Large-Batch Training" (arXiv:1812.06162).
The squared norm of a gradient averaged over b items is, in expectation, |G|^2 + tr(S) / b, where G
is the true gradient and S the covariance of the gradient of one item. Norms at two batch sizes give
both terms, and B_simple = tr(S) / |G|^2 (their appendix A.1). Each term is averaged over steps
before the division, because the mean of the ratios is strongly biased.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

_NUM_BLOCKS = 20
"""Blocks of the jackknife: neighbouring steps are correlated, so whole blocks are dropped."""

_MIN_MEASUREMENTS = 20
_NUM_SIGMAS = 2.0
"""Half width of the confidence interval in standard errors, which covers about 95 %."""

MAX_BATCH_RATIO = 2.0
"""Largest recommended batch over B_crit: doubling the batch beyond it saves at most a sixth of
the steps and costs at least two thirds more samples."""


_MOST_MOMENTUM = 0.9
"""Momentum beyond which the critical batch does not grow further."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Squared norms of the mean gradients over parts of one batch and over all of it."""

    step: int
    """The optimizer step, counted from 1."""

    small: float
    """Mean over the parts of |g_part|^2."""

    small_inverse: float
    """Mean over the parts of 1 / (items in the part)."""

    big: float
    """|g|^2 of the whole batch."""

    big_items: float
    """Number of items in the whole batch."""

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
    """An estimate of the gradient noise scale over some steps, with its uncertainty."""

    b_simple: float
    """tr(S) / |G|^2, in items."""

    low: float
    """Lower end of the 95 % confidence interval of `b_simple`."""

    high: float
    """Upper end of that interval; infinite if |G|^2 cannot be distinguished from zero."""

    noise: float
    """tr(S), averaged over the steps."""

    signal: float
    """|G|^2, averaged over the steps."""

    measurements: int
    """Number of finite measurements used."""


def estimate_noise_scale(measurements: Sequence[Measurement]) -> NoiseScale | None:
    """Return the noise scale over some steps, or None if they do not determine it.

    They do not if fewer than 20 of them are finite, or if the estimate of tr(S) or |G|^2 is not
    positive. The interval is that of a block jackknife on the logarithm of the ratio.
    """
    finite = [
        measurement
        for measurement in measurements
        if math.isfinite(measurement.small) and math.isfinite(measurement.big)
    ]
    if len(finite) < _MIN_MEASUREMENTS:
        return None
    noise = sum(measurement.noise for measurement in finite)
    signal = sum(measurement.signal for measurement in finite)
    if noise <= 0 or signal <= 0:
        return None
    block_size = math.ceil(len(finite) / _NUM_BLOCKS)
    blocks = [finite[start : start + block_size] for start in range(0, len(finite), block_size)]
    noises = [noise - sum(measurement.noise for measurement in block) for block in blocks]
    signals = [signal - sum(measurement.signal for measurement in block) for block in blocks]
    log_ratios = [
        math.log(block_noise / block_signal) if min(block_noise, block_signal) > 0 else math.nan
        for block_noise, block_signal in zip(noises, signals, strict=True)
    ]
    error = _jackknife_error(log_ratios)
    b_simple = noise / signal
    is_bounded = signal > _NUM_SIGMAS * _jackknife_error(signals) and math.isfinite(error)
    return NoiseScale(
        b_simple=b_simple,
        low=b_simple * math.exp(-_NUM_SIGMAS * error) if math.isfinite(error) else 0.0,
        high=b_simple * math.exp(_NUM_SIGMAS * error) if is_bounded else math.inf,
        noise=noise / len(finite),
        signal=signal / len(finite),
        measurements=len(finite),
    )


def _jackknife_error(values: Sequence[float]) -> float:
    """Return the standard error of an estimate, given its values with one block left out each."""
    count = len(values)
    if count < 2:
        return math.inf
    mean = sum(values) / count
    return math.sqrt((count - 1) / count * sum((value - mean) ** 2 for value in values))


def critical_batch(b_simple: float, momentum: float) -> float:
    """Return B_crit, at which a batch takes twice the steps and twice the samples of the least.

    B_simple estimates it for steps along the gradient. Momentum leaves the progress of small
    batches as it is and speeds up large ones, whose noise does not limit them (Zhang et al.,
    arXiv:1907.04164). The factor 1 / sqrt(1 - momentum) is empirical: of those tried it is closest
    to the steps that `benchmarks/batch_forecast.py` measures, where more momentum than 0.9 does not
    help further.

    Args:
        b_simple: The noise scale, in any unit.
        momentum: Momentum of the optimizer, or the first beta of Adam; 0 without any.

    Returns:
        B_crit in the unit of `b_simple`.
    """
    return b_simple / math.sqrt(1 - min(momentum, _MOST_MOMENTUM))


class RunningNoise:
    """The noise scale of a run in progress, from an exponential moving average of measurements.

    Args:
        memory: Time constant of the average, in measurements.
    """

    def __init__(self, memory: float = 50.0) -> None:
        self._decay = 1 - 1 / memory
        self._noise = self._signal = 0.0

    def add(self, measurement: Measurement) -> float | None:
        """Add a measurement and return B_simple in items, or None while it is undetermined.

        A measurement that is not finite is ignored and returns None.
        """
        if not (math.isfinite(measurement.small) and math.isfinite(measurement.big)):
            return None
        # Both averages start at zero, so their bias cancels in the ratio.
        self._noise = self._decay * self._noise + measurement.noise
        self._signal = self._decay * self._signal + measurement.signal
        if self._noise <= 0 or self._signal <= 0:
            return None
        return self._noise / self._signal


def steps_ratio(batch_size: float, other: float, critical: float) -> float:
    """Return the steps to a loss with the batch `other`, over those with `batch_size`.

    S = S_min (1 + B_crit / B) (McCandlish et al., section 2.3).

    Args:
        batch_size: The batch of the denominator.
        other: The batch of the numerator, in the same unit.
        critical: B_crit in that unit, from `critical_batch`.
    """
    return (1 + critical / other) / (1 + critical / batch_size)


def items_ratio(batch_size: float, other: float, critical: float) -> float:
    """Return the items to a loss with the batch `other`, over those with `batch_size`.

    E = E_min (1 + B / B_crit), the counterpart of the formula in `steps_ratio`.

    Args:
        batch_size: The batch of the denominator.
        other: The batch of the numerator, in the same unit.
        critical: B_crit in that unit, from `critical_batch`.
    """
    return (1 + other / critical) / (1 + batch_size / critical)


def scaled_lr(lr: float, batch_size: float, other: float, noise_scale: float) -> float:
    """Return the learning rate for the batch `other`, given the best one for `batch_size`.

    eps_opt(B) = eps_max / (1 + B_noise / B) (McCandlish et al., section 2.2). It is linear far
    below the noise scale and constant far above it.

    Args:
        lr: The best learning rate at `batch_size`.
        batch_size: The batch of that learning rate.
        other: The batch to scale to, in the same unit.
        noise_scale: B_noise in that unit.
    """
    return lr * (1 + noise_scale / batch_size) / (1 + noise_scale / other)


def fit_steps(batch_sizes: Sequence[float], steps: Sequence[float]) -> tuple[float, float]:
    """Return (S_min, B_crit) of the hyperbola S = S_min (1 + B_crit / B) that fits best.

    The fit minimises the squared error of log S, so that every batch has the same weight. It uses
    ternary search over log B_crit. The hyperbola is that of McCandlish et al., section 2.3.

    Args:
        batch_sizes: Global batches, at least two different ones.
        steps: Steps that each batch took to one and the same loss.
    """

    def best_minimum(critical: float) -> float:
        logs = [math.log(s / (1 + critical / b)) for b, s in zip(batch_sizes, steps, strict=True)]
        return math.exp(sum(logs) / len(logs))

    def squared_error(log_critical: float) -> float:
        critical = math.exp(log_critical)
        minimum = best_minimum(critical)
        return sum(
            math.log(s / minimum / (1 + critical / b)) ** 2
            for b, s in zip(batch_sizes, steps, strict=True)
        )

    low, high = math.log(min(batch_sizes) / 1e3), math.log(max(batch_sizes) * 1e3)
    while high - low > 1e-6:
        third = (high - low) / 3
        if squared_error(low + third) < squared_error(high - third):
            high -= third
        else:
            low += third
    critical = math.exp(low)
    return best_minimum(critical), critical
