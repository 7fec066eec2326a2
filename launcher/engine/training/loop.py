"""The training loop: one optimizer step on one screen, in the order the hardware executes it."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from launcher.analysis.gradient_noise import Measurement
from launcher.engine.backends.base import Backend
from launcher.engine.backends.nested_tensors import describe_argument
from launcher.engine.backends.transfers import upload, upload_scalar
from launcher.engine.data.randomness import ModelRandomness
from launcher.engine.data.reader import MicroBatch, Reader
from launcher.engine.data.sampler import EvaluationSchedule, Horizon, Sampler
from launcher.engine.metrics.collected_metrics import CollectedMetrics
from launcher.engine.metrics.logged_numbers import LoggedNumbers
from launcher.engine.metrics.meter import (
    Meter,
    MetricsBatch,
    NonFiniteGuard,
    RankFlags,
    StepLosses,
    TurnMeasurements,
)
from launcher.engine.metrics.metric_calls import metric_call
from launcher.engine.metrics.noise_meter import NoiseMeter, NullNoiseMeter
from launcher.engine.model.averages import Averages
from launcher.engine.model.batch_norm import BatchNorms
from launcher.engine.model.forward_writes import ForwardWrites
from launcher.engine.state.hyperparameters import Hyperparameters
from launcher.engine.training.data_watch import DataWatch
from launcher.engine.training.live_schedules import Plateau, observe_evaluation
from launcher.engine.training.objectives import TrainedObjective
from launcher.errors import RecipeError
from launcher.planning.plan import Plan
from launcher.planning.stages import Window
from launcher.planning.virtual_ranks import virtual_rank_of
from launcher.printable import kind_of
from launcher.recipe.evaluation_sets import metric_name, split_of, title_of
from launcher.recipe.function_checks import SUM_AND_COUNT, called_with, note_call
from launcher.recipe.prediction_metric import sum_metrics
from launcher.recipe.recipe import Recipe
from launcher.runs.step_row import StepRow


class Listener(Protocol):
    """Receives what the loop measures, on every rank, in the order of the steps."""

    def on_micro_batches(self, step: int, micro_batches: list[MicroBatch]) -> None:
        """Receive the micro-batches that this rank took in step number `step`, counted from 1."""

    def on_steps(self, rows: list[StepRow]) -> None:
        """Receive the measurements of the steps since the last call, equal on every rank."""

    def on_noise(self, measurements: list[Measurement]) -> None:
        """Receive the gradient noise measured in some of these steps, equal on every rank."""

    def on_warning(self, text: str) -> None:
        """Receive a warning for the user, equal on every rank."""

    def on_values(self, step: int, values: Mapping[str, Any]) -> None:
        """Receive further named values that were measured after `step` steps."""

    def on_evaluation(self, step: int, values: dict[str, float]) -> None:
        """Receive loss and metrics over the evaluation data after `step` steps."""


@dataclass(frozen=True, kw_only=True)
class TrainContext:
    """Everything that the training loop works on, on one rank."""

    recipe: Recipe
    plan: Plan
    backend: Backend
    model: nn.Module
    """The module that `Backend.forward` takes, as `Backend.prepare` returned it."""

    optimizer: Optimizer
    num_trained: int
    """Number of trainable weights of the whole model, over all ranks."""

    sampler: Sampler
    reader: Reader
    """Holds the data and reads samples from it."""

    micro_batches: Iterator[MicroBatch]
    """This rank's micro-batches: those of the trial, if there is one, followed by those of training
    and evaluation in the order of `sampler.requests`."""

    horizon: Horizon
    """The end of the stream of micro-batches."""

    batch_norms: BatchNorms
    """The BatchNorm modules of the model."""

    forward_writes: ForwardWrites
    """Detects weights and buffers that forward passes write to, and combines them over ranks."""

    report_phase: Callable[[int, str], None] = lambda *_: None
    """Called with (steps taken, phase) whenever this rank enters a phase; the watchdog uses it."""

    collected: CollectedMetrics
    """The metrics that need all predictions of an evaluation."""

    noise_meter: NoiseMeter = field(default_factory=NullNoiseMeter)
    """Measures the gradient noise beside the steps."""

    averages: Averages | None = None
    """The average of the weights over the steps; None without `Recipe.averaging`."""

    plateaus: tuple[Plateau, ...] = ()
    """The parts of the schedule that follow evaluations."""

    missed_evaluations: tuple[EvaluationSchedule, ...] = ()
    """The sets whose evaluation precedes the first step: the run was to evaluate them after its
    checkpoint, and has not recorded that."""

    data_watch: DataWatch | None = None
    """Observes what is read; None if there is nothing to observe."""

    before_step: tuple[Callable[[int], None], ...] = ()
    """Called with the number of steps taken before each step."""

    @contextlib.contextmanager
    def evaluated_weights(self) -> Iterator[None]:
        """Let the model have the weights that are evaluated and exported (collective).

        They are the averages, if the recipe or its optimizer averages the weights.
        """
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.backend.evaluated_weights(self.model, self.optimizer))
            if self.averages is not None:
                stack.enter_context(self.averages.evaluated())
            yield

    objectives: tuple[TrainedObjective, ...] = ()
    """The objectives in the order of their turns; empty if the recipe has one loss."""

    def in_turns(self) -> tuple[TrainedObjective, ...]:
        """Return the objectives in the order of their turns, of which a recipe may have one."""
        only = TrainedObjective(
            name="",
            number=0,
            every=1,
            recipe=self.recipe,
            lr=self.plan.lr,
            backend=self.backend,
            model=self.model,
            optimizer=self.optimizer,
            forward_writes=self.forward_writes,
            noise_meter=self.noise_meter,
        )
        return self.objectives or (only,)


class StepController(Protocol):
    """Acts between steps on flags that all ranks have exchanged, and may stop the run."""

    def is_due(self, step: int) -> bool:
        """Return whether the ranks must exchange flags after `step` steps; equal on every rank."""

    def flags(self) -> RankFlags:
        """Return the flags of this rank."""

    def before_evaluation(self, step: int) -> None:
        """Prepare for an evaluation after `step` steps, which may fail (collective)."""

    def on_evaluation(self, step: int, values: Mapping[str, float]) -> None:
        """Receive the metrics of an evaluation after `step` steps, equal on every rank."""

    @property
    def has_ended(self) -> bool:
        """Whether the run has ended before its last step; equal on every rank."""

    def on_step_end(self, step: int, flags: RankFlags) -> bool:
        """Act on the summed flags after `step` steps; return whether to stop (collective)."""


@dataclass(frozen=True, kw_only=True)
class TrainOutcome:
    """Where `train` ended."""

    step: int
    """Steps taken since the start of the run."""

    evaluation: dict[str, float]
    """Loss and metrics of the last evaluation; empty if there was none."""


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
    sampler, batch_norms, report_phase = (
        context.sampler,
        context.batch_norms,
        context.report_phase,
    )
    objectives = [_Training(objective) for objective in context.in_turns()]
    main = next(each.objective.name for each in objectives if each.objective.every == 1)
    nonfinite_guard = NonFiniteGuard(
        context.recipe.max_bad_steps, lambda step: sampler.batch_ids(step - 1)
    )
    context.model.train()
    batch_norms.save_statistics()
    evaluation = _run_evaluation(
        context, listener, first_step, context.missed_evaluations, controller
    )
    meter = Meter(context.backend)
    last_step = _find_last_step(context, controller, first_step, last_step)
    for step in range(first_step, last_step):
        # ------------------------------------------------------------------------------------
        window, micro_batches, data_wait_seconds = _begin_step(context, step)
        num_items = _count_items(context, window.size, micro_batches)
        turns = [
            _take_turn(context, each, meter.logged, step, micro_batches, num_items)
            for each in objectives
            if step % each.objective.every == 0
        ]
        if context.averages is not None:
            context.averages.update(step + 1)
        # ------------------------------------------------------------------------------------
        listener.on_micro_batches(step + 1, micro_batches)
        main_turn = next(turn for turn in turns if turn.name == main)
        meter.add(
            step=step + 1,
            epoch=window.epoch + 1,
            samples=sampler.samples_before(step + 1),
            batch_samples=window.size,
            items=num_items,
            losses=main_turn.losses,
            lr=main_turn.lr,
            momentum=main_turn.momentum,
            grad_norm=main_turn.grad_norm,
            data_wait_seconds=data_wait_seconds,
            turns=turns if context.objectives else (),
        )
        steps_taken = step + 1
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


class _Training:
    """An objective with what changes from turn to turn.

    Args:
        objective: The objective, whose optimizer is new or restored.
    """

    def __init__(self, objective: TrainedObjective) -> None:
        self.objective = objective
        self.hyperparameters = Hyperparameters(objective.optimizer, objective.lr)
        self.randomness = ModelRandomness(objective.backend, objective.number)
        self.loss_name = f"The loss of the objective {objective.name}" if objective.name else LOSS


def _take_turn(
    context: TrainContext,
    training: _Training,
    logged: LoggedNumbers,
    step: int,
    micro_batches: list[MicroBatch],
    num_items: int | Tensor,
) -> TurnMeasurements:
    """Take the step of one objective on the global batch of a step (collective).

    Args:
        context: What is trained.
        training: The objective; its parameters alone change.
        logged: Receives what its loss and forward log.
        step: The step, counted from 0.
        micro_batches: This rank's micro-batches of the batch.
        num_items: Items of the batch.
    """
    objective, randomness = training.objective, training.randomness
    recipe, backend, model = objective.recipe, objective.backend, objective.model
    noise_meter, forward_writes = objective.noise_meter, objective.forward_writes
    if objective.begin is not None:
        objective.begin()
    randomness.begin_step(step)
    schedule_value = context.plan.schedule_value_at(recipe.schedule, step)
    written = training.hyperparameters.write(schedule_value)
    weight = backend.divisor / num_items
    losses = StepLosses()
    noise_meter.begin(step)
    forward_writes.begin()
    for number, micro_batch in enumerate(micro_batches, start=1):
        context.report_phase(step, "computing")
        batch, request = backend.to_device(micro_batch.batch), micro_batch.request
        randomness.begin_part(step, request.part)
        with (
            backend.micro_step(last=number == len(micro_batches), part=request.part),
            context.batch_norms.micro_batch_context(request),
            forward_writes.micro_batch_context(request),
        ):
            with backend.autocast(), logged.of(micro_batch, objective.name):
                loss_sum, count = training_loss(
                    recipe.loss,
                    backend.forward(recipe.forward, model, batch),
                    batch,
                    training.loss_name,
                )
            # Gradients are averaged over ranks; the divisor in the weight makes that a sum.
            backend.backward(loss_sum, weight if micro_batch.has_weight else 0.0)
        noise_meter.add_micro_batch(weight, count if micro_batch.has_weight else 0, request.part)
        if micro_batch.has_weight:
            losses.add(loss_sum.detach(), count, request.part)
    forward_writes.end()
    randomness.end_step()
    grad_norm = backend.apply(objective.optimizer, recipe.max_grad_norm)
    noise_meter.end(step, num_items, grad_norm)
    return TurnMeasurements(objective.name, losses, written.lr, written.momentum, grad_norm)


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

    BatchNorm statistics that a skipped step has made non-finite are restored.

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
    if all(row.is_finite for row in metrics.rows):
        context.batch_norms.save_statistics()
    else:
        context.batch_norms.restore_nonfinite()


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


@torch.no_grad()
def evaluate(
    context: TrainContext, step: int, schedules: Iterable[EvaluationSchedule]
) -> dict[str, float]:
    """Return loss and metrics over evaluation sets, each sample visited once (collective).

    Args:
        context: Its next micro-batches must be those of an evaluation of these sets.
        step: Number of steps taken.
        schedules: The sets.

    Returns:
        The mean of each over its items, by name, such as `loss` or, of several sets, `dev/loss`;
        NaN where nothing was counted.
    """
    context.batch_norms.average(context.backend)
    context.model.eval()
    values: dict[str, float] = {}
    with context.evaluated_weights():
        for schedule in schedules:
            means = _evaluate_set(context, step, schedule)
            values |= {metric_name(schedule.name, name): mean for name, mean in means.items()}
    context.model.train()
    return values


def _evaluate_set(
    context: TrainContext, step: int, schedule: EvaluationSchedule
) -> dict[str, float]:
    """Return loss and metrics over one evaluation set, by name (collective)."""
    recipe, backend, collected = context.recipe, context.backend, context.collected
    functions = {"The recipe's loss": recipe.loss}
    functions |= {f"The metric {name}": each for name, each in sum_metrics(recipe.metrics).items()}
    # Exact runs add what each virtual rank counts in an order that does not depend on the ranks.
    num_parts = context.plan.distribution.count if context.plan.exact else 1
    totals = torch.zeros(num_parts, len(functions), 2, dtype=torch.float64, device=backend.device)
    title = title_of(split_of(schedule.name))
    place = f"the {title} after step {step:,}, on rank {backend.rank}"
    collected.begin(place)
    for _ in range(context.sampler.evaluation_steps(schedule)):
        context.report_phase(step, "evaluating")
        micro_batch = next(context.micro_batches)
        if context.data_watch is not None:
            context.data_watch.add(step, [micro_batch])
        batch = backend.to_device(micro_batch.batch)
        with backend.autocast():
            outputs = backend.forward(recipe.forward, context.model, batch)
            pairs = []
            for name, function in functions.items():
                with metric_call(name, place):
                    pairs.append(sum_and_count(function, outputs, batch, name=name))
        if micro_batch.has_weight:
            part = virtual_rank_of(micro_batch.request.part) if context.plan.exact else 0
            totals[part] += torch.stack([upload(pair, backend.device) for pair in pairs])
        collected.add(outputs, batch, micro_batch.request)
    means = {}
    parts = backend.read(backend.sum_samples(totals))
    names = ["loss", *sum_metrics(recipe.metrics)]
    for name, sums in zip(names, zip(*parts, strict=True), strict=True):
        total, count = (math.fsum(values) for values in zip(*sums, strict=True))
        means[name] = total / count if count else float("nan")
    return means | collected.results()


LOSS = "The recipe's loss"
"""What error messages call the loss."""


def name_of(metric: str) -> str:
    """Return what error messages call a metric, or the loss."""
    return LOSS if metric == "loss" else f"The metric {metric}"


def sum_and_count(
    function: Callable[[Any, Any], Any], outputs: Any, batch: Any, *, name: str
) -> tuple[Any, int | Tensor]:
    """Call a loss or metric and return its (sum, count).

    Args:
        function: The loss or metric.
        outputs: What the recipe's `forward` returned.
        batch: The batch on this rank's device.
        name: Name for error messages, such as `The metric accuracy`.

    Raises:
        RecipeError: The function did not return (sum, count).
    """
    try:
        returned = function(outputs, batch)
    except Exception as error:
        note_call(error, name, **_described(outputs, batch))
        raise
    if isinstance(returned, tuple) and len(returned) == 2:
        total, count = returned
        is_count = isinstance(count, int) or (isinstance(count, Tensor) and not count.ndim)
        if is_count and not (isinstance(total, Tensor) and total.ndim):
            return total, count
    raise RecipeError(
        f"{name} returned {_describe(returned)}; expected {SUM_AND_COUNT}. "
        f"{called_with(name, **_described(outputs, batch))}"
    )


def training_loss(
    loss: Callable[[Any, Any], Any], outputs: Any, batch: Any, name: str = LOSS
) -> tuple[Tensor, int | Tensor]:
    """Call the loss in training and return its (sum, count).

    Args:
        loss: The loss.
        outputs: What the recipe's `forward` returned.
        batch: The batch on this rank's device.
        name: Name of the loss for error messages.

    Raises:
        RecipeError: The loss did not return (sum, count), or the sum has no gradient.
    """
    total, count = sum_and_count(loss, outputs, batch, name=name)
    if isinstance(total, Tensor) and total.requires_grad:
        return total, count
    found = "a tensor without a gradient" if isinstance(total, Tensor) else kind_of(total)
    only = "" if name == LOSS else " It must depend on the objective's own parameters."
    raise RecipeError(
        f"{name} returned ({found}, count), from which no gradient can be computed. "
        "Return the sum as a tensor that is computed from the outputs of the model, without "
        f".item(), .detach() or torch.no_grad() in the loss and in forward.{only} "
        f"{called_with(name, **_described(outputs, batch))}"
    )


def _described(outputs: Any, batch: Any) -> dict[str, str]:
    return {"outputs": describe_argument(outputs), "batch": describe_argument(batch)}


def _describe(returned: Any) -> str:
    if isinstance(returned, tuple):
        return f"({', '.join(map(_describe, returned))})"
    if isinstance(returned, Tensor):
        return f"a tensor of shape {tuple(returned.shape)}"
    return kind_of(returned)
