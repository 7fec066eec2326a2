"""The path of the learning rate over a run: its ends, its peak, and where two runs part.

A run may have more steps than can be visited. A long one is sampled, and the neighbourhood of the
highest sample is sampled again, until it is short enough to visit each of its steps.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from launcher.errors import LauncherError, PlanError
from launcher.planning.stages import Stage, growth_at
from launcher.planning.timed_steps import TimedSteps
from launcher.printable import text_of
from launcher.recipe.schedules import Schedule

_SAMPLES = 1_000
"""Steps at which a part of a run is sampled."""

_MAX_VISITED = 20_000
"""Steps of the longest part of a run of which each step is visited."""


@dataclass(frozen=True, kw_only=True)
class LRPath:
    """Factors of the peak learning rate over a run."""

    start: float
    """Factor of the first step."""

    end: float
    """Factor of the last step."""

    highest: float
    """The highest factor."""

    peak_step: int
    """The first step with the highest factor, counted from 1."""


def lr_path(
    schedule: Schedule,
    total_steps: int,
    stages: Sequence[Stage],
    rule: str,
    timed_steps: TimedSteps | None = None,
) -> LRPath:
    """Return the path of the learning rate of a run, in a time that does not depend on its steps.

    Args:
        schedule: The schedule of the recipe.
        total_steps: Steps of the run.
        stages: The stages of the run.
        rule: `Recipe.lr_rule`.
        timed_steps: The steps that `max_time` has set, if it has.

    Raises:
        PlanError: The schedule raises an exception, or returns a factor that is not finite.
    """

    def factor(step: int) -> float:
        span = total_steps if timed_steps is None else timed_steps.span(step)
        where = f"schedule={schedule}: step {step + 1:,} of {span:,}"
        try:
            value = schedule.at(step, span).factor * growth_at(stages, step, rule)
            is_finite = math.isfinite(value)
        except LauncherError:
            raise
        except Exception as error:
            raise PlanError(
                f"{where} has no learning rate: {type(error).__name__}: {text_of(error)}. The rule "
                f"was called with (step={step}, total_steps={total_steps}). It returns "
                "launcher.ScheduleValue(factor), where step counts from 0."
            ) from error
        if not is_finite:
            raise PlanError(f"{where} has a learning rate that is not finite: the peak x {value}.")
        return value

    stride = max(total_steps // _SAMPLES, 1)
    sampled = {*range(0, total_steps, stride), *(stage.first_step for stage in stages)}
    if timed_steps is not None:
        around = (timed_steps.first_step - 1, timed_steps.first_step)
        sampled |= {step for step in around if 0 <= step < total_steps}
    highest = max(sorted(sampled), key=factor)
    peak = _highest_around(highest, stride, total_steps, factor)
    return LRPath(
        start=factor(0),
        end=factor(total_steps - 1),
        highest=factor(peak),
        peak_step=peak + 1,
    )


def _highest_around(
    step: int, stride: int, total_steps: int, factor: Callable[[int], float]
) -> int:
    """Return the first step with the highest factor among those less than `stride` from `step`."""
    while True:
        window = range(max(step - stride + 1, 0), min(step + stride, total_steps))
        if len(window) <= _MAX_VISITED:
            return max(window, key=factor)
        stride = len(window) // _SAMPLES
        step = max(sorted({*window[::stride], step}), key=factor)


def first_difference(steps: range, differs: Callable[[int], bool]) -> int | None:
    """Return the first of `steps` for which `differs` is true, or None if there is none.

    Beyond the first `_MAX_VISITED` steps, a difference that lasts less than a thousandth of the
    steps may be missed.
    """
    visited = steps[:_MAX_VISITED]
    first = next((step for step in visited if differs(step)), None)
    if first is not None or len(steps) == len(visited):
        return first
    rest = steps[_MAX_VISITED:]
    sampled = sorted({*rest[:: max(len(rest) // _SAMPLES, 1)], rest[-1]})
    before = visited[-1]
    for step in sampled:
        if differs(step):
            return before + 1 + bisect.bisect_left(range(before + 1, step), True, key=differs)
        before = step
    return None
