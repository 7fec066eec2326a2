"""The training loop: one optimizer step on one screen, in the order the hardware does it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from launcher.analysis.gradient_noise import Measurement
from launcher.engine.backends.base import Backend
from launcher.engine.data.randomness import seed_step
from launcher.engine.data.reader import MicroBatch, Reader
from launcher.engine.data.sampler import Sampler
from launcher.engine.metrics.meter import Meter, MetricsBatch, NonFiniteGuard, RankFlags, StepRow
from launcher.engine.metrics.noise_meter import NoiseMeter, NullNoiseMeter
from launcher.engine.model.batch_norm import BatchNorms
from launcher.engine.model.forward_writes import ForwardWrites
from launcher.engine.state.hyperparameters import Hyperparameters
from launcher.errors import RecipeError
from launcher.planning.plan import Plan
from launcher.planning.stages import Window
from launcher.recipe.recipe import Recipe


class Callback(Protocol):
    """Hears what the loop measured, on every rank, in the order of the steps."""

    def on_micro_batches(self, step: int, micro_batches: list[MicroBatch]) -> None:
        """This rank has taken these in step number `step`."""

    def on_steps(self, rows: list[StepRow]) -> None:
        """Some steps were taken."""

    def on_noise(self, measurements: list[Measurement]) -> None:
        """The gradient noise was measured in some steps."""

    def on_warning(self, text: str) -> None:
        """Something is to be told, the same on every rank."""

    def on_note(self, step: int, values: Mapping[str, Any]) -> None:
        """Something else is known of what happened after `step` steps."""

    def on_evaluation(self, step: int, values: dict[str, float]) -> None:
        """The evaluation data was visited after `step` steps."""


@dataclass(frozen=True, kw_only=True)
class TrainContext:
    """All that the loop works on."""

    recipe: Recipe
    plan: Plan
    backend: Backend
    model: nn.Module
    optimizer: Optimizer
    num_trained: int
    """Weights that are trained, over all ranks."""

    sampler: Sampler
    reader: Reader
    """What has the samples."""

    batches: Iterator[MicroBatch]
    """This rank's micro-batches: those of the trial, if there is one, then training and evaluation
    in the order of `sampler.requests`."""

    norms: BatchNorms
    """Those of the model."""

    writes: ForwardWrites
    """Sees what forward passes write, and brings it together over the ranks."""

    report_phase: Callable[[int, str], None] = lambda *_: None
    """Is told how far this rank is: steps taken, and what comes next."""

    noise: NoiseMeter = field(default_factory=NullNoiseMeter)
    """Measures the gradient noise beside the steps."""


class StepController(Protocol):
    """Tends to the run between steps, where all ranks agree on what to do."""

    def is_due(self, step: int) -> bool:
        """Return whether it has something to do after `step` steps; the same on every rank."""

    def flags(self) -> RankFlags:
        """Return what this rank has to tell the others."""

    def on_step_end(self, step: int, flags: RankFlags) -> bool:
        """Do after `step` steps what the ranks' votes say; return whether to stop (collective)."""


@dataclass(frozen=True, kw_only=True)
class TrainOutcome:
    """How far `train` got."""

    step: int
    """Steps taken since the start of the run."""

    evaluation: dict[str, float]
    """Of the last step; empty where the run stopped before."""


def train(
    context: TrainContext,
    callback: Callback,
    controller: StepController | None = None,
    *,
    first_step: int = 0,
    last_step: int | None = None,
) -> TrainOutcome:
    """Take the steps from `first_step` to before `last_step`, or until asked to stop.

    Args:
        context: What to train.
        callback: Hears of the steps.
        controller: Tends to the run between steps; None lets it go.
        first_step: Steps that were taken before.
        last_step: Steps to have been taken when this returns; None is all that were planned.

    Raises:
        RecipeError: The recipe's loss does not return (sum, count).
        TrainingError: The losses of too many steps are not finite.
    """
    recipe, plan, backend = context.recipe, context.plan, context.backend
    model, optimizer, sampler = context.model, context.optimizer, context.sampler
    norms, writes, report_phase, noise = (
        context.norms,
        context.writes,
        context.report_phase,
        context.noise,
    )
    hyperparameters = Hyperparameters(optimizer, plan.lr)
    meter = Meter(backend)
    nonfinite_guard = NonFiniteGuard(recipe.max_bad_steps, lambda step: sampler.batch_ids(step - 1))
    values: dict[str, float] = {}
    model.train()
    norms.keep()
    last_step = plan.total_steps if last_step is None else last_step
    for step in range(first_step, last_step):
        # ------------------------------------------------------------------------------------
        seed_step(plan.seed, step, backend)
        written = hyperparameters.write(plan.setting_at(recipe.schedule, step))
        window, taken, waited = _read(context, step)
        items = _items(context, window.size, taken)
        weight = backend.world_size / items
        sums, counts = [], []
        noise.begin(step)
        writes.begin()
        for number, micro_batch in enumerate(taken, start=1):
            report_phase(step, "computing")
            batch = backend.to_device(micro_batch.batch)
            with (
                backend.micro_step(last=number == len(taken)),
                norms.taking(micro_batch.request),
                writes.taking(micro_batch.request),
            ):
                with backend.autocast():
                    loss_sum, count = sum_and_count(
                        recipe.loss, recipe.forward(model, batch), batch
                    )
                # Gradients are averaged over ranks: world_size in the weight makes that a sum.
                backend.backward(loss_sum, weight if micro_batch.counts else 0.0)
            noise.add_micro_batch(weight, count if micro_batch.counts else 0)
            if micro_batch.counts:
                sums.append(loss_sum.detach())
                counts.append(count)
        writes.end()
        grad_norm = backend.apply(optimizer, recipe.max_grad_norm)
        # ------------------------------------------------------------------------------------
        noise.end(step, items, grad_norm)
        callback.on_micro_batches(step + 1, taken)
        meter.add(
            step=step + 1,
            epoch=window.epoch + 1,
            samples=sampler.samples_before(step + 1),
            batch_samples=window.size,
            items=items,
            loss_sums=sums,
            counts=counts,
            lr=written.lr,
            momentum=written.momentum,
            grad_norm=grad_norm,
            data_wait_seconds=waited,
        )
        done = step + 1
        evaluates = sampler.evaluates_after(step)
        is_due = controller is not None and controller.is_due(done)
        if not (meter.is_due() or evaluates or is_due or done == last_step):
            continue
        batch_of_metrics = meter.read(_flags(controller), ends=done == last_step)
        _take_note(context, callback, batch_of_metrics, nonfinite_guard)
        if evaluates:
            values = evaluate(context, done)
            callback.on_evaluation(done, values)
        report_phase(done, "saving")
        if controller is not None and controller.on_step_end(done, batch_of_metrics.flags):
            return TrainOutcome(step=done, evaluation=values)
        meter.restart_clock()
    if first_step >= last_step and sampler.evaluation_samples:
        values = evaluate(context, last_step)  # it ended between the last step and the result
    report_phase(last_step, "finishing")
    return TrainOutcome(step=last_step, evaluation=values)


