"""The search for a learning rate by short trainings, and the result of `launcher find lr`.

A range test spends a step or two at each learning rate. Its curve shows where training breaks, and
not which learning rate is best for a whole training: rules that read slopes of that curve are often
off by a factor of ten. Short trainings through the whole schedule measure it. All of them take the
same samples in the same order from the same weights, so that their losses compare well, and the
logarithm of the loss is close to a parabola around its minimum. The loss that counts is held out:
on small data sets the training loss prefers learning rates that are too low.

The best learning rate falls with the length of a training. `for_length` applies the power of -1/2
of stochastic gradient descent (Nemirovski et al., doi:10.1137/070704277); for language models under
Adam, Bjorck et al. measure powers around -1/3 (arXiv:2409.19913).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from launcher.analysis.lr_curve import Divergence, LossCurve

DEFAULT_STEPS = 200
"""Optimizer steps of a range test, and of a short training."""

TRIAL_FACTOR = 2.0
"""Ratio between neighbouring learning rates of short trainings."""

_SAME_LENGTH = 1.5
"""Trainings that are at most this many times as long as a short one have its best learning rate."""

_LONGEST = 16.0
"""Most times as long as a short training for which the learning rate is lowered further: no longer
trainings were measured."""

_LENGTH_POWER = -0.5
"""Power of the length of a training in its best learning rate."""

FINAL_SHARE = 0.2
"""Part of the steps of a short training, at its end, whose mean loss counts."""

_MAX_RISE_RATIO = 2.0
"""Most that the loss may rise above the best learning rate for the fit, relative to its rise below.

Above, training may break, and the parabola would follow that. So the fit is at most a sixth of a
factor below the best trial.
"""

_MAX_DIVERGED_TRIALS = 8
"""Trials in a row that may diverge, each at a lower learning rate, before the search gives up."""

_FAR = 5
"""Trials after which the best learning rate is far if it is still the last of those tried."""

_STRIDE = 3
"""Factors between the trials of a search that has far to go."""

RIGHT_PERCENT: Mapping[str, int] = {"trainings": 83, "lowest": 46}
"""How often each rule is within a factor of 2 of the best learning rate, in percent.

