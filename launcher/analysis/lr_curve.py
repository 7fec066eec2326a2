"""The learning-rate range test: the learning rates that its loss curve suggests.

Smith, "Cyclical Learning Rates for Training Neural Networks" (arXiv:1506.01186): the learning rate
rises exponentially from step to step, and the loss shows where training is fast and where it
breaks. All rules here work on the loss over the logarithm of the learning rate.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from launcher.planning.stages import lr_factor

DIVERGENCE_RATIO = 4.0
"""The smoothed loss over its minimum at which the loss counts as diverged."""

_MAX_DIVERGED_TRIALS = 4
"""Trials in a row that may diverge, each at a lower learning rate, before the search gives up."""

_ONLINE_BETA = 0.98
"""Decay of the moving average that detects divergence during a range test."""

_OFFLINE_BETA = 0.9
"""Decay of the moving averages that smooth a complete curve, forwards and backwards."""

_MIN_POINTS = 10
_MIN_FALL = 0.05
"""Smallest relative fall of a loss that counts as a fall."""

_BROKEN_FALL = 0.2
"""Relative fall of a loss after which a rise above its start means that training broke."""

_EDGE = 0.05
"""Fraction of a descent's fall that `valley` ignores at each end."""

_SLIDE_INTERVAL = 0.15
"""Length of the interval of `slide`, as a fraction of the curve."""

_EQUAL_SLOPES = 0.05
"""Difference below which `slide` treats two slopes as equal, as a fraction of the steepest."""


@dataclass(frozen=True, kw_only=True)
class LossCurve:
    """The measurements of a range test, in the order of its steps."""

    lrs: tuple[float, ...]
    """Learning rate of each step."""

    losses: tuple[float, ...]
    """Loss of the global batch at each step; the last one may be infinite or NaN."""


@dataclass(frozen=True, kw_only=True)
class Suggestions:
    """Learning rates by rule; None where a rule suggests none."""

    valley: float | None = None
    """The learning rate two thirds along the longest descent."""

    steep: float | None = None
    """The learning rate where the loss falls fastest."""

    minimum: float | None = None
    """A tenth of the learning rate where the loss is lowest."""

    slide: float | None = None
    """The learning rate just before the slope of the loss changes, seen from where it breaks."""

    reason: str = ""
    """Why no rule suggests a learning rate; empty if one does."""


@dataclass(frozen=True, kw_only=True)
class LRTrial:
    """The outcome of a short training at one learning rate."""

    lr: float
    """Peak learning rate of the training."""

    loss: float | None
    """Loss at the end of the training; None if it diverged."""


@dataclass(frozen=True, kw_only=True)
class LRSearchResult:
    """The result of a range test."""

    curve: LossCurve
    """The measured losses over the learning rate."""

    suggestions: Suggestions
    """The suggested learning rates, at the global batch of the test."""

    trials: tuple[LRTrial, ...] = ()
    """Short trainings at and around the valley, in the order in which they ran; may be empty."""


def next_lr(trials: Sequence[LRTrial], first: float, *, factor: float = 3.0) -> float | None:
    """Return the learning rate to try next, or None once both neighbours of the best are tried.

    The search multiplies the learning rate by the factor while the final loss improves, and
    otherwise divides it. It needs only a starting point: a range test spends a step or two at each
    learning rate, so the one where its loss falls fastest is often far below the best one for a
    whole training. After four trials that all diverge, the search gives up.

    Args:
        trials: Outcomes of the trials so far.
        first: Learning rate of the first trial.
        factor: Ratio between neighbouring learning rates.
    """
    if not trials:
        return first
    tried_exponents = {round(math.log(trial.lr / first, factor)) for trial in trials}
    best = best_trial(trials)
    if best is None:
        if len(trials) == _MAX_DIVERGED_TRIALS:
            return None
        return first * factor ** (min(tried_exponents) - 1)
    best_exponent = round(math.log(best.lr / first, factor))
    for exponent in (best_exponent + 1, best_exponent - 1):
        if exponent not in tried_exponents:
            return float(first * factor**exponent)
    return None


def best_trial(trials: Sequence[LRTrial]) -> LRTrial | None:
    """Return the trial with the lowest final loss, or None if all diverged."""
    completed = [trial for trial in trials if trial.loss is not None]
    return min(completed, key=lambda trial: trial.loss or 0.0, default=None)


