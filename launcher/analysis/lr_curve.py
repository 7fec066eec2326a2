"""The learning-rate range test: which learning rate a curve of losses suggests.

Smith, "Cyclical Learning Rates for Training Neural Networks" (arXiv:1506.01186): the learning rate
rises exponentially from step to step, and the loss says where training is fast and where it breaks.
All rules look at the loss over the logarithm of the learning rate.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from launcher.planning.stages import lr_factor

DIVERGED = 4.0
"""The loss, smoothed, has diverged at so many times its lowest value."""

_MOST_DIVERGED = 4
"""After so many trials that diverged, each at a lower learning rate, something else is wrong."""

_ONLINE = 0.98
"""Weight of the past in the average that looks for divergence while the losses come."""

_OFFLINE = 0.9
"""The same in the average that the rules look at, forward and backward: it lags in neither."""

_LEAST_POINTS = 10
_LEAST_FALL = 0.05
"""A loss that falls by less than this part of itself, has not."""

_FALLEN = 0.2
"""A loss that has fallen by this part of itself and comes back up has broken."""

_EDGE = 0.05
"""Of `valley`: the part of a descent's fall that is left out at each end."""

_INTERVAL = 0.15
"""Of `slide`: the interval's length, as a part of the curve."""

_LEVEL = 0.05
"""Of `slide`: slopes that differ by less than this part of the steepest are the same."""


@dataclass(frozen=True, kw_only=True)
class LossCurve:
    """What a range test has measured, in the order of steps."""

    lrs: tuple[float, ...]
    losses: tuple[float, ...]
    """Of the global batch; one that is not finite may be the last."""


@dataclass(frozen=True, kw_only=True)
class Suggestions:
    """Learning rates by rule; None where a rule finds none."""

    valley: float | None = None
    """Two thirds down the longest descent."""

    steep: float | None = None
    """Where the loss falls fastest."""

    minimum: float | None = None
    """A tenth of where the loss is lowest."""

    slide: float | None = None
    """Before the slope begins to change, coming from where the loss breaks."""

    reason: str = ""
    """Why there are none."""


@dataclass(frozen=True, kw_only=True)
class LRTrial:
    """What came of a short training."""

    lr: float
    """Its peak learning rate."""

    loss: float | None
    """At its end; None where it diverged."""


@dataclass(frozen=True, kw_only=True)
class FoundLR:
    """What a range test came to."""

    curve: LossCurve
    suggestions: Suggestions
    """At the batch of the test."""

    trials: tuple[LRTrial, ...] = ()
    """Short trainings at the valley and around it, if there were any."""


def next_lr(trials: Sequence[LRTrial], first: float, *, factor: float = 3.0) -> float | None:
    """Return the learning rate to try next, or None when no neighbour of the best is untried.

    From the first it goes up by the factor as long as that is better, or else down. A range test
    sees each learning rate for a step or two, and where the loss falls fastest in it is often far
    below what a whole training stands: the first is a place to begin at.

    Args:
        trials: Those so far.
        first: The learning rate to begin with.
        factor: Between neighbours.
    """
    if not trials:
        return first
    tried = {round(math.log(trial.lr / first, factor)) for trial in trials}
    best = best_trial(trials)
    if best is None:
        return None if len(trials) == _MOST_DIVERGED else first * factor ** (min(tried) - 1)
    place = round(math.log(best.lr / first, factor))
    for neighbour in (place + 1, place - 1):
        if neighbour not in tried:
            return float(first * factor**neighbour)
    return None


def best_trial(trials: Sequence[LRTrial]) -> LRTrial | None:
    """Return the trial with the lowest loss, of those that did not diverge."""
    ended = [trial for trial in trials if trial.loss is not None]
    return min(ended, key=lambda trial: trial.loss or 0.0, default=None)