`benchmarks/lr_finder.py` measures it with `DEFAULT_STEPS`, on recipes that were not used to choose
the rules.
"""


@dataclass(frozen=True, kw_only=True)
class Suggestions:
    """Learning rates by rule; None where a rule suggests none."""

    trainings: float | None = None
    """The learning rate where the final losses of short trainings are lowest, lowered for the
    length of the recipe."""

    lowest: float | None = None
    """The learning rate where the smoothed loss of the range test is lowest."""

    reason: str = ""
    """Why the range test suggests no learning rate; empty if it does."""


@dataclass(frozen=True, kw_only=True)
class LRTrial:
    """The outcome of a short training at one learning rate."""

    lr: float
    """Peak learning rate of the training."""

    loss: float | None
    """Held-out loss at the end of the training, or training loss without evaluation data; None if
    it diverged."""


@dataclass(frozen=True, kw_only=True)
class LRSearchResult:
    """The result of a search for a learning rate."""

    curve: LossCurve
    """The losses of the range test over the learning rate."""

    suggestions: Suggestions
    """The suggested learning rates, at the global batch of the test."""

    trials: tuple[LRTrial, ...] = ()
    """Short trainings around the lowest loss, in the order in which they ran; may be empty."""

    trial_steps: int = 0
    """Optimizer steps of a short training; 0 without any."""

    whole_steps: int = 0
    """Optimizer steps of the recipe; 0 without short trainings."""


def next_lr(
    trials: Sequence[LRTrial], first: float, *, factor: float = TRIAL_FACTOR
) -> float | None:
    """Return the learning rate to try next, or None once both neighbours of the best are tried.

    The search multiplies the learning rate by the factor while the final loss improves, and
    otherwise divides it. Where it has far to go, it takes three factors at a time and fills the
    gap around the best in the end. It needs only a starting point. After eight trials that all
    diverge, the search gives up.

    Args:
        trials: Outcomes of the trials so far.
        first: Learning rate of the first trial.
        factor: Ratio between neighbouring learning rates.
    """
    if not trials:
        return first
    tried_exponents = {_exponent(trial, first, factor) for trial in trials}
    best = best_trial(trials)
    if best is None:
        if len(trials) == _MAX_DIVERGED_TRIALS:
            return None
        return first * factor ** (min(tried_exponents) - 1)
    best_exponent = _exponent(best, first, factor)
    steps = [1, -1]
    if len(trials) >= _FAR and best_exponent == min(tried_exponents):
        steps = [-_STRIDE]
    elif len(trials) >= _FAR and best_exponent == max(tried_exponents):
        steps = [_STRIDE]
    for step in steps:
        if best_exponent + step not in tried_exponents:
            return float(first * factor ** (best_exponent + step))
    return None


def training_name(lr: float) -> str:
    """Return the name of the folder of a short training."""
    return f"lr-{lr:.3g}"


def _exponent(trial: LRTrial, first: float, factor: float) -> int:
    """Return how many factors a trial is above the first learning rate."""
    return round(math.log(trial.lr / first, factor))


def best_trial(trials: Sequence[LRTrial]) -> LRTrial | None:
    """Return the trial with the lowest final loss, or None if all diverged."""
    completed = [trial for trial in trials if trial.loss is not None]
    return min(completed, key=lambda trial: trial.loss or 0.0, default=None)


def fitted_lr(trials: Sequence[LRTrial], *, factor: float = TRIAL_FACTOR) -> float | None:
    """Return the learning rate with the lowest final loss, between those that were tried.

    It is the lowest point of a parabola through the best trial and its neighbours, over the
    logarithm of the learning rate, and from a sixth of a factor below the best trial to half above.

    Args:
        trials: Outcomes of the trials, which `next_lr` has chosen.
        factor: Ratio between neighbouring learning rates.

    Returns:
        The learning rate; None if every trial diverged.
    """
    best = best_trial(trials)
    if best is None or best.loss is None:
        return None
    losses = {_exponent(trial, best.lr, factor): trial.loss for trial in trials}
    left, right = losses.get(-1), losses.get(1)
    if left is None or 1 not in losses:
        return best.lr
    return float(best.lr * factor ** _lowest_point(left, best.loss, right))


def for_length(lr: float, steps: int, whole_steps: int) -> float:
    """Return the learning rate for a training, given the best one of shorter trainings.

    It is the same up to 1.5 times their length. Beyond, it falls with the square root of the
    length, up to 16 times theirs.

    Args:
        lr: The best learning rate of trainings of `steps` steps.
        steps: Optimizer steps of each of them.
        whole_steps: Optimizer steps of the training.
    """
    ratio = min(whole_steps / steps, _LONGEST) / _SAME_LENGTH
    return float(lr * max(ratio, 1.0) ** _LENGTH_POWER)


def _lowest_point(left: float, middle: float, right: float | None) -> float:
    """Return where a parabola through losses at -1, 0 and 1 is lowest, from -1/6 to 1/2.

    The parabola is one of the logarithms, unless a loss is negative or 0. The middle loss is the
    smallest, and None is a loss of a training that diverged.
    """
    losses = [left, middle, math.inf if right is None else right]
    if middle > 0:
        losses = [math.log(loss) for loss in losses]
    before, after = losses[0] - losses[1], losses[2] - losses[1]
    after = min(after, _MAX_RISE_RATIO * before)
    return (before - after) / (2 * (before + after)) if before + after > 0 else 0.0


def final_loss(curve: LossCurve, steps: int) -> float | None:
    """Return the held-out loss at the end of a training, or None if it diverged.

    Without evaluation data it is the mean training loss over the last fifth of the steps.

    Args:
        curve: Losses of the completed steps, fewer than `steps` if the training was stopped.
        steps: Planned number of steps.
    """
    divergence = Divergence()
    if len(curve.losses) < steps or any(map(divergence.add, curve.losses)):
        return None
    if curve.held_out is not None:
        return curve.held_out
    last = curve.losses[-max(round(FINAL_SHARE * steps), 1) :]
    return sum(last) / len(last)
