"""The gradient noise scale of synthetic gradients, and the trade-off that follows from it."""

from __future__ import annotations

import math
import random

import pytest

from launcher.analysis.gradient_noise import (
    Measurement,
    RunningNoise,
    critical_batch,
    estimate_noise_scale,
    fit_steps,
    items_ratio,
    scaled_lr,
    steps_ratio,
)

DIMENSIONS, SPREAD, MEAN = 40, 2.0, 0.1
TRUE_SCALE = DIMENSIONS * SPREAD**2 / (DIMENSIONS * MEAN**2)
"""tr(S) / |G|^2 of the gradients that `measure` draws."""


def measure(
    count: int, small: int, big: int, *, seed: int = 0, mean: float = MEAN
) -> list[Measurement]:
    """Return measurements of gradients that are normally distributed in each dimension.

    Args:
        count: Number of measurements.
        small: Items in a part of a batch.
        big: Items in a batch.
        seed: Seed of the gradients.
        mean: Mean of a gradient in each dimension.
    """
    generator = random.Random(seed)
    num_parts = big // small
    measurements = []
    for step in range(count):
        parts = [
            [generator.gauss(mean, SPREAD / math.sqrt(small)) for _ in range(DIMENSIONS)]
            for _ in range(num_parts)
        ]
        batch = [sum(column) / num_parts for column in zip(*parts, strict=True)]
        measurements.append(
            Measurement(
                step=step,
                small=sum(sum(value**2 for value in part) for part in parts) / num_parts,
                small_inverse=1 / small,
                big=sum(value**2 for value in batch),
                big_items=big,
            )
        )
    return measurements


def test_the_true_noise_scale_is_recovered() -> None:
    """The estimate is within 10 % of the true value, which lies in a narrow interval."""
    scale = estimate_noise_scale(measure(2000, small=64, big=256))
    assert scale is not None
    assert scale.b_simple == pytest.approx(TRUE_SCALE, rel=0.1)
    assert scale.low < TRUE_SCALE < scale.high
    assert scale.high / scale.low < 1.5


def test_the_interval_covers_the_true_value() -> None:
    """At least 34 of 40 intervals from 100 measurements contain the true value."""
    covering = 0
    for seed in range(40):
        scale = estimate_noise_scale(measure(100, small=64, big=256, seed=seed))
        assert scale is not None
        covering += scale.low < TRUE_SCALE < scale.high
    assert covering >= 34


def test_pure_noise_has_no_finite_noise_scale() -> None:
    """If the true gradient is zero, the scale is undetermined or its interval is unbounded."""
    unbounded = 0
    for seed in range(40):
        scale = estimate_noise_scale(measure(60, small=2, big=8, mean=0.0, seed=seed))
        unbounded += scale is None or math.isinf(scale.high)
    assert unbounded >= 37


def test_an_estimate_needs_20_finite_measurements() -> None:
    """Measurements that are not finite do not count towards the 20 and change nothing."""
    measurements = measure(20, small=64, big=256)
    assert estimate_noise_scale(measurements[:19]) is None
    broken = Measurement(step=0, small=math.nan, small_inverse=1 / 64, big=1.0, big_items=256)
    assert estimate_noise_scale([*measurements[:19], broken]) is None
    assert estimate_noise_scale([*measurements, broken]) == estimate_noise_scale(measurements)


def test_the_running_noise_scale_forgets() -> None:
    """The running value approaches the present scale after the gradients have changed."""
    running = RunningNoise(memory=200)
    for measurement in measure(1000, small=64, big=256, mean=1.0):
        running.add(measurement)
    for measurement in measure(3000, small=64, big=256):
        scale = running.add(measurement)
    assert scale == pytest.approx(TRUE_SCALE, rel=0.3)


def test_momentum_raises_the_critical_batch() -> None:
    """Without momentum B_crit is B_simple; one of 0.9 or more raises it by the root of 10."""
    assert critical_batch(100.0, 0.0) == 100.0
    assert critical_batch(100.0, 0.9) == pytest.approx(316.23, rel=1e-4)
    assert critical_batch(100.0, 0.95) == critical_batch(100.0, 0.9)


def test_steps_and_items_trade_off() -> None:
    """Steps and items double at the critical batch; far below it doubling halves the steps."""
    assert steps_ratio(400, 4e9, 400) == pytest.approx(0.5)
    assert items_ratio(400, 4e-9, 400) == pytest.approx(0.5)
    assert steps_ratio(1, 2, 1e9) == pytest.approx(0.5)
    assert items_ratio(1, 2, 1e9) == pytest.approx(1.0)
    assert steps_ratio(64, 512, 398) == pytest.approx(1 / 4.06, rel=0.01)


def test_the_lr_saturates_at_the_noise_scale() -> None:
    """The learning rate is linear far below the noise scale and constant far above it."""
    assert scaled_lr(0.1, 1, 2, 1e9) == pytest.approx(0.2)
    assert scaled_lr(0.1, 1e9, 2e9, 1.0) == pytest.approx(0.1)


@pytest.mark.parametrize("critical", [20.0, 400.0, 30_000.0])
def test_the_hyperbola_is_fitted(critical: float) -> None:
    """A fit recovers the parameters of exact steps, and approximately those of scattered ones."""
    batch_sizes = [64.0, 128.0, 256.0, 512.0, 1024.0]
    exact = [300 * (1 + critical / batch_size) for batch_size in batch_sizes]
    assert fit_steps(batch_sizes, exact) == pytest.approx((300, critical), rel=1e-3)
    factors = (1.02, 0.98, 1, 1.02, 0.98)
    scattered = [steps * factor for steps, factor in zip(exact, factors, strict=True)]
    _, fitted = fit_steps(batch_sizes, scattered)
    assert 0.4 < fitted / critical < 2.5
