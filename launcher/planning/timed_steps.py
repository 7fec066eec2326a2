"""How many steps fit in a time: the arithmetic behind the setting `max_time`.

A run with `max_time` measures its speed over its first steps. It then plans as many steps as fit in
the time that is left, and its schedule spans them.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass

MARGIN = 0.03
"""Part of the time that is left when the steps are planned that stays free, because the speed of a
run varies."""

FEWEST_STEPS = 10
"""Steps over which the speed is measured, at least."""

MEASURED_PART = 0.02
"""Part of `max_time` over which the speed is measured, at least."""

LONGEST_PART = 0.25
"""Part of the time left at the first step after which the speed is taken as it is measured so far,
however few the steps are."""


@dataclass(frozen=True, kw_only=True)
class TimedSteps:
    """The steps of a run with `max_time`, once its speed is known."""

    max_time: str
    """The setting `max_time` for which they were planned."""

    limit: int
    """Steps that the recipe's epochs or steps stand for. The schedule of the first steps spans
    them."""

    first_step: int
    """Steps that were taken while the speed was measured."""

    steps: int
    """Steps of the run. From `first_step` on its schedule spans them."""

    def __post_init__(self) -> None:
        if not 0 <= self.first_step <= self.steps <= self.limit < 2**63:
            raise ValueError("expected 0 <= first_step <= steps <= limit")

    def span(self, step: int) -> int:
        """Return the number of steps that the schedule spans at `step`, counted from 0."""
        return self.limit if step < self.first_step else self.steps


@dataclass(frozen=True, kw_only=True)
class TimeCosts:
    """The time that the parts of a run take, in seconds."""

    step: float
    evaluation: float = 0.0
    checkpoint: float = 0.0
    """Time that the steps wait for a checkpoint."""

    end: float = 0.0
    """Time from the last step, or its evaluation, to the result: the last checkpoint and the
    weights."""


@dataclass(frozen=True, kw_only=True)
class Interruptions:
    """What a run does between its steps."""

    evaluate_every: int | None = None
    """Steps between evaluations, besides the one after the last step; None evaluates nothing."""

    save_every_steps: int | None = None
    """Steps between checkpoints; None saves them by the clock, or not at all."""

    save_every_seconds: float | None = None
    """Seconds between checkpoints; None saves them by the steps, or not at all."""

    quick_every_steps: int | None = None
    """Steps between quick checkpoints, which delay a step as others do; None saves none."""

    def evaluations(self, first_step: int, last_step: int) -> int:
        """Return the number of evaluations after step `first_step`, up to that of the last step."""
        every = self.evaluate_every
        if every is None:
            return 0
        return last_step // every - first_step // every + (last_step % every != 0)

    def checkpoints(self, first_step: int, last_step: int, seconds: float) -> int:
        """Return the number of checkpoints in `seconds` of steps, without that of the end."""
        by_steps = [
            (last_step - 1) // every - first_step // every
            for every in (self.save_every_steps, self.quick_every_steps)
            if every is not None
        ]
        by_clock = int(seconds // self.save_every_seconds) if self.save_every_seconds else 0
        return sum(by_steps) + by_clock


def seconds_needed(
    first_step: int, last_step: int, costs: TimeCosts, interruptions: Interruptions
) -> float:
    """Return the seconds from step `first_step` to the result of a run that ends at `last_step`."""
    steps = (last_step - first_step) * costs.step
    evaluations = interruptions.evaluations(first_step, last_step)
    checkpoints = interruptions.checkpoints(first_step, last_step, steps)
    return steps + evaluations * costs.evaluation + checkpoints * costs.checkpoint + costs.end


def fitting_steps(
    seconds: float, first_step: int, limit: int, costs: TimeCosts, interruptions: Interruptions
) -> int:
    """Return the number of steps with which a run ends within a time.

    Args:
        seconds: The time that is left after `first_step` steps, of which `MARGIN` stays free.
        first_step: Steps that have been taken.
        limit: The most steps that the run may have.
        costs: What each part of the run takes.
        interruptions: What the run does between its steps.

    Returns:
        The largest number of steps, at most `limit`, that fits; `first_step` if no step fits.
    """
    usable = seconds * (1 - MARGIN)
    candidates = range(first_step + 1, limit + 1)
    num_fitting = bisect.bisect_right(
        candidates,
        usable,
        key=lambda last_step: seconds_needed(first_step, last_step, costs, interruptions),
    )
    return first_step + num_fitting


def reserved_for_evaluation(
    samples: int, batch_size: int, step_seconds: float, wait_seconds: float
) -> float:
    """Return the seconds to reserve for an evaluation that has not been measured.

    A forward pass without a backward pass takes about a third of the time of a training step, and
    reading a sample takes as long as in training. Half of the time that training takes for as many
    samples is reserved, and more if the steps wait for data: all of it where they do nothing else.

    Args:
        samples: Evaluation samples.
        batch_size: Samples of a step.
        step_seconds: Duration of a step.
        wait_seconds: The part of it in which the ranks wait for data.
    """
    wait_share = min(wait_seconds / step_seconds, 1.0) if step_seconds else 0.0
    return samples / batch_size * step_seconds * (1 + wait_share) / 2