def final_loss(losses: Sequence[float], steps: int) -> float | None:
    """Return the mean of the last tenth of a training's losses; None where they end before it."""
    if len(losses) < steps or not all(map(math.isfinite, losses)):
        return None
    last = losses[-max(steps // 10, 1) :]
    return sum(last) / len(last)


class Divergence:
    """Tells while the losses come whether they have diverged, the same for the same losses."""

    def __init__(self) -> None:
        self._average = self._weight = 0.0
        self._best = math.inf

    def add(self, loss: float) -> bool:
        """Take the next loss; return whether to stop."""
        if not math.isfinite(loss):
            return True
        self._average = _ONLINE * self._average + (1 - _ONLINE) * loss
        self._weight = _ONLINE * self._weight + (1 - _ONLINE)
        smoothed = self._average / self._weight
        self._best = min(self._best, smoothed)
        return smoothed > DIVERGED * self._best > 0


def smooth(values: Sequence[float], beta: float = _OFFLINE) -> list[float]:
    """Return `values` averaged exponentially in both directions, so that nothing is shifted.

    Both averages are corrected for their beginning (Kingma and Ba, arXiv:1412.6980).
    """
    return _average(_average(values, beta)[::-1], beta)[::-1]


def _average(values: Sequence[float], beta: float) -> list[float]:
    averages, total, weight = [], 0.0, 0.0
    for value in values:
        total = beta * total + (1 - beta) * value
        weight = beta * weight + (1 - beta)
        averages.append(total / weight)
    return averages


def usable(curve: LossCurve) -> tuple[list[float], list[float]]:
    """Return learning rates and smoothed losses, up to where the loss breaks.

    That is before the first loss that is not finite, and before the first that is above what it was
    at the beginning after it has fallen, or for good: what comes then says nothing of training, and
    must not be smoothed into the rest.
    """
    losses = list(itertools.takewhile(math.isfinite, curve.losses))
    if not losses:
        return [], []
    limit = max(losses[: max(len(losses) // 10, 1)])
    end = len(losses)
    while end > 1 and losses[end - 1] > limit:
        end -= 1
    averages = _average(losses[:end], _OFFLINE)
    for index, low in enumerate(itertools.accumulate(averages, min)):
        if losses[index] > limit and low < limit * (1 - _FALLEN):
            end = index
            break
    return list(curve.lrs[:end]), smooth(losses[:end])


def suggest(curve: LossCurve) -> Suggestions:
    """Return what each rule makes of a curve.

    None of them suggests anything where the loss has not fallen, or there are too few points.
    """
    lrs, losses = usable(curve)
    if len(losses) < _LEAST_POINTS:
        return Suggestions(
            reason=f"the loss is not finite after {len(losses)} steps: begin at a lower lr"
        )
    lowest = min(losses)
    before = losses[: losses.index(lowest) + 1]
    fall = max(before) - lowest
    if not fall > _LEAST_FALL * abs(max(before)):
        return Suggestions(
            reason="the loss does not fall at any learning rate: it diverges at once, the range is "
            "too low, or the steps are too few"
        )
    logs = [math.log(lr) for lr in lrs]
    slopes = _slopes(logs, losses)
    return Suggestions(
        valley=_valley(logs, losses),
        steep=lrs[min(range(len(before)), key=slopes.__getitem__)],
        minimum=lrs[len(before) - 1] / 10,
        slide=_slide(lrs, slopes),
    )


def _slopes(xs: Sequence[float], ys: Sequence[float]) -> list[float]:
    """Return dy/dx by differences of the neighbours, one-sided at the ends."""
    last = len(xs) - 1
    pairs = [(max(index - 1, 0), min(index + 1, last)) for index in range(len(xs))]
    return [(ys[right] - ys[left]) / (xs[right] - xs[left]) for left, right in pairs]


def _valley(logs: Sequence[float], losses: Sequence[float]) -> float:
    """Return the learning rate two thirds along the longest descent, on the logarithmic scale.

    Its beginning and its end are where a twentieth of its fall is done, and all but a twentieth:
    how long the curve was level before does not matter.
    """
    descent = _longest_descent(losses)
    top, bottom = losses[descent[0]], losses[descent[-1]]
    steep = [
        logs[index]
        for index in descent
        if _EDGE <= (top - losses[index]) / (top - bottom) <= 1 - _EDGE
    ] or [logs[index] for index in descent]
    return math.exp(steep[0] + (steep[-1] - steep[0]) * 2 / 3)


def _longest_descent(losses: Sequence[float]) -> list[int]:
    """Return the places of the longest strictly decreasing subsequence, by patience sorting."""
    tails: list[float] = []
    ends: list[int] = []
    before: list[int | None] = []
    for index, loss in enumerate(losses):
        length = bisect.bisect_left(tails, -loss)
        before.append(ends[length - 1] if length else None)
        tails[length : length + 1] = [-loss]
        ends[length : length + 1] = [index]
    found: list[int] = []
    place: int | None = ends[-1]
    while place is not None:
        found.append(place)
        place = before[place]
    return found[::-1]


def _slide(lrs: Sequence[float], slopes: Sequence[float]) -> float | None:
    """Return the learning rate at the left of an interval that slides down from the right.

    It stops where the slopes at both of its ends are alike.
    """
    length = max(round(_INTERVAL * len(lrs)), 1)
    level = _LEVEL * max(map(abs, slopes))
    for right in range(len(lrs) - 1, length - 1, -1):
        if abs(slopes[right] - slopes[right - length]) <= level:
            return lrs[right - length]
    return None


def at_reference(lr: float, batch_size: int, lr_batch_size: int | None, rule: str) -> float:
    """Return a learning rate found at `batch_size` as the recipe states it, at `lr_batch_size`.

    The inverse of how a plan scales it.
    """
    if rule == "none" or lr_batch_size is None:
        return lr
    return lr * lr_factor(lr_batch_size / batch_size, rule)
