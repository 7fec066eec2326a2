"""Schedules that a run computes: classes of torch.optim.lr_scheduler on an optimizer of one weight.

Where the path is fixed, the value of a step follows from the number of times that the class has
been stepped before, so that a resumed run computes it again from the start, on any number of ranks.
A plateau follows the evaluations, and its state is in the checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.optim import SGD, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler

from launcher.engine.backends.base import Backend
from launcher.engine.data.sampler import Sampler
from launcher.errors import RecipeError
from launcher.planning.plan import Plan
from launcher.printable import error_line
from launcher.recipe.objective import Objective
from launcher.recipe.recipe import Recipe
from launcher.recipe.schedules import Schedule, ScheduleValue
from launcher.recipe.unplanned_schedules import UnplannedSchedule, plateau_goal

_MOMENTUM = 0.9
"""Momentum of the optimizer, which classes that cycle the momentum overwrite."""


_PLATEAU_STATE = ("best", "cooldown_counter", "num_bad_epochs", "last_epoch")
"""What changes in a ReduceLROnPlateau."""


def with_live_schedules(
    recipe: Recipe, plan: Plan, sampler: Sampler, *, has_evaluations: bool
) -> tuple[Recipe, tuple[Plateau, ...]]:
    """Return a recipe whose schedules, also those of its objectives, are computable in this run.

    The parts that follow evaluations are returned as well, for `observe_evaluation`, in the order
    of the objectives. Arguments and errors are those of `live_schedule`.
    """
    if not recipe.objectives:
        schedule, plateaus = live_schedule(recipe, plan, sampler, has_evaluations=has_evaluations)
        return replace(recipe, schedule=schedule), plateaus
    objectives: list[Objective] = []
    all_plateaus: list[Plateau] = []
    for objective, alone in zip(recipe.objectives, recipe.by_objective(), strict=True):
        schedule, plateaus = live_schedule(alone, plan, sampler, has_evaluations=has_evaluations)
        objectives.append(replace(objective, schedule=schedule))
        all_plateaus += plateaus
    return replace(recipe, objectives=tuple(objectives)), tuple(all_plateaus)


def live_schedule(
    recipe: Recipe, plan: Plan, sampler: Sampler, *, has_evaluations: bool
) -> tuple[Schedule, tuple[Plateau, ...]]:
    """Return the schedule of a recipe with every part that only a run can compute made computable.

    The parts that follow evaluations are returned as well, for `observe_evaluation`.

    Args:
        recipe: The recipe.
        plan: Its plan.
        sampler: The order of the samples, which knows the epoch of each step.
        has_evaluations: Whether the recipe has evaluation data.

    Raises:
        RecipeError: A class of torch.optim.lr_scheduler refuses its arguments, or a schedule
            follows evaluations and there are none.
    """
    plateaus: list[Plateau] = []

    def epoch_of(step: int) -> int:
        return sampler.window(step).epoch

    def live(schedule: Schedule) -> Schedule:
        path: Plateau | TorchPath
        if isinstance(schedule, UnplannedSchedule):
            if schedule.name == "plateau":
                path = Plateau(schedule, recipe.lr)
                plateaus.append(path)
            else:
                path = TorchPath(schedule, recipe.lr, epoch_of)
            return LiveSchedule(schedule.name, schedule.arguments, path)
        if schedule.is_planned:
            return schedule
        arguments = (
            (name, live(value) if isinstance(value, Schedule) else value)
            for name, value in schedule.arguments
        )
        return replace(schedule, arguments=tuple(arguments))

    if recipe.schedule.is_planned:
        return recipe.schedule, ()
    schedule = live(recipe.schedule)
    if plateaus and not has_evaluations:
        raise RecipeError(
            f"schedule={recipe.schedule} follows evaluations, and the recipe has no evaluation "
            "data. Return Data(evaluation=...) from its data function, or use another schedule."
        )
    schedule.at(0, plan.total_steps)  # the class refuses its arguments now, before a step is taken
    return schedule, tuple(plateaus)


def observe_evaluation(
    plateaus: Sequence[Plateau], backend: Backend, step: int, evaluation: dict[str, float]
) -> None:
    """Pass an evaluation after `step` steps on to the schedules that follow it (collective).

    Every rank takes the values of rank 0, so that all have the same learning rate.

    Raises:
        RecipeError: The evaluation lacks the metric.
    """
    if not plateaus:
        return
    values = backend.broadcast(evaluation)
    for plateau in plateaus:
        plateau.observe(step, values)


@dataclass(frozen=True, repr=False)
class LiveSchedule(UnplannedSchedule):
    """An `UnplannedSchedule` whose `function` computes the value of a step in a run."""

    def at(self, step: int, total_steps: int) -> ScheduleValue:
        value: ScheduleValue = self.function(step, total_steps)
        return value

    @property
    def is_planned(self) -> bool:
        return True


class TorchPath:
    """The values of a `torch_schedule`, as a function of the step.

    Consecutive steps advance the class; an earlier one starts it again.

    Args:
        schedule: The schedule.
        lr: The learning rate of the optimizer that the class is given.
        epoch_of: Returns the epoch of a step.
    """

    def __init__(
        self, schedule: UnplannedSchedule, lr: float, epoch_of: Callable[[int], int]
    ) -> None:
        self._schedule, self._lr = schedule, lr
        self._epoch_of = epoch_of if dict(schedule.arguments).get("per") == "epoch" else None
        self._total_steps = 0
        self._times = 0
        """How often the class has been stepped."""
        self._optimizer: SGD | None = None
        self._scheduler: LRScheduler | None = None

    def __call__(self, step: int, total_steps: int) -> ScheduleValue:
        """Return the value of a step of a run of `total_steps` steps.

        Raises:
            RecipeError: The class raises an exception, or its learning rate is not finite.
        """
        times = step if self._epoch_of is None else self._epoch_of(step)
        try:
            if times < self._times or total_steps != self._total_steps:
                self._start(total_steps)
            while self._times < times:
                assert self._scheduler is not None
                self._scheduler.step()
                self._times += 1
        except Exception as error:
            raise RecipeError(
                f"schedule={self._schedule} has no learning rate for step {step + 1:,} of "
                f"{total_steps:,}: {error_line(error)}."
            ) from error
        assert self._optimizer is not None
        group = self._optimizer.param_groups[0]
        lr = float(group["lr"])
        if not math.isfinite(lr):
            raise RecipeError(
                f"schedule={self._schedule} has a learning rate that is not finite in step "
                f"{step + 1:,} of {total_steps:,}: {lr}."
            )
        momentum = float(group["momentum"]) if _cycles_momentum(self._scheduler) else None
        return ScheduleValue(lr / self._lr, momentum)

    def _start(self, total_steps: int) -> None:
        """Build the class anew, before its first step."""
        self._total_steps, self._times = total_steps, 0
        self._optimizer = SGD([torch.zeros(1)], lr=self._lr, momentum=_MOMENTUM)
        last = total_steps - 1
        count = total_steps if self._epoch_of is None else self._epoch_of(last) + 1
        self._scheduler = _build(self._schedule, self._optimizer, count)
        self._optimizer.step()  # without which the first step of a scheduler warns
        limit = getattr(self._scheduler, "total_steps", count)
        if limit < count:
            unit = "steps" if self._epoch_of is None else "epochs"
            raise RecipeError(
                f"it covers {limit:,} {unit}, and the run has {count:,}; leave total_steps out"
            )


class Plateau:
    """The values of a `plateau`: those of ReduceLROnPlateau after the evaluations so far.

    Args:
        schedule: The schedule.
        lr: The learning rate of the optimizer that the class is given.
    """

    def __init__(self, schedule: UnplannedSchedule, lr: float) -> None:
        arguments = {name: value for name, value in schedule.arguments if name != "metric"}
        self.goal = plateau_goal(schedule)
        """The metric that is followed."""
        self._lr, self._step = lr, 0
        self._optimizer = SGD([torch.zeros(1)], lr=lr)
        self._scheduler = lr_scheduler.ReduceLROnPlateau(
            self._optimizer, mode=self.goal.mode, **arguments
        )

    def __call__(self, step: int, total_steps: int) -> ScheduleValue:
        """Return the value of the next step, whatever its number."""
        return ScheduleValue(self._optimizer.param_groups[0]["lr"] / self._lr)

    def observe(self, step: int, evaluation: Mapping[str, float]) -> None:
        """Take an evaluation after `step` steps into account, unless that has been done.

        Raises:
            RecipeError: The evaluation lacks the metric.
        """
        if step <= self._step:
            return
        name = self.goal.name
        if name not in evaluation:
            if "/" in name and all("/" in other for other in evaluation):
                return  # another set was evaluated
            raise RecipeError(
                f"schedule=plateau(...) follows {name}, and the evaluation after step {step:,} "
                f"has {', '.join(evaluation)}."
            )
        self._scheduler.step(evaluation[name])
        self._step = step

    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint, as plain values."""
        scheduler = {name: self._scheduler.state_dict()[name] for name in _PLATEAU_STATE}
        lr = self._optimizer.param_groups[0]["lr"]
        return {
            "metric": str(self.goal),
            "step": self._step,
            "lr": lr,
            "peak_lr": self._lr,
            **scheduler,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a state.

        If the run was resumed with another `lr`, the reductions so far apply to that one. If it was
        resumed with another metric, only they are kept.
        """
        lr, peak_lr = state["lr"], state["peak_lr"]
        self._optimizer.param_groups[0]["lr"] = (
            lr if peak_lr == self._lr else lr / peak_lr * self._lr
        )
        self._step = state["step"]
        if state["metric"] == str(self.goal):
            self._scheduler.load_state_dict({name: state[name] for name in _PLATEAU_STATE})


def _build(schedule: UnplannedSchedule, optimizer: SGD, count: int) -> LRScheduler:
    """Return the scheduler that a `torch_schedule` describes.

    Args:
        schedule: The schedule.
        optimizer: The optimizer that it changes.
        count: Steps or epochs of the run.
    """
    arguments = dict(schedule.arguments)
    named = arguments.pop("scheduler")
    arguments.pop("per", None)
    kind = getattr(lr_scheduler, named) if isinstance(named, str) else named
    if "schedulers" in arguments:
        arguments["schedulers"] = [
            _build(part, optimizer, count) for part in arguments["schedulers"]
        ]
    if kind is lr_scheduler.CosineAnnealingLR:
        arguments.setdefault("T_max", count)
    if kind is lr_scheduler.OneCycleLR and "epochs" not in arguments:
        arguments.setdefault("total_steps", count)
    if kind in (lr_scheduler.OneCycleLR, lr_scheduler.CyclicLR):
        arguments.setdefault("max_lr", optimizer.defaults["lr"])
    built: LRScheduler = kind(optimizer=optimizer, **arguments)
    return built


def _cycles_momentum(scheduler: LRScheduler | None) -> bool:
    """Return whether a scheduler, or one of those that it combines, sets the momentum."""
    parts = getattr(scheduler, "_schedulers", [])
    return bool(getattr(scheduler, "cycle_momentum", False)) or any(map(_cycles_momentum, parts))
