"""Schedules whose values only a run computes: the classes of torch.optim.lr_scheduler.

    torch_schedule   a class whose path is fixed
    plateau          ReduceLROnPlateau, whose path depends on evaluations

Planning imports no torch, so a plan knows such a schedule by its text alone. The engine runs
PyTorch's own class on an optimizer with one weight, and reads the learning rate from it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, ParamSpec

from msgspec import Meta

from launcher.errors import RecipeError, UsageError, did_you_mean
from launcher.recipe.callspec import bind
from launcher.recipe.metric_goal import MetricGoal, check_goal, read_goal
from launcher.recipe.schedules import SCHEDULES, Schedule, ScheduleValue, hint_for_function
from launcher.recipe.validation import NonNegativeFloat, NonNegativeInt, brief, show

TORCH_SCHEDULERS = (
    "ChainedScheduler",
    "ConstantLR",
    "CosineAnnealingLR",
    "CosineAnnealingWarmRestarts",
    "CyclicLR",
    "ExponentialLR",
    "LambdaLR",
    "LinearLR",
    "MultiStepLR",
    "MultiplicativeLR",
    "OneCycleLR",
    "PolynomialLR",
    "SequentialLR",
    "StepLR",
)
"""The classes of torch.optim.lr_scheduler whose path is fixed before the run."""

_OF_LAUNCHER = {
    "last_epoch": "a resumed run continues where its checkpoint was saved",
    "optimizer": "launcher builds it",
    "verbose": "metrics.jsonl records the learning rate of each step",
}
"""Arguments of the classes that a recipe does not give, and why."""

P = ParamSpec("P")

_MODULE = "torch.optim.lr_scheduler"


@dataclass(frozen=True, repr=False)
class UnplannedSchedule(Schedule):
    """A schedule whose values a run computes; the engine replaces it before the first step."""

    example: ClassVar[str] = "torch_schedule('StepLR', step_size=30, per='epoch')"

    def __str__(self) -> str:
        """Return the text that `parse` reads back, unless an argument is a function or a class."""
        inner = ", ".join(f"{name}={_text(value)}" for name, value in self.arguments)
        return f"{self.name}({inner})"

    def at(self, step: int, total_steps: int) -> ScheduleValue:
        """Refuse to compute a value outside of a run.

        Raises:
            UsageError: Always.
        """
        raise UsageError(f"{self}: only a run computes the learning rate of a step.")

    @property
    def is_planned(self) -> bool:
        return False

    def check_within(self, call: str) -> None:
        if dict(self.arguments).get("per") == "epoch":
            raise UsageError(
                f"{call}({self}): the steps of {call} are no epochs. Leave per='epoch' out, and "
                "count in steps, or use SequentialLR, which counts epochs from the first one."
            )


def torch_schedule(
    scheduler: str | type | None = None, *, per: str = "step", **arguments: Any
) -> UnplannedSchedule:
    """Follow a class of torch.optim.lr_scheduler, which is stepped after every step or epoch.

    The class is given an optimizer with the recipe's `lr`, so that learning rates among its
    arguments, such as `eta_min`, are meant at the batch size `lr_batch_size`, as `lr` is. Left out,
    `T_max` of CosineAnnealingLR and `total_steps` of OneCycleLR are the length of the run, and
    `max_lr` is `lr`. The classes in `schedulers`, of SequentialLR and ChainedScheduler, are written
    as `torch_schedule(...)` too.

    Args:
        scheduler: The name of the class, or the class.
        per: What the class counts: "step" or "epoch".
        arguments: The arguments of the class, without the optimizer.
    """
    name = _class_name(scheduler)
    call = f"torch_schedule({name!r})"
    if per not in ("step", "epoch"):
        raise UsageError(f"{call}: per={brief(repr(per))}; expected 'step' or 'epoch'.")
    for argument, reason in _OF_LAUNCHER.items():
        if argument in arguments:
            raise UsageError(f"{call} takes no {argument}: {reason}. Leave it out.")
    for part in _schedules_in(arguments):
        if not isinstance(part, UnplannedSchedule) or part.name != "torch_schedule":
            raise UsageError(f"{call}: {part} is not a torch_schedule(...), as its parts must be.")
        if "per" in dict(part.arguments):
            raise UsageError(f"{call}: {part} counts what {call} counts. Leave its per out.")
    given = {"scheduler": name if isinstance(scheduler, str) else scheduler, **arguments}
    if per != "step":
        given["per"] = per
    return UnplannedSchedule("torch_schedule", tuple(given.items()))


def _follows_evaluations(rule: Callable[P, None]) -> Callable[P, UnplannedSchedule]:
    """Turn a check of arguments into a maker of schedules with these arguments."""

    @functools.wraps(rule)
    def make(*args: P.args, **kwargs: P.kwargs) -> UnplannedSchedule:
        arguments = bind(rule, args, kwargs)
        check: Callable[..., None] = rule
        check(**dict(arguments))
        return UnplannedSchedule(rule.__name__, arguments)

    SCHEDULES[rule.__name__] = make
    return make


@_follows_evaluations
def plateau(
    metric: str = "loss:min",
    *,
    factor: Annotated[float, Meta(gt=0, lt=1)] = 0.1,  # noqa: ARG001
    patience: NonNegativeInt = 10,  # noqa: ARG001
    threshold: NonNegativeFloat = 1e-4,  # noqa: ARG001
    threshold_mode: Literal["rel", "abs"] = "rel",  # noqa: ARG001
    cooldown: NonNegativeInt = 0,  # noqa: ARG001
    min_lr: NonNegativeFloat = 0.0,  # noqa: ARG001
    eps: NonNegativeFloat = 1e-8,  # noqa: ARG001
) -> None:
    """Reduce the learning rate when a metric of the evaluations has stopped improving.

    This is torch.optim.lr_scheduler.ReduceLROnPlateau, stepped after each evaluation. Its state is
    in the checkpoints. All ranks follow the metric that rank 0 has.

    Args:
        metric: The metric and its direction, such as "loss:min" or "accuracy:max".
        factor: What the learning rate is multiplied by.
        patience: Evaluations without an improvement that are tolerated.
        threshold: The smallest change that counts as an improvement.
        threshold_mode: Whether `threshold` is relative to the best value ("rel") or not ("abs").
        cooldown: Evaluations after a reduction that are not counted.
        min_lr: The lowest learning rate, meant at the batch size `lr_batch_size` as `lr` is.
        eps: A smaller change of the learning rate is left out.
    """
    read_goal(metric, where="plateau(metric=...)")


def plateau_goal(schedule: UnplannedSchedule) -> MetricGoal:
    """Return the metric that a `plateau` follows."""
    metric = dict(schedule.arguments).get("metric", "loss:min")
    return read_goal(str(metric), where="plateau(metric=...)")


def check_schedule(schedule: object, metrics: Mapping[str, Any]) -> None:
    """Refuse a recipe's schedule that is no `Schedule`, or that follows an unknown metric.

    Args:
        schedule: The schedule.
        metrics: The metrics of the recipe.

    Raises:
        RecipeError: It is something else, such as a class of torch.optim.lr_scheduler, or the
            recipe has no such metric.
    """
    if isinstance(schedule, Schedule):
        for part in (schedule, *schedule.parts):
            if isinstance(part, UnplannedSchedule) and part.name == "plateau":
                _check_metric(part, metrics)
        return
    kind = schedule if isinstance(schedule, type) else type(schedule)
    if kind.__module__ == _MODULE:
        raise RecipeError(
            f"Recipe(schedule=...): found {brief(repr(schedule))} of {_MODULE}. Write "
            f"schedule=torch_schedule({kind.__name__!r}, ...), with its arguments but without an "
            "optimizer."
        )
    raise RecipeError(
        f"Recipe(schedule=...): expected a schedule such as one_cycle(), found {show(schedule)}."
        f"{hint_for_function(schedule)}"
    )


def _check_metric(schedule: UnplannedSchedule, metrics: Mapping[str, Any]) -> None:
    try:
        check_goal(plateau_goal(schedule), metrics, where="schedule=plateau(...)")
    except UsageError as error:
        raise RecipeError(str(error)) from None


def _class_name(scheduler: object) -> str:
    """Return the name of a scheduler class.

    Raises:
        UsageError: It is not a class of that kind, or one whose path is not fixed.
    """
    name = scheduler.__name__ if isinstance(scheduler, type) else scheduler
    if not isinstance(name, str):
        raise UsageError(
            f"torch_schedule({brief(repr(scheduler))}): expected a class of {_MODULE} or its name, "
            "such as 'CosineAnnealingLR'. A scheduler object belongs to an optimizer of its own."
        )
    if name == "ReduceLROnPlateau":
        raise UsageError(
            "torch_schedule('ReduceLROnPlateau'): its path depends on evaluations. Write "
            "schedule=plateau(metric='loss:min', factor=0.1, patience=10)."
        )
    is_own_class = isinstance(scheduler, type) and scheduler.__module__ != _MODULE
    if name not in TORCH_SCHEDULERS and not is_own_class:
        raise UsageError(
            f"torch_schedule({brief(repr(name))}): {_MODULE} has no class of that name whose path "
            f"is fixed; known: {', '.join(TORCH_SCHEDULERS)}.{did_you_mean(name, TORCH_SCHEDULERS)}"
        )
    return name


def _schedules_in(arguments: dict[str, Any]) -> list[Schedule]:
    values = [
        item
        for value in arguments.values()
        for item in (value if isinstance(value, (list, tuple)) else [value])
    ]
    return [value for value in values if isinstance(value, Schedule)]


def _text(value: object) -> str:
    """Return an argument as text that is the same in every process."""
    if isinstance(value, (list, tuple)):
        inner = ", ".join(map(_text, value))
        return f"[{inner}]"
    if isinstance(value, type) and value.__module__ == _MODULE:
        return repr(value.__name__)
    if callable(value):
        return f"<{getattr(value, '__qualname__', type(value).__qualname__)}>"
    return repr(value)


SCHEDULES["torch_schedule"] = torch_schedule
