"""Measure the speed of a run, and plan as many steps as fit in its `max_time`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from launcher.engine.backends.base import Backend
from launcher.engine.data.sampler import EvaluationSchedule
from launcher.engine.metrics.meter import RankFlags
from launcher.engine.metrics.recorder import Recorder
from launcher.engine.training.checkpoint_manager import CheckpointManager, parse_interval
from launcher.engine.training.context import TrainContext
from launcher.errors import PlanError
from launcher.planning.global_batch import ceil_div
from launcher.planning.plan import Plan
from launcher.planning.timed_plan import timed_plan
from launcher.planning.timed_steps import (
    FEWEST_STEPS,
    LONGEST_PART,
    MEASURED_PART,
    Interruptions,
    TimeCosts,
    TimedSteps,
    fitting_steps,
    reserved_for_evaluation,
    seconds_needed,
)
from launcher.quantities import duration
from launcher.recipe.max_time import seconds_in
from launcher.recipe.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class SpeedMeasurement:
    """The steps of a run with `max_time`, and what was measured to plan them."""

    timed_steps: TimedSteps
    costs: TimeCosts
    used_seconds: float
    """Time from the start of the command to the measurement."""

    expected_seconds: float
    """Time from the start of the command to the result, as far as it can be foreseen."""

    def values(self) -> dict[str, Any]:
        """Return what was measured as JSON-compatible values."""
        timed_steps = self.timed_steps
        return {
            "step": timed_steps.first_step,
            "steps": timed_steps.steps,
            "limit": timed_steps.limit,
            "max_time": timed_steps.max_time,
            "seconds_per_step": self.costs.step,
            "used_seconds": self.used_seconds,
        }

    def text(self) -> str:
        """Return one line for the user."""
        steps, limit = self.timed_steps.steps, self.timed_steps.limit
        max_time, speed = self.timed_steps.max_time, f"{self.costs.step:.3g} s a step"
        late = self.expected_seconds - seconds_in(max_time)
        if late > 0:
            return (
                f"max_time={max_time} is too short for what a run does at its end, at {speed}: it "
                f"ends after {steps:,} steps, about {duration(late)} late. The limit was {limit:,}."
            )
        if steps == limit:
            return (
                f"all {limit:,} steps fit in {max_time} at {speed}: they take about "
                f"{duration(self.expected_seconds)}"
            )
        return f"{steps:,} steps in {max_time} at {speed}; the limit was {limit:,}"


def is_to_be_timed(plan: Plan, step: int) -> bool:
    """Return whether a run measures its speed to plan the steps after `step` for its `max_time`."""
    has_max_time = plan.settings.get("max_time") is not None
    return has_max_time and plan.timed_steps is None and step < plan.total_steps


def check_time_left(recipe: Recipe, backend: Backend, started: float) -> None:
    """Refuse a run whose `max_time` is over before its first step (collective).

    Args:
        recipe: The recipe, which has a `max_time`.
        backend: The ranks; the clock of rank 0 decides.
        started: `time.monotonic()` at the start of the command, on the machine of rank 0.

    Raises:
        PlanError: It is over.
    """
    assert recipe.max_time is not None
    used = backend.broadcast(time.monotonic() - started)
    if used >= seconds_in(recipe.max_time):
        raise PlanError(
            f"max_time={recipe.max_time} is over before the first step: the start of the run took "
            f"{duration(used)}. Give more time. No step was taken."
        )


class TimeBudget:
    """A `StepController` that measures the speed of the first steps, and then ends them.

    Everything else is left to the controller of the checkpoints. After its first step the run saves
    a checkpoint, which shows how long saving takes. The clock of rank 0 decides.

    Args:
        context: What is trained.
        manager: Saves the checkpoints and stops the run on request.
        recorder: Knows how long the steps have waited for data.
        started: `time.monotonic()` at the start of the command, on the machine of rank 0.
        clock: Returns the time in seconds.
    """

    def __init__(
        self,
        context: TrainContext,
        manager: CheckpointManager,
        recorder: Recorder,
        *,
        started: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        assert context.recipe.max_time is not None
        self._context, self._backend, self._recorder = context, context.backend, recorder
        self.manager = manager
        self._max_time = context.recipe.max_time
        self._seconds, self._started = seconds_in(self._max_time), started
        self._clock = clock
        # Objectives that skip steps are to have several turns among those that are measured.
        turns = [2 * each.every for each in context.recipe.objectives]
        self._fewest_steps = max([FEWEST_STEPS, *turns])
        self._peak_rates = [group["lr"] for group in context.optimizer.param_groups]
        self._left_at_start: float | None = None
        """Seconds that were left after the first step."""

        self._is_first_save = False
        """Whether the first checkpoint is being written, which slows the steps."""

        self._counted_from: tuple[int, float] = 0, 0.0
        """Step and time from which the present stretch of steps counts."""

        self._steps_ended = 0.0
        self._evaluation_began: float | None = None
        self._num_steps, self._step_seconds, self._wait_seconds = 0, 0.0, 0.0
        self._wait_before = 0.0
        self._seconds_per_evaluated: float | None = None
        """Seconds that the last evaluation took for each of its samples."""

        self.measurement: SpeedMeasurement | None = None
        """What was measured, on every rank, once the run is to end its first steps."""

    def is_due(self, step: int) -> bool:
        """Return whether a checkpoint is due after `step` steps; equal on every rank."""
        return self.manager.is_due(step)

    def flags(self) -> RankFlags:
        """Return the flags of this rank."""
        return self.manager.flags()

    def before_evaluation(self, step: int) -> None:
        """Prepare for an evaluation after `step` steps, and time it (collective)."""
        self._steps_ended = self._clock()
        self.manager.before_evaluation(step)
        self._evaluation_began = self._clock()

    def on_evaluation(self, step: int, values: Mapping[str, float]) -> None:
        """Receive the metrics of an evaluation after `step` steps, equal on every rank."""
        self.manager.on_evaluation(step, values)

    @property
    def has_ended(self) -> bool:
        """Whether the run has ended before its last step; equal on every rank."""
        return self.manager.has_ended

    def on_step_end(self, step: int, flags: RankFlags) -> bool:
        """Measure, leave the rest to the checkpoints' controller; return whether to stop."""
        now = self._clock()
        self._count(step, now)
        if self.manager.on_step_end(step, flags):
            return True
        if self._left_at_start is None:
            self._left_at_start = self._seconds - self._used()
            self.manager.save(step)
            self._is_first_save = True
        if self._is_first_save and not self.manager.is_writing:
            self._is_first_save = False
            self._num_steps, self._step_seconds, self._wait_seconds = 0, 0.0, 0.0
        self._wait_before = self._recorder.data_wait_seconds
        self._counted_from = step, self._clock()
        limit = self._context.plan.total_steps
        if step >= limit or not self._backend.broadcast(self._is_measured()):
            return False
        # The stream of samples is ahead of the steps, by a different number on each node.
        requested = max(self._backend.gather(self._context.horizon.requested))
        self.measurement = self._backend.broadcast(self._measure(step, max(requested, step + 1)))
        return True

    def planned(self, measurement: SpeedMeasurement) -> TrainContext:
        """Return what is trained from now on: the same, with the steps that were planned."""
        context, timed_steps = self._context, measurement.timed_steps
        plan = timed_plan(context.plan, context.recipe, timed_steps)
        context.horizon.last_step = timed_steps.steps
        for group, rate in zip(context.optimizer.param_groups, self._peak_rates, strict=True):
            group["lr"] = rate  # as in a new optimizer, from which the loop takes the groups' rates
        context = replace(
            context, plan=plan, sampler=replace(context.sampler, plan=plan), missed_evaluations=()
        )
        self.manager.adopt(context)
        if context.averages is not None:
            context.averages.adopt(plan)
        return context

    def _used(self) -> float:
        return self._clock() - self._started

    def _count(self, step: int, now: float) -> None:
        """Add the steps, and the evaluation, since the last call; the first step does not count."""
        began, self._evaluation_began = self._evaluation_began, None
        if began is not None:
            sets = self._context.sampler.evaluations_after(step - 1)
            self._seconds_per_evaluated = (now - began) / max(_num_samples(sets), 1)
        if self._left_at_start is None:
            return
        first_step, since = self._counted_from
        self._num_steps += step - first_step
        self._step_seconds += (now if began is None else self._steps_ended) - since
        self._wait_seconds += self._recorder.data_wait_seconds - self._wait_before

    def _is_measured(self) -> bool:
        """Return whether the speed is known well enough, by the clock of this rank."""
        if not self._num_steps:
            return False
        is_enough = (
            self._num_steps >= self._fewest_steps
            and self._step_seconds >= MEASURED_PART * self._seconds
            and not self._is_first_save
        )
        assert self._left_at_start is not None
        passed = self._left_at_start - (self._seconds - self._used())
        return is_enough or passed >= LONGEST_PART * self._left_at_start

    def _measure(self, step: int, fewest: int) -> SpeedMeasurement:
        """Return the steps that fit in the time that is left after `step` steps.

        Args:
            step: Steps taken.
            fewest: The smallest number of steps that the run can still have.
        """
        costs, interruptions, used = self._costs(), self._interruptions(), self._used()
        limit = self._context.plan.total_steps
        fitting = fitting_steps(self._seconds - used, step, limit, costs, interruptions)
        steps = min(max(fitting, fewest), limit)
        return SpeedMeasurement(
            timed_steps=TimedSteps(
                max_time=self._max_time, limit=limit, first_step=step, steps=steps
            ),
            costs=costs,
            used_seconds=used,
            expected_seconds=used + seconds_needed(step, steps, costs, interruptions),
        )

    def _costs(self) -> TimeCosts:
        """Return what was measured, and what is reserved for what was not."""
        plan, samples = self._context.plan, _num_samples(self._context.sampler.evaluations)
        step_seconds = self._step_seconds / self._num_steps
        if self._seconds_per_evaluated is not None:
            evaluation = samples * self._seconds_per_evaluated
        else:
            wait_seconds = self._wait_seconds / self._num_steps
            evaluation = reserved_for_evaluation(
                samples, plan.batch_size, step_seconds, wait_seconds
            )
        saving = self.manager.costs
        stall, writing = saving.stall_seconds or 0.0, saving.seconds or 0.0
        # Rank 0 writes all weights by itself, at the speed of its part of the checkpoint.
        weights = writing * self._weight_bytes() / saving.num_bytes if saving.num_bytes else 0.0
        return TimeCosts(
            step=step_seconds,
            evaluation=evaluation,
            checkpoint=stall,
            end=stall + writing + weights,
        )

    def _weight_bytes(self) -> int:
        kinds = self._backend.weight_kinds(self._context.model).values()
        return sum(math.prod(kind.size) * kind.dtype.itemsize for kind in kinds)

    def _interruptions(self) -> Interruptions:
        plan, recipe = self._context.plan, self._context.recipe
        sampler = self._context.sampler
        steps_of = {
            "epoch": ceil_div(sampler.train_samples, plan.batch_size),
            "end": plan.total_steps,
        }
        intervals = [
            every if isinstance(every, int) else steps_of[every]
            for every in (each.every for each in sampler.evaluations)
        ]
        save_every_steps, save_every_seconds = parse_interval(recipe.checkpoint_every)
        return Interruptions(
            evaluate_every=min(intervals, default=None),
            save_every_steps=save_every_steps,
            save_every_seconds=save_every_seconds,
            quick_every_steps=recipe.quick_checkpoint_every,
        )


def _num_samples(evaluations: Iterable[EvaluationSchedule]) -> int:
    return sum(each.samples for each in evaluations)
