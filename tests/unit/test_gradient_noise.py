"""The noise scale recovered where it is known, and what it says of batches."""

from __future__ import annotations

import math
import random

import pytest

from launcher.analysis.gradient_noise import (
    Measurement,
    RunningNoise,
    estimate,
    fit_steps,
    items_ratio,
    scaled_lr,
    steps_ratio,
)

DIMENSIONS, SPREAD, MEAN = 40, 2.0, 0.1
TRUE = DIMENSIONS * SPREAD**2 / (DIMENSIONS * MEAN**2)
"""tr(S) / |G|^2 of gradients drawn by `measure`."""


def measure(
    count: int, small: int, big: int, *, seed: int = 0, mean: float = MEAN
) -> list[Measurement]:
    """Return measurements of gradients that are normal in each dimension, as their means are."""
    drawn = random.Random(seed)
    parts = big // small
    found = []
    for step in range(count):
        means = [
            [drawn.gauss(mean, SPREAD / math.sqrt(small)) for _ in range(DIMENSIONS)]
            for _ in range(parts)
        ]
        whole = [sum(column) / parts for column in zip(*means, strict=True)]
        found.append(
            Measurement(
                step=step,
                small=sum(sum(value**2 for value in each) for each in means) / parts,
                small_inverse=1 / small,
                big=sum(value**2 for value in whole),
                big_items=big,
            )
        )
    return found


def test_the_true_noise_scale_is_recovered() -> None:
    """Within 10 %, and the interval has it."""
    found = estimate(measure(2000, small=64, big=256))
    assert found is not None
    assert found.b_simple == pytest.approx(TRUE, rel=0.1)
    assert found.low < TRUE < found.high
    assert found.high / found.low < 1.5


def test_the_interval_is_honest() -> None:
    """Of 40 estimates from few measurements most intervals have the truth."""
    inside = 0
    for seed in range(40):
        found = estimate(measure(100, small=64, big=256, seed=seed))
        assert found is not None
        inside += found.low < TRUE < found.high
    assert inside >= 34


def test_a_gradient_of_noise_alone_says_nothing() -> None:
    """Where there is no gradient the scale is not told, or its upper end is open."""
    open_ended = 0
    for seed in range(40):
        found = estimate(measure(60, small=2, big=8, mean=0.0, seed=seed))
        open_ended += found is None or math.isinf(found.high)
    assert open_ended >= 37


def test_few_and_broken_measurements_are_not_enough() -> None:
    """It takes 20, of which a loss that was not finite is none."""
    measurements = measure(20, small=64, big=256)
    assert estimate(measurements[:19]) is None
    broken = Measurement(step=0, small=math.nan, small_inverse=1 / 64, big=1.0, big_items=256)
    assert estimate([*measurements[:19], broken]) is None
    assert estimate([*measurements, broken]) == estimate(measurements)


def test_it_can_be_followed() -> None:
    """The running value settles where the estimate is, and forgets what was before."""
    running = RunningNoise(memory=200)
    for measurement in measure(1000, small=64, big=256, mean=1.0):
        running.add(measurement)
    for measurement in measure(3000, small=64, big=256):
        value = running.add(measurement)
    assert value == pytest.approx(TRUE, rel=0.3)


def test_steps_against_items() -> None:
    """At the critical batch both are twice their least; doubling far below it halves the steps."""
    assert steps_ratio(400, 4e9, 400) == pytest.approx(0.5)
    assert items_ratio(400, 4e-9, 400) == pytest.approx(0.5)
    assert steps_ratio(1, 2, 1e9) == pytest.approx(0.5)
    assert items_ratio(1, 2, 1e9) == pytest.approx(1.0)
    assert steps_ratio(64, 512, 398) == pytest.approx(1 / 4.06, rel=0.01)


def test_the_learning_rate_that_the_noise_allows() -> None:
    """Linear far below the noise scale, level far above it."""
    assert scaled_lr(0.1, 1, 2, 1e9) == pytest.approx(0.2)
    assert scaled_lr(0.1, 1e9, 2e9, 1.0) == pytest.approx(0.1)


@pytest.mark.parametrize("critical", [20.0, 400.0, 30_000.0])
def test_the_hyperbola_is_fitted(critical: float) -> None:
    """Steps that lie on it give back what they were made of; scattered ones come near."""
    batches = [64.0, 128.0, 256.0, 512.0, 1024.0]
    exact = [300 * (1 + critical / batch) for batch in batches]
    assert fit_steps(batches, exact) == pytest.approx((300, critical), rel=1e-3)
    scattered = [
        steps * wrong for steps, wrong in zip(exact, (1.02, 0.98, 1, 1.02, 0.98), strict=True)
    ]
    _, found = fit_steps(batches, scattered)
    assert 0.4 < found / critical < 2.5
