"""The learning-rate range test: where its loss is lowest, and where training breaks.

Smith, "Cyclical Learning Rates for Training Neural Networks" (arXiv:1506.01186): the learning rate
rises exponentially from step to step, and the loss shows where training is fast and where it
breaks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from launcher.planning.stages import lr_factor

DIVERGENCE_RATIO = 4.0
"""The smoothed loss over its minimum at which the loss counts as diverged."""

_ONLINE_BETA = 0.98
"""Decay of the moving average that detects divergence during a range test."""

_OFFLINE_BETA = 0.9
"""Decay of the moving averages that smooth a complete curve, forwards and backwards."""

_MIN_POINTS = 10
_MIN_FALL = 0.05
"""Smallest relative fall of a loss that counts as a fall."""

_BROKEN_FALL = 0.2
"""Relative fall of a loss after which a rise above its start means that training broke."""


@dataclass(frozen=True, kw_only=True)
class LossCurve:
    """The measurements of a range test or short training, in the order of its steps."""

    lrs: tuple[float, ...]
    """Learning rate of each step."""

    losses: tuple[float, ...]
    """Loss of the global batch at each step; the last one may be infinite or NaN."""

    held_out: float | None = None
    """Loss over the first evaluation set after the last step of a short training; None without
    evaluation data, after a divergence, and for a range test."""


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

    The initial level is that of the first tenth of the losses, and of at least ten. A loss rises
    above it if it exceeds their largest. The moving average falls if it goes below their mean after
    them: noise alone keeps it below their largest, and its first values average few losses.
    """
    losses = list(itertools.takewhile(math.isfinite, curve.losses))
    if not losses:
        return [], []
    first = losses[: max(len(losses) // 10, _MIN_POINTS)]
    highest, level = max(first), sum(first) / len(first)
    end = len(losses)
    while end > 1 and losses[end - 1] > highest:
        end -= 1
    averages = _average(losses[:end], _OFFLINE_BETA)[len(first) :]
    for index, lowest in enumerate(itertools.accumulate(averages, min), start=len(first)):
        if losses[index] > highest and lowest < level * (1 - _BROKEN_FALL):
            end = index
            break
    return list(curve.lrs[:end]), smooth(losses[:end])


def lowest_lr(curve: LossCurve) -> tuple[float | None, str]:
    """Return the learning rate where the smoothed loss is lowest, or why there is none.

    A training is best at a learning rate near this one or a few times as large or small, which
    is a start for short trainings.

    Returns:
        The learning rate and an empty reason. If the curve has too few points before it breaks, or
        if the loss never falls, None and the reason.
    """
    lrs, losses = usable_part(curve)
    if len(losses) < _MIN_POINTS:
        return None, (
            f"the loss breaks after {len(losses)} steps, and the search needs at least "
            f"{_MIN_POINTS}; start the range at a lower learning rate"
        )
    lowest = min(losses)
    position = losses.index(lowest)
    highest = max(losses[: position + 1])
    if not highest - lowest > _MIN_FALL * abs(highest):
        return None, (
            "the loss does not fall at any learning rate: it diverges at once, the range is "
            "too low, or there are too few steps"
        )
    return lrs[position], ""


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
