"""What a range test's curve suggests, on curves made by hand."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest

from launcher.analysis.lr_curve import (
    Divergence,
    LossCurve,
    LRTrial,
    at_reference,
    best_trial,
    final_loss,
    next_lr,
    smooth,
    suggest,
    usable,
)

LRS = tuple(10 ** (-6 + 7 * step / 199) for step in range(200))


def curve(loss: Callable[[float], float], *, noise: float = 0.0, seed: int = 0) -> LossCurve:
    """Return a curve of the function `loss` of the learning rate, with noise."""
    drawn = random.Random(seed)
    losses = tuple(loss(lr) + drawn.gauss(0.0, noise) for lr in LRS)
    return LossCurve(lrs=LRS, losses=losses)


def textbook(lr: float) -> float:
    """Level at 2.3, down around 1e-2 to 0.4, up from 0.3 on."""
    return 0.4 + 1.9 / (1 + math.pow(lr / 1e-2, 1.5)) + math.pow(lr / 0.5, 3)


@pytest.mark.parametrize("noise", [0.0, 0.05, 0.15])
def test_a_textbook_curve(noise: float) -> None:
    """All rules agree on the order: steepest, then the valley, below where it breaks."""
    found = suggest(curve(textbook, noise=noise))
    assert found.valley is not None
    assert found.steep is not None
    assert found.minimum is not None
    assert 3e-3 < found.steep < 3e-2
    assert 3e-3 < found.valley < 1e-1
    assert 5e-3 < found.minimum < 3e-2
    assert found.slide is None or 1e-6 <= found.slide < 0.5


def test_the_slope_is_over_the_logarithm() -> None:
    """The steepest place of a sigmoid in log lr is its middle; over lr itself it would be 1e-6."""
    found = suggest(curve(lambda lr: 1 / (1 + (lr / 1e-3) ** 2)))
    assert found.steep == pytest.approx(1e-3, rel=0.1)


def test_smoothing_shifts_nothing() -> None:
    """A step stays where it is, and a constant is what it was from the first value on."""
    smoothed = smooth([1.0] * 100 + [0.0] * 100)
    middle = min(range(200), key=lambda index: abs(smoothed[index] - 0.5))
    assert 98 <= middle <= 101
    assert smooth([3.0] * 5) == pytest.approx([3.0] * 5)


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (curve(lambda _: 2.3), "does not fall"),
        (curve(lambda _: 2.3, noise=0.02), "does not fall"),
        (curve(lambda lr: 2.3 + 1000 * lr), "does not fall"),
        (LossCurve(lrs=LRS, losses=(math.nan, *(1.0,) * 199)), "not finite after 0 steps"),
        (LossCurve(lrs=LRS[:5], losses=(2.0, 1.9, 1.8, math.inf, 1.0)), "not finite after 3 steps"),
        (LossCurve(lrs=(), losses=()), "not finite after 0 steps"),
    ],
    ids=["flat", "noisy", "diverging", "nan-first", "inf", "empty"],
)
def test_nothing_is_suggested_by(made: LossCurve, reason: str) -> None:
    """A curve that says nothing suggests nothing, and says why."""
    found = suggest(made)
    assert (found.valley, found.steep, found.minimum, found.slide) == (None,) * 4
    assert reason in found.reason


def test_what_comes_after_the_break_does_not_count() -> None:
    """Losses after a NaN, and a long way up, change no suggestion."""
    whole = suggest(curve(textbook))
    exploding = curve(lambda lr: textbook(lr) if lr < 1 else math.nan)
    found = suggest(exploding)
    assert found.valley == pytest.approx(whole.valley, rel=0.3)
    assert found.minimum == whole.minimum
    lrs, losses = usable(curve(textbook))
    assert max(losses) < 2.5
    assert lrs[-1] < 1


def test_a_loss_that_breaks_and_recovers() -> None:
    """A spike and the way back down after it are no descent."""
    spiked = [textbook(lr) if lr < 0.3 else 2.0 for lr in LRS]
    first = next(index for index, lr in enumerate(LRS) if lr >= 0.3)
    spiked[first : first + 3] = [9.0, 20.0, 6.0]
    found = suggest(LossCurve(lrs=LRS, losses=tuple(spiked)))
    assert found.steep is not None
    assert found.steep < 3e-2
    assert usable(LossCurve(lrs=LRS, losses=tuple(spiked)))[0][-1] < 0.3


def test_divergence_is_seen_as_it_comes() -> None:
    """It is told at a loss that is not finite, and when the average is four times its best."""
    assert Divergence().add(math.nan)
    watch = Divergence()
    assert not any(watch.add(2.0) for _ in range(50))
    told = [watch.add(50.0) for _ in range(50)]
    assert told.index(True) in range(3, 20)
    calm = Divergence()
    assert not any(calm.add(textbook(lr)) for lr in LRS if lr < 0.3)


@pytest.mark.parametrize(("rule", "stated"), [("linear", 0.1), ("sqrt", 0.4 / 2), ("none", 0.4)])
def test_the_suggestion_is_stated_at_the_recipes_batch(rule: str, stated: float) -> None:
    """What was found at a batch of 512 is what a plan makes of the stated value at 128."""
    assert at_reference(0.4, 512, 128, rule) == pytest.approx(stated)


@pytest.mark.parametrize("best", [1e-5, 0.003, 0.01, 0.5, 30.0])
def test_the_search_ends_beside_the_best(best: float) -> None:
    """From anywhere it walks to the lowest loss, tries both neighbours, and nothing twice."""
    trials: list[LRTrial] = []
    while (lr := next_lr(trials, 0.01)) is not None:
        assert all(abs(lr / trial.lr - 1) > 0.1 for trial in trials)
        loss = abs(math.log(lr / best))
        trials.append(LRTrial(lr=lr, loss=loss if lr < 100 * best else None))
    found = best_trial(trials)
    assert found is not None
    assert abs(math.log(found.lr / best)) <= math.log(3) / 2 + 1e-9
    lrs = sorted(trial.lr for trial in trials)
    assert lrs[0] < found.lr < lrs[-1]


def test_the_search_gives_up_where_all_diverges() -> None:
    """It goes down from what diverged, a few times."""
    trials: list[LRTrial] = []
    while (lr := next_lr(trials, 1.0)) is not None:
        trials.append(LRTrial(lr=lr, loss=None))
    assert [trial.lr for trial in trials] == pytest.approx([1, 1 / 3, 1 / 9, 1 / 27])
    assert best_trial(trials) is None


def test_the_loss_at_the_end_is_that_of_the_last_tenth() -> None:
    """A training that ended early, or whose loss is not finite, has none."""
    losses = [float(20 - step) for step in range(20)]
    assert final_loss(losses, 20) == pytest.approx(1.5)
    assert final_loss(losses[:-1], 20) is None
    assert final_loss([*losses[:-1], math.nan], 20) is None