def final_loss(losses: Sequence[float], steps: int) -> float | None:
    """Return the mean loss over the last tenth of a training, or None if it diverged.

    Args:
        losses: Loss of each completed step; fewer than `steps` if the training stopped early.
        steps: Planned number of steps.
    """
    if len(losses) < steps or not all(map(math.isfinite, losses)):
        return None
    last = losses[-max(steps // 10, 1) :]
    return sum(last) / len(last)


class Divergence:
    """An online detector of divergence; equal losses give equal decisions on every rank."""

    def __init__(self) -> None:
        self._average = self._weight = 0.0
        self._best = math.inf

    def add(self, loss: float) -> bool:
        """Add the loss of the next step and return whether the losses have diverged.

        They have if this one is not finite, or if their moving average exceeds `DIVERGENCE_RATIO`
        times its minimum.
        """
        if not math.isfinite(loss):
            return True
        self._average = _ONLINE_BETA * self._average + (1 - _ONLINE_BETA) * loss
        self._weight = _ONLINE_BETA * self._weight + (1 - _ONLINE_BETA)
        smoothed = self._average / self._weight
        self._best = min(self._best, smoothed)
        return smoothed > DIVERGENCE_RATIO * self._best > 0


def smooth(values: Sequence[float], beta: float = _OFFLINE_BETA) -> list[float]:
    """Return `values` smoothed by exponential averages in both directions, without a lag.

    Both averages have the bias correction of Kingma and Ba (arXiv:1412.6980).
    """
    return _average(_average(values, beta)[::-1], beta)[::-1]


def _average(values: Sequence[float], beta: float) -> list[float]:
    averages, total, weight = [], 0.0, 0.0
    for value in values:
        total = beta * total + (1 - beta) * value
        weight = beta * weight + (1 - beta)
        averages.append(total / weight)
    return averages


def usable_part(curve: LossCurve) -> tuple[list[float], list[float]]:
    """Return the learning rates and smoothed losses up to the point where training breaks.

    The curve is cut before the first loss that is not finite, before losses that stay above their
    initial level up to the end, and before the first that rises above that level after a fall.
    Later losses say nothing about training and must not be smoothed into the earlier ones.
    """
    losses = list(itertools.takewhile(math.isfinite, curve.losses))
    if not losses:
        return [], []
    initial = max(losses[: max(len(losses) // 10, 1)])
    end = len(losses)
    while end > 1 and losses[end - 1] > initial:
        end -= 1
    averages = _average(losses[:end], _OFFLINE_BETA)
    for index, lowest in enumerate(itertools.accumulate(averages, min)):
        if losses[index] > initial and lowest < initial * (1 - _BROKEN_FALL):
            end = index
            break
    return list(curve.lrs[:end]), smooth(losses[:end])


def suggest(curve: LossCurve) -> Suggestions:
    """Return the learning rate that each rule suggests for a curve.

    If the curve has too few points before it breaks, or if the loss never falls, there are no
    suggestions and `reason` says why.
    """
    lrs, losses = usable_part(curve)
    if len(losses) < _MIN_POINTS:
        return Suggestions(
            reason=f"the loss breaks after {len(losses)} steps, and the rules need at least "
            f"{_MIN_POINTS}; start the range at a lower learning rate"
        )
    lowest = min(losses)
    descent = losses[: losses.index(lowest) + 1]
    highest = max(descent)
    if not highest - lowest > _MIN_FALL * abs(highest):
        return Suggestions(
            reason="the loss does not fall at any learning rate: it diverges at once, the range is "
            "too low, or there are too few steps"
        )
    logs = [math.log(lr) for lr in lrs]
    slopes = _slopes(logs, losses)
    return Suggestions(
        valley=_valley(logs, losses),
        steep=lrs[min(range(len(descent)), key=slopes.__getitem__)],
        minimum=lrs[len(descent) - 1] / 10,
        slide=_slide(lrs, slopes),
    )


def _slopes(xs: Sequence[float], ys: Sequence[float]) -> list[float]:
    """Return dy/dx at each point by central differences, one-sided at the ends."""
    last = len(xs) - 1
    pairs = [(max(index - 1, 0), min(index + 1, last)) for index in range(len(xs))]
    return [(ys[right] - ys[left]) / (xs[right] - xs[left]) for left, right in pairs]


def _valley(logs: Sequence[float], losses: Sequence[float]) -> float:
    """Return the learning rate two thirds along the longest descent, on the logarithmic scale.

    The first and the last twentieth of the fall are ignored, so that a long plateau before the
    descent does not shift the result.
    """
    descent = _longest_descent(losses)
    top, bottom = losses[descent[0]], losses[descent[-1]]
    middle = [
        logs[index]
        for index in descent
        if _EDGE <= (top - losses[index]) / (top - bottom) <= 1 - _EDGE
    ] or [logs[index] for index in descent]
    return math.exp(middle[0] + (middle[-1] - middle[0]) * 2 / 3)


def _longest_descent(losses: Sequence[float]) -> list[int]:
    """Return the indices of the longest strictly decreasing subsequence, by patience sorting."""
    tails: list[float] = []
    ends: list[int] = []
    predecessors: list[int | None] = []
    for index, loss in enumerate(losses):
        length = bisect.bisect_left(tails, -loss)
        predecessors.append(ends[length - 1] if length else None)
        tails[length : length + 1] = [-loss]
        ends[length : length + 1] = [index]
    indices: list[int] = []
    position: int | None = ends[-1]
    while position is not None:
        indices.append(position)
        position = predecessors[position]
    return indices[::-1]


def _slide(lrs: Sequence[float], slopes: Sequence[float]) -> float | None:
    """Return the learning rate at the left end of an interval with equal slopes at both ends.

    The interval slides down from the right end of the curve until its slopes are equal; None if
    they never are.
    """
    length = max(round(_SLIDE_INTERVAL * len(lrs)), 1)
    tolerance = _EQUAL_SLOPES * max(map(abs, slopes))
    for right in range(len(lrs) - 1, length - 1, -1):
        if abs(slopes[right] - slopes[right - length]) <= tolerance:
            return lrs[right - length]
    return None


def lr_at_reference(lr: float, batch_size: int, lr_batch_size: int | None, rule: str) -> float:
    """Return a learning rate measured at `batch_size` as a recipe states it, at `lr_batch_size`.

    This is the inverse of the scaling that a plan applies.

    Args:
        lr: The measured learning rate.
        batch_size: Global batch of the measurement.
        lr_batch_size: Reference batch of the recipe; None means that there is none.
        rule: `Recipe.lr_rule`.
    """
    if rule == "none" or lr_batch_size is None:
        return lr
    return lr * lr_factor(lr_batch_size / batch_size, rule)
