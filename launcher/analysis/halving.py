"""Successive halving: which runs of a sweep go on, and how far each goes before the next choice.

Jamieson and Talwalkar, "Non-stochastic Best Arm Identification and Hyperparameter Optimization"
(arXiv:1502.07943). All runs train for a few steps, the best of every `eta` train for `eta` times as
many, and so on until the rest train to their end.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from launcher.errors import PlanError
from launcher.recipe.metric_goal import MetricGoal


def num_choices(num_runs: int, eta: int) -> int:
    """Return how many choices leave one run of `num_runs`, if each keeps one of every `eta`."""
    choices = 0
    while num_runs > 1:
        num_runs = num_kept(num_runs, eta)
        choices += 1
    return choices


def num_kept(num_runs: int, eta: int) -> int:
    """Return the number of runs that a choice keeps: one of every `eta`, and at least one."""
    return max(num_runs // eta, 1)


def rung_steps(
    total_steps: Sequence[int], eta: int, min_steps: int | None
) -> tuple[tuple[int, ...], ...]:
    """Return the steps of each run before each choice, before they are moved to an evaluation.

    Args:
        total_steps: Steps of each run.
        eta: One of every so many runs is kept.
        min_steps: Steps before the first choice; None takes as many choices as leave one run, the
            last of them after 1 / eta of each run's steps.

    Returns:
        One tuple for each choice, with the steps of each run.

    Raises:
        PlanError: The runs are too short for a choice after `min_steps` steps.
    """
    choices = num_choices(len(total_steps), eta)
    if min_steps is None:
        return tuple(
            tuple(max(math.ceil(total / eta ** (choices - choice)), 1) for total in total_steps)
            for choice in range(choices)
        )
    shortest = min(total_steps)
    if min_steps >= shortest:
        raise PlanError(
            f"--min-steps {min_steps:,}: the shortest run has {shortest:,} steps, so that no run "
            "would be stopped. Give fewer."
        )
    rungs = (min_steps * eta**choice for choice in range(choices))
    return tuple((steps,) * len(total_steps) for steps in rungs if steps < shortest)


def choose(values: Mapping[int, float | None], goal: MetricGoal, eta: int) -> tuple[int, ...]:
    """Return the runs that go on, in their order.

    Args:
        values: The metric of each run that is left, by its index; a run whose metric is missing or
            NaN is the worst. Of equal runs, the first is better.
        goal: The metric.
        eta: One of every so many runs is kept.
    """
    ranked = sorted(values, key=lambda index: (goal.key(values[index]), index))
    return tuple(sorted(ranked[: num_kept(len(ranked), eta)]))
