"""The steps after which a planned run evaluates, for what acts on an evaluation."""

from __future__ import annotations

from launcher.errors import PlanError
from launcher.planning.global_batch import ceil_div
from launcher.planning.plan import Plan
from launcher.planning.stages import Course


def next_evaluation(plan: Plan, steps: int) -> int:
    """Return the number of steps, at least `steps`, after which a run evaluates next.

    Args:
        plan: The plan of the run, which has evaluation data.
        steps: A number of steps, at least 1 and at most all steps of the run.

    Raises:
        PlanError: The run evaluates after each epoch, and the plan does not know its training
            samples.
    """
    if plan.evaluate_every is not None:
        return min(ceil_div(steps, plan.evaluate_every) * plan.evaluate_every, plan.total_steps)
    if plan.train_samples is None:
        raise PlanError(
            f"{plan.recipe} evaluates after each epoch, and its number of training samples is "
            "unknown to the plan. Give evaluate_every=STEPS, or train_samples=... in the recipe."
        )
    course = Course(plan.stages, plan.train_samples)
    epoch = course.window(steps - 1).epoch
    low, high = steps, plan.total_steps
    while low < high:  # the first number of steps after which the epoch has ended
        middle = (low + high) // 2
        if course.position(middle) >= (epoch + 1) * plan.train_samples:
            high = middle
        else:
            low = middle + 1
    return low
