"""The training loop: one optimizer step on one screen, in the order the hardware executes it."""

from __future__ import annotations

import time

from torch import Tensor

from launcher.engine.backends.transfers import upload_scalar
from launcher.engine.data.micro_batch import MicroBatch
from launcher.engine.data.randomness import ModelRandomness
from launcher.engine.data.sampler import EvaluationSchedule
from launcher.engine.metrics.logged_numbers import LoggedNumbers
from launcher.engine.metrics.meter import Meter, MetricsBatch, RankFlags
from launcher.engine.metrics.nonfinite_guard import NonFiniteGuard
from launcher.engine.metrics.step_measurements import (
    MicroBatchLoss,
    StepMeasurements,
    TurnMeasurements,
)
from launcher.engine.state.hyperparameters import Hyperparameters
from launcher.engine.training.context import Listener, StepController, TrainContext, TrainOutcome
from launcher.engine.training.evaluation import evaluate
from launcher.engine.training.live_schedules import observe_evaluation
from launcher.engine.training.loss_calls import LOSS, training_loss
from launcher.engine.training.objectives import TrainedObjective
from launcher.planning.stages import Window


def train(
    context: TrainContext,
    listener: Listener,
    controller: StepController | None = None,
    *,
    first_step: int = 0,
    last_step: int | None = None,
) -> TrainOutcome:
    """Train from `first_step` up to, but not including, `last_step`, or until stopped (collective).

    Args:
        context: What to train.
        listener: Receives the measurements.
        controller: Acts between steps and may stop the run; None never stops it.
        first_step: Number of steps that were taken before.
        last_step: Number of steps that have been taken at the end; None takes all planned steps.

    Raises:
        RecipeError: The recipe's loss or a metric does not return (sum, count), or the loss counts
            a different number of items than the batch holds.
        TrainingError: The loss or gradient was not finite in too many consecutive steps.
    """
    sampler, report_phase = context.sampler, context.report_phase
    objectives = [_Objective(context, each) for each in context.in_turns()]
    main = next(each.name for each in objectives if each.every == 1)
    nonfinite_guard = NonFiniteGuard(
        context.recipe.max_bad_steps, lambda step: sampler.batch_ids(step - 1)
    )
    context.model.train()
    evaluation = _run_evaluation(
        context, listener, first_step, context.missed_evaluations, controller
    )
    meter = Meter(context.backend)
    last_step = _find_last_step(context, controller, first_step, last_step)
    for step in range(first_step, last_step):
        # ------------------------------------------------------------------------------------
        window, micro_batches, data_wait_seconds = _begin_step(context, step)
        num_items = _count_items(context, window.size, micro_batches)
        turns = {
            each.name: each.take_turn(step, micro_batches, num_items, meter.logged)
            for each in objectives
            if step % each.every == 0
        }
        steps_taken = step + 1
        if context.averages is not None:
            context.averages.update(steps_taken)
        # ------------------------------------------------------------------------------------
        listener.on_micro_batches(steps_taken, micro_batches)
        meter.add(
            StepMeasurements(
                step=steps_taken,
                window=window,
                samples=sampler.samples_before(steps_taken),
                items=num_items,
                data_wait_seconds=data_wait_seconds,
                main=turns[main],
                logged=meter.logged.take(),
                turns=tuple(turns.values()) if context.objectives else (),
            )
        )
        evaluated = sampler.evaluations_after(step)
        is_due = controller is not None and controller.is_due(steps_taken)
        if not (meter.is_due() or evaluated or is_due or steps_taken == last_step):
            continue
        metrics = meter.read(
            RankFlags() if controller is None else controller.flags(),
            is_last=steps_taken == last_step,
        )
        _report_metrics(context, listener, metrics, nonfinite_guard)
        with meter.paused():
            if evaluated:
                evaluation = _run_evaluation(context, listener, steps_taken, evaluated, controller)
            report_phase(steps_taken, "saving")
            if controller is not None and controller.on_step_end(steps_taken, metrics.flags):
                return TrainOutcome(step=steps_taken, evaluation=evaluation)
    if first_step >= last_step and sampler.evaluations and not context.missed_evaluations:
        # The run was interrupted between its last evaluation and its result.
        evaluation = evaluate(context, last_step, sampler.evaluations)
    report_phase(last_step, "finishing")
    return TrainOutcome(step=last_step, evaluation=evaluation)


