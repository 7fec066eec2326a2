"""Where the loss of a learning-rate range test is lowest, on synthetic loss curves."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest

from launcher.analysis.lr_curve import (
    Divergence,
    LossCurve,
    lowest_lr,
    lr_at_reference,
    smooth,
    usable_part,
)

LRS = tuple(10 ** (-6 + 7 * step / 199) for step in range(200))


def make_curve(loss: Callable[[float], float], *, noise: float = 0.0, seed: int = 0) -> LossCurve:
    """Return the curve of a function of the learning rate, with Gaussian noise."""
    generator = random.Random(seed)
    losses = tuple(loss(lr) + generator.gauss(0.0, noise) for lr in LRS)
    return LossCurve(lrs=LRS, losses=losses)


def textbook_loss(lr: float) -> float:
    """Return a loss that is level at 2.3, falls to 0.4 around 1e-2, and rises from 0.3 on."""
    return 0.4 + 1.9 / (1 + math.pow(lr / 1e-2, 1.5)) + math.pow(lr / 0.5, 3)


@pytest.mark.parametrize("noise", [0.0, 0.05, 0.15])
def test_the_lowest_loss_of_a_textbook_curve_is_found(noise: float) -> None:
    """The learning rate is near the minimum at 0.1 and below the rise at 0.3, despite noise."""
    lr, reason = lowest_lr(make_curve(textbook_loss, noise=noise))
    assert reason == ""
    assert lr is not None
    assert 0.05 < lr < 0.3


def test_smoothing_has_no_lag() -> None:
    """Smoothing keeps the position of a step and the value of a constant."""
    smoothed = smooth([1.0] * 100 + [0.0] * 100)
    middle = min(range(200), key=lambda index: abs(smoothed[index] - 0.5))
    assert 98 <= middle <= 101
    assert smooth([3.0] * 5) == pytest.approx([3.0] * 5)


@pytest.mark.parametrize(
    ("curve", "reason"),
    [
        (make_curve(lambda _: 2.3), "does not fall"),
        (make_curve(lambda _: 2.3, noise=0.02), "does not fall"),
        (make_curve(lambda lr: 2.3 + 1000 * lr), "does not fall"),
        (LossCurve(lrs=LRS, losses=(math.nan, *(1.0,) * 199)), "after 0 steps"),
        (LossCurve(lrs=LRS[:5], losses=(2.0, 1.9, 1.8, math.inf, 1.0)), "after 3 steps"),
        (LossCurve(lrs=(), losses=()), "after 0 steps"),
    ],
    ids=["flat", "noisy", "diverging", "nan-first", "inf", "empty"],
)
def test_a_curve_without_a_descent_suggests_nothing(curve: LossCurve, reason: str) -> None:
    """A curve without a descent has no learning rate and states the reason."""
    lr, found = lowest_lr(curve)
    assert lr is None
    assert reason in found


def test_losses_after_training_breaks_do_not_count() -> None:
    """Losses that are NaN or far above the start do not change the learning rate."""
    complete, _ = lowest_lr(make_curve(textbook_loss))
    exploding = make_curve(lambda lr: textbook_loss(lr) if lr < 1 else math.nan)
    assert lowest_lr(exploding)[0] == complete
    lrs, losses = usable_part(make_curve(textbook_loss))
    assert max(losses) < 2.5
    assert lrs[-1] < 1


@pytest.mark.parametrize("seed", range(10))
def test_noise_is_not_taken_for_a_fall(seed: int) -> None:
    """Losses that differ by a half from batch to batch do not cut the curve before its descent."""
    generator = random.Random(seed)
    losses = tuple(generator.uniform(0.5, 1.5) * textbook_loss(lr) for lr in LRS)
    lr, reason = lowest_lr(LossCurve(lrs=LRS, losses=losses))
    assert lr is not None, reason
    assert 0.02 < lr < 0.5


def test_recovery_from_a_spike_is_not_a_descent() -> None:
    """The fall after a spike of the loss is cut off, however low it gets."""
    losses = [textbook_loss(lr) if lr < 0.3 else 0.1 for lr in LRS]
    first = next(index for index, lr in enumerate(LRS) if lr >= 0.3)
    losses[first : first + 3] = [9.0, 20.0, 6.0]
    curve = LossCurve(lrs=LRS, losses=tuple(losses))
    lr, _ = lowest_lr(curve)
    assert lr is not None
    assert lr < 0.3
    assert usable_part(curve)[0][-1] < 0.3


def test_divergence_is_detected_online() -> None:
    """A loss diverges if it is not finite or if its average exceeds four times the minimum."""
    assert Divergence().add(math.nan)
    detector = Divergence()
    assert not any(detector.add(2.0) for _ in range(50))
    decisions = [detector.add(50.0) for _ in range(50)]
    assert decisions.index(True) in range(3, 20)
    quiet = Divergence()
    assert not any(quiet.add(textbook_loss(lr)) for lr in LRS if lr < 0.3)


@pytest.mark.parametrize(("rule", "lr"), [("linear", 0.1), ("sqrt", 0.4 / 2), ("none", 0.4)])
def test_an_lr_is_scaled_back_to_the_reference_batch(rule: str, lr: float) -> None:
    """A learning rate measured at a batch of 512 is scaled back by the rule to one of 128."""
    assert lr_at_reference(0.4, 512, 128, rule) == pytest.approx(lr)
