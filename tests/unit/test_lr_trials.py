"""The search for a learning rate by short trainings, on losses that are known functions of it."""

from __future__ import annotations

import math

import pytest

from launcher.analysis.lr_curve import LossCurve
from launcher.analysis.lr_trials import (
    LRTrial,
    best_trial,
    final_loss,
    fitted_lr,
    for_length,
    next_lr,
)


def search(optimum: float, first: float, *, breaks_at: float = math.inf) -> list[LRTrial]:
    """Return the trials of a loss whose logarithm is a parabola, and which diverges from an lr on.

    Learning rates do not repeat.
    """
    trials: list[LRTrial] = []
    while (lr := next_lr(trials, first)) is not None:
        assert all(abs(lr / trial.lr - 1) > 0.1 for trial in trials)
        loss = math.exp(0.1 * math.log(lr / optimum) ** 2)
        trials.append(LRTrial(lr=lr, loss=loss if lr < breaks_at else None))
    return trials


@pytest.mark.parametrize("optimum", [1e-5, 0.003, 0.01, 0.5, 30.0])
def test_the_search_brackets_the_optimum(optimum: float) -> None:
    """From any start the search ends with both neighbours of the best, and the fit is close."""
    trials = search(optimum, 0.01)
    best = best_trial(trials)
    assert best is not None
    lrs = sorted(trial.lr for trial in trials)
    assert lrs[0] < best.lr < lrs[-1]
    found = fitted_lr(trials)
    assert found is not None
    assert optimum * 0.999 < found < optimum * 2 ** (1 / 3)


def test_a_search_with_far_to_go_takes_larger_steps() -> None:
    """From a start 30 octaves away the search takes at most 22 trials and ends at the optimum."""
    for optimum in (2.0**30, 2.0**-30):
        trials = search(optimum, 1.0)
        assert len(trials) <= 22
        assert fitted_lr(trials) == pytest.approx(optimum)


@pytest.mark.parametrize("power", [0.0, 0.2, 0.45])
def test_the_fit_is_exact_above_the_best_trial(power: float) -> None:
    """Up to half a factor above a trial, the lowest point of a parabola is found."""
    optimum = 0.01 * 2**power
    assert fitted_lr(search(optimum, 0.01)) == pytest.approx(optimum)


@pytest.mark.parametrize("optimum", [0.008, 0.01, 0.013])
def test_a_training_that_breaks_pulls_the_fit_down_by_a_sixth_of_a_factor(optimum: float) -> None:
    """Below a divergence the learning rate found is a sixth of a factor below the best trial."""
    trials = search(optimum, 0.01, breaks_at=0.02)
    assert fitted_lr(trials) == pytest.approx(0.01 * 2 ** (-1 / 6))


def test_a_loss_of_zero_or_less_is_fitted_without_logarithms() -> None:
    """Negative losses, such as log densities, have the lowest point of a parabola of their own."""
    trials = [LRTrial(lr=lr, loss=(math.log(lr) + 1) ** 2 - 9) for lr in (0.2, 0.4, 0.8)]
    assert fitted_lr(trials) == pytest.approx(math.exp(-1))


def test_the_search_gives_up_after_eight_divergences() -> None:
    """If every trial diverges, the search tries seven lower learning rates and finds none."""
    trials = search(1.0, 1.0, breaks_at=0.0)
    assert [trial.lr for trial in trials] == pytest.approx([2.0**-power for power in range(8)])
    assert best_trial(trials) is None
    assert fitted_lr(trials) is None


def curve(*losses: float, held_out: float | None = None) -> LossCurve:
    """Return the curve of a training at one learning rate."""
    return LossCurve(lrs=(0.1,) * len(losses), losses=losses, held_out=held_out)


def test_the_final_loss_is_held_out_or_the_mean_of_the_last_fifth() -> None:
    """The held-out loss counts; without one it is the mean training loss of the last fifth."""
    losses = [float(20 - step) for step in range(20)]
    assert final_loss(curve(*losses), 20) == pytest.approx(2.5)
    assert final_loss(curve(*losses, held_out=7.0), 20) == 7.0


def test_a_training_that_diverged_has_no_final_loss() -> None:
    """A training that stopped early, has a NaN loss or explodes has no final loss."""
    losses = [float(20 - step) for step in range(20)]
    assert final_loss(curve(*losses[:-1], held_out=7.0), 20) is None
    assert final_loss(curve(*losses[:-1], math.nan, held_out=7.0), 20) is None
    assert final_loss(curve(*losses[:-1], 1e6, held_out=7.0), 20) is None


@pytest.mark.parametrize(
    ("whole_steps", "ratio"), [(50, 1), (300, 1), (1200, 0.5), (3200, 0.306), (10**9, 0.306)]
)
def test_the_lr_falls_with_the_square_root_of_the_length(whole_steps: int, ratio: float) -> None:
    """It is kept up to 1.5 times the length of the trials, and falls up to 16 times theirs."""
    assert for_length(0.1, 200, whole_steps) == pytest.approx(0.1 * ratio, rel=1e-3)