def _read(context: TrainContext, step: int) -> tuple[Window, list[MicroBatch], float]:
    """Return what a step takes, this rank's micro-batches of it, and the seconds of waiting."""
    context.report_phase(step, "reading data")
    asked = time.perf_counter()
    taken = [next(context.batches) for _ in range(context.sampler.micro_steps(step))]
    return context.sampler.window(step), taken, time.perf_counter() - asked


def _flags(controller: StepController | None) -> RankFlags:
    return RankFlags() if controller is None else controller.flags()


def _take_note(
    context: TrainContext,
    callback: Callback,
    batch_of_metrics: MetricsBatch,
    nonfinite_guard: NonFiniteGuard,
) -> None:
    """Tell the listener of steps that were taken, and of those that were left out.

    Raises:
        TrainingError: These were too many in a row.
    """
    callback.on_steps(batch_of_metrics.rows)
    callback.on_noise(context.noise.read())
    if batch_of_metrics.ranks is not None and batch_of_metrics.rows:
        callback.on_note(batch_of_metrics.rows[-1].step, {"ranks": batch_of_metrics.ranks})
    for said in nonfinite_guard.check(batch_of_metrics.rows):
        callback.on_warning(said)
    all_finite = all(row.is_finite for row in batch_of_metrics.rows)
    (context.norms.keep if all_finite else context.norms.restore_nonfinite)()


@torch.no_grad()
def evaluate(context: TrainContext, step: int) -> dict[str, float]:
    """Return loss and metrics over the evaluation data, each sample once (collective).

    Args:
        context: Its next micro-batches are those of an evaluation.
        step: Steps taken.
    """
    recipe, backend, model = context.recipe, context.backend, context.model
    functions = {"loss": recipe.loss, **recipe.metrics}
    totals = torch.zeros(len(functions), 2, dtype=torch.float64, device=backend.device)
    context.norms.average(backend)
    model.eval()
    for _ in range(context.sampler.evaluation_steps()):
        context.report_phase(step, "evaluating")
        micro_batch = next(context.batches)
        batch = backend.to_device(micro_batch.batch)
        with backend.autocast():
            outputs = recipe.forward(model, batch)
            found = [sum_and_count(each, outputs, batch) for each in functions.values()]
        if micro_batch.counts:
            totals += torch.stack([_pair(pair, backend.device) for pair in found])
    model.train()
    sums = backend.sum(totals).tolist()
    return {
        name: total / count if count else float("nan")
        for name, (total, count) in zip(functions, sums, strict=True)
    }


def sum_and_count(
    function: Callable[[Any, Any], Any], outputs: Any, batch: Any, *, name: str | None = None
) -> tuple[Any, int | Tensor]:
    """Call a loss or metric, which a message calls `name`, by default as the function is called.

    Raises:
        RecipeError: It returned something else than (sum, count).
    """
    returned = function(outputs, batch)
    if isinstance(returned, tuple) and len(returned) == 2:
        total, count = returned
        if isinstance(count, (int, Tensor)) and not (isinstance(total, Tensor) and total.ndim):
            return total, count
    name = name or getattr(function, "__name__", "a loss or metric")
    raise RecipeError(
        f"{name} returned {_describe(returned)}; expected (sum, count): the sum over the items of "
        "the batch as one number, as with reduction='sum', and how many items that were, such as "
        "len(targets)."
    )


def _describe(returned: Any) -> str:
    if isinstance(returned, tuple):
        return f"({', '.join(map(_describe, returned))})"
    if isinstance(returned, Tensor):
        return f"a tensor of shape {tuple(returned.shape)}"
    return f"a {type(returned).__name__}"


def _items(context: TrainContext, samples: int, taken: list[MicroBatch]) -> int | Tensor:
    """Return the items that the loss counts in a global batch of so many samples."""
    if context.recipe.count is None:
        return samples
    own = sum(micro_batch.items for micro_batch in taken)
    total = torch.tensor(float(own), dtype=torch.float64, device=context.backend.device)
    return context.backend.sum(total).clamp(min=1.0)


def _pair(pair: tuple[Any, Any], device: torch.device) -> Tensor:
    return torch.stack(
        [torch.as_tensor(number, dtype=torch.float64, device=device) for number in pair]
    )
