"""The plan of a run with `max_time` once the number of its steps is known."""

from __future__ import annotations

from dataclasses import replace

from launcher.planning.lr_path import LRPath, lr_path
from launcher.planning.plan import Plan
from launcher.planning.timed_steps import TimedSteps
from launcher.recipe.recipe import Recipe
from launcher.recipe.schedules import Schedule


def timed_plan(plan: Plan, recipe: Recipe, timed_steps: TimedSteps) -> Plan:
    """Return the plan of a run with the steps that `max_time` has set.

    Args:
        plan: The plan up to the limit of the recipe.
        recipe: The recipe.
        timed_steps: The steps that fit in the time.

    Raises:
        PlanError: A schedule raises an exception for this number of steps.
    """

    def path_of(schedule: Schedule) -> LRPath:
        return lr_path(schedule, timed_steps.steps, plan.stages, recipe.lr_rule, timed_steps)

    objectives = []
    for planned, alone in zip(plan.objectives, recipe.by_objective(), strict=False):
        if planned.lr_start is not None:
            path = path_of(alone.schedule)
            planned = replace(  # noqa: PLW2901
                planned, lr_start=planned.lr * path.start, lr_end=planned.lr * path.end
            )
        objectives.append(planned)
    text = (
        f"{timed_steps.steps:,}, planned for max_time={timed_steps.max_time} from the speed of the "
        f"first {timed_steps.first_step:,}; the limit was {timed_steps.limit:,}"
    )
    plan = replace(
        plan,
        total_steps=timed_steps.steps,
        timed_steps=timed_steps,
        objectives=tuple(objectives),
        derivations={**plan.derivations, "total_steps": text},
    )
    if plan.lr_peak_step is None:  # only the run computes the learning rate
        return plan
    path = path_of(recipe.schedule)
    return replace(
        plan,
        lr_start=plan.lr * path.start,
        lr_end=plan.lr * path.end,
        lr_peak_step=path.peak_step,
    )
