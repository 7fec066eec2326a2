"""The plan of a run with `max_time` once the number of its steps is known."""

from __future__ import annotations

from dataclasses import replace

from launcher.planning.lr_path import lr_path
from launcher.planning.plan import Plan
from launcher.planning.timed_steps import TimedSteps
from launcher.recipe.schedules import Schedule


def timed_plan(plan: Plan, schedule: Schedule, timed_steps: TimedSteps) -> Plan:
    """Return the plan of a run with the steps that `max_time` has set.

    Args:
        plan: The plan up to the limit of the recipe.
        schedule: The schedule of the recipe.
        timed_steps: The steps that fit in the time.

    Raises:
        PlanError: The schedule raises an exception for this number of steps.
    """
    rule = plan.settings["lr_rule"]
    path = lr_path(schedule, timed_steps.steps, plan.stages, rule, timed_steps)
    text = (
        f"{timed_steps.steps:,}, planned for max_time={timed_steps.max_time} from the speed of the "
        f"first {timed_steps.first_step:,}; the limit was {timed_steps.limit:,}"
    )
    return replace(
        plan,
        total_steps=timed_steps.steps,
        timed_steps=timed_steps,
        lr_start=plan.lr * path.start,
        lr_end=plan.lr * path.end,
        lr_peak_step=path.peak_step,
        derivations={**plan.derivations, "total_steps": text},
    )
