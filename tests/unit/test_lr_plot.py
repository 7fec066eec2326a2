"""The plot and the text of a search for a learning rate."""

from __future__ import annotations

from dataclasses import replace

import pytest
from small_runs import recipe

from launcher import make_plan, read_machine
from launcher.analysis.lr_curve import LossCurve
from launcher.analysis.lr_trials import DEFAULT_STEPS, RIGHT_PERCENT, LRTrial
from launcher.tuning.lr_search import read_range_test, with_trials
from launcher.tuning.summaries import lr_confidence, lr_plot, lr_suggestions_text

LRS = tuple(10 ** (-4 + 5 * step / 99) for step in range(100))
PLAN = replace(make_plan(recipe(), read_machine(), nproc_per_node=1), total_steps=100)


def fall(lr: float) -> float:
    """Return a loss that falls from 2 to 1 around 0.01."""
    return 1 + 1 / (1 + lr / 0.01)


def test_the_plot_shows_the_divergence() -> None:
    """Steps after the loss breaks are a curve of their own, which rises to the top of the plot."""
    losses = tuple(fall(lr) if lr < 1 else 1e9 * lr for lr in LRS)
    result = read_range_test(LossCurve(lrs=LRS, losses=losses))
    usable, diverged = lr_plot(result, PLAN).curves
    assert usable.xs[-1] < 1 <= diverged.xs[1]
    assert diverged.xs[0] == usable.xs[-1]
    assert diverged.xs[-1] == LRS[-1]
    assert max(usable.ys) < max(diverged.ys) < 2 * max(usable.ys)
    assert f"{usable.xs[-1]:.3g}" in lr_suggestions_text(result, PLAN)


def test_a_test_that_stops_at_a_loss_that_is_not_finite_shows_its_divergence() -> None:
    """A curve that ends before the planned steps rises where it ends."""
    lrs = LRS[:80]
    result = read_range_test(LossCurve(lrs=lrs, losses=tuple(map(fall, lrs))))
    usable, diverged = lr_plot(result, PLAN).curves
    assert list(diverged.xs) == [lrs[-1], lrs[-1]]
    assert diverged.ys[0] == usable.ys[-1]
    assert diverged.ys[1] > max(usable.ys)


def test_a_test_that_does_not_diverge_has_one_curve() -> None:
    """Without a divergence the plot has no curve for it, and trainings add one of their losses."""
    result = read_range_test(LossCurve(lrs=LRS, losses=tuple(map(fall, LRS))))
    assert len(lr_plot(result, PLAN).curves) == 1
    trials = [
        LRTrial(lr=0.1, loss=1.1),
        LRTrial(lr=0.2, loss=1.0),
        LRTrial(lr=0.4, loss=None),
    ]
    plot = lr_plot(with_trials(result, trials, 200, 200), PLAN)
    assert list(plot.curves[1].xs) == [0.1, 0.2]
    assert {mark.name for mark in plot.marks} == {"trainings", "lowest"}


def test_the_text_says_how_the_lr_was_lowered_for_the_length() -> None:
    """For a recipe of 6 times the steps of its trainings the text has the factor 0.5."""
    result = read_range_test(LossCurve(lrs=LRS, losses=tuple(map(fall, LRS))))
    trials = [LRTrial(lr=lr, loss=loss) for lr, loss in ((0.1, 1.1), (0.2, 1.0), (0.4, 1.1))]
    for whole_steps, is_lowered in ((200, False), (1200, True)):
        found = with_trials(result, trials, 200, whole_steps)
        text = lr_suggestions_text(found, PLAN)
        assert ("1,200 steps" in text and "by 0.5." in text) is is_lowered


@pytest.mark.parametrize("rule", RIGHT_PERCENT)
def test_the_confidence_is_that_of_the_measured_steps(rule: str) -> None:
    """A search of the measured length states its percentage, and a shorter one states none."""
    assert f"{RIGHT_PERCENT[rule]} %" in lr_confidence(rule, DEFAULT_STEPS)
    assert "%" not in lr_confidence(rule, DEFAULT_STEPS - 1)