class _Objective:
    """Takes the turns of one objective, of which a recipe with one loss has one in each step.

    Args:
        context: What is trained.
        objective: The objective, whose optimizer is new or restored.
    """

    def __init__(self, context: TrainContext, objective: TrainedObjective) -> None:
        self._context, self._objective = context, objective
        self.name, self.every = objective.name, objective.every
        self._hyperparameters = Hyperparameters(objective.optimizer, objective.lr)
        self._randomness = ModelRandomness(objective.backend, objective.number)
        self._loss_name = f"The loss of the objective {self.name}" if self.name else LOSS

    def take_turn(
        self,
        step: int,
        micro_batches: list[MicroBatch],
        num_items: int | Tensor,
        logged: LoggedNumbers,
    ) -> TurnMeasurements:
        """Change the parameters of the objective by one optimizer step (collective).

        Args:
            step: The step, counted from 0.
            micro_batches: This rank's micro-batches of the global batch.
            num_items: Items of the global batch.
            logged: Receives what loss and forward log.
        """
        context, objective, randomness = self._context, self._objective, self._randomness
        recipe, backend, model = objective.recipe, objective.backend, objective.model
        noise_meter, forward_writes = objective.noise_meter, objective.forward_writes
        if objective.begin is not None:
            objective.begin()
        randomness.begin_step(step)
        lr, momentum = self._hyperparameters.write(
            context.plan.schedule_value_at(recipe.schedule, step)
        )
        weight = backend.divisor / num_items
        losses: list[MicroBatchLoss] = []
        noise_meter.begin(step)
        forward_writes.begin()
        context.batch_norms.begin_step()
        for number, micro_batch in enumerate(micro_batches, start=1):
            context.report_phase(step, "computing")
            request = micro_batch.request
            part, has_weight = request.part, request.has_weight
            batch = backend.to_device(micro_batch.batch)
            randomness.begin_part(step, part)
            with (
                backend.micro_step(last=number == len(micro_batches), part=part),
                context.batch_norms.micro_batch_context(request),
                forward_writes.micro_batch_context(request),
            ):
                with backend.autocast(), logged.of(request, self.name):
                    outputs = backend.forward(recipe.forward, model, batch)
                    loss, count = training_loss(recipe.loss, outputs, batch, self._loss_name)
                # Gradients are averaged over ranks; the divisor in the weight makes that a sum.
                backend.backward(loss, weight if has_weight else 0.0)
            noise_meter.add_micro_batch(weight, count if has_weight else 0, part)
            if has_weight:
                losses.append(MicroBatchLoss(loss.detach(), count, part))
        forward_writes.end()
        context.batch_norms.end_step()
        randomness.end_step()
        grad_norm = backend.apply(objective.optimizer, recipe.max_grad_norm)
        noise_meter.end(step, num_items, grad_norm)
        return TurnMeasurements(losses, lr, momentum, grad_norm, self.name)


def _find_last_step(
    context: TrainContext, controller: StepController | None, first_step: int, last_step: int | None
) -> int:
    """Return the number of steps at the end: no further ones if the run has ended already."""
    if controller is not None and controller.has_ended:
        return first_step
    return context.plan.total_steps if last_step is None else last_step


def _begin_step(context: TrainContext, step: int) -> tuple[Window, list[MicroBatch], float]:
    """Call what is to precede a step, and read its samples.

    Returns:
        The global batch of the step, this rank's micro-batches, and the seconds of waiting.
    """
    for call in context.before_step:
        call(step)
    context.report_phase(step, "reading data")
    started = time.perf_counter()
    num_micro_batches = context.sampler.micro_steps(step)
    micro_batches = [next(context.micro_batches) for _ in range(num_micro_batches)]
    if context.data_watch is not None:
        context.data_watch.add(step + 1, micro_batches)
    return context.sampler.window(step), micro_batches, time.perf_counter() - started


def _count_items(
    context: TrainContext, num_samples: int, micro_batches: list[MicroBatch]
) -> int | Tensor:
    """Return the number of items that the loss counts in the global batch (collective).

    Args:
        context: What is trained; without `recipe.count`, items are samples, of which some may be
            left out with bad_samples=skip.
        num_samples: Samples of the global batch.
        micro_batches: This rank's micro-batches.
    """
    if context.recipe.count is None and context.recipe.bad_samples == "stop":
        return num_samples
    own_items = sum(micro_batch.items for micro_batch in micro_batches)
    items = upload_scalar(own_items, context.backend.device)
    return context.backend.sum_samples(items).clamp(min=1.0)


def _report_metrics(
    context: TrainContext,
    listener: Listener,
    metrics: MetricsBatch,
    nonfinite_guard: NonFiniteGuard,
) -> None:
    """Pass measurements on to the listener, with a warning for each skipped step.

    Raises:
        TrainingError: Too many consecutive steps were skipped.
    """
    listener.on_steps(metrics.rows)
    if metrics.rows:
        _exchange_on_data(context, listener, metrics.rows[-1].step)
    listener.on_noise(context.noise_meter.read())
    if metrics.ranks is not None and metrics.rows:
        listener.on_values(metrics.rows[-1].step, {"ranks": metrics.ranks})
    for warning in nonfinite_guard.check(metrics.rows):
        listener.on_warning(warning)


def _exchange_on_data(context: TrainContext, listener: Listener, step: int) -> None:
    """Exchange what the ranks have observed about their data up to a step (collective).

    Raises:
        TrainingError: Ranks read different streams, or too many samples are bad.
    """
    if context.data_watch is None:
        return
    values, warnings = context.data_watch.exchange(step)
    if values:
        listener.on_values(step, values)
    for text in warnings:
        listener.on_warning(text)


def _run_evaluation(
    context: TrainContext,
    listener: Listener,
    step: int,
    schedules: tuple[EvaluationSchedule, ...],
    controller: StepController | None = None,
) -> dict[str, float]:
    """Evaluate sets after `step` steps, pass the values on, and return them (collective)."""
    if not schedules:
        return {}
    if controller is not None:
        context.report_phase(step, "saving")
        controller.before_evaluation(step)
    evaluation = evaluate(context, step, schedules)
    _exchange_on_data(context, listener, step)
    observe_evaluation(context.plateaus, context.backend, step, evaluation)
    listener.on_evaluation(step, evaluation)
    if controller is not None:
        controller.on_evaluation(step, evaluation)
    return evaluation
