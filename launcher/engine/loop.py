"""The training loop: one optimizer step on one screen, in the order the hardware does it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from launcher.engine.backends.base import Backend
from launcher.engine.batch_norm import BatchNorms
from launcher.engine.data import MicroBatch
from launcher.engine.metrics import Meter, StepRow, check_finite
from launcher.engine.optimizers import Hyperparameters
from launcher.engine.randomness import seed_step
from launcher.engine.sampler import Sampler
from launcher.errors import RecipeError
from launcher.plan import Plan
from launcher.recipe import Recipe


class Listener(Protocol):
    """Hears what the loop measured, on every rank, in the order of the steps."""

    def took(self, step: int, micro_batches: list[MicroBatch]) -> None:
        """This rank has taken these in step number `step`."""

    def stepped(self, rows: list[StepRow]) -> None:
        """Some steps were taken."""

    def evaluated(self, step: int, values: dict[str, float]) -> None:
        """The evaluation data was visited after `step` steps."""


@dataclass(frozen=True, kw_only=True)
class Trainee:
    """All that the loop works on."""

    recipe: Recipe
    plan: Plan
    backend: Backend
    model: nn.Module
    optimizer: Optimizer
    sampler: Sampler
    batches: Iterator[MicroBatch]
    """This rank's micro-batches, training and evaluation, in the order of `sampler.requests`."""

    norms: BatchNorms
    """Those of the model."""


def train(
    trainee: Trainee, listener: Listener, first_step: int = 0, last_step: int | None = None
) -> dict[str, float]:
    """Take the steps from `first_step` to before `last_step`; return the last evaluation.

    Args:
        trainee: What to train.
        listener: Hears of the steps.
        first_step: Steps that were taken before.
        last_step: Steps to have been taken when this returns; None is all that were planned.

    Raises:
        RecipeError: The recipe's loss does not return (sum, count).
        TrainingError: A loss is not finite.
    """
    recipe, plan, backend = trainee.recipe, trainee.plan, trainee.backend
    model, optimizer, sampler = trainee.model, trainee.optimizer, trainee.sampler
    norms = trainee.norms
    hyperparameters = Hyperparameters(optimizer, plan.lr)
    meter = Meter(backend)
    values: dict[str, float] = {}
    model.train()
    last_step = plan.total_steps if last_step is None else last_step
    for step in range(first_step, last_step):
        # ------------------------------------------------------------------------------------
        seed_step(plan.seed, step, backend)
        lr = hyperparameters.write(recipe.schedule.at(step, plan.total_steps))
        asked = time.perf_counter()
        taken = [next(trainee.batches) for _ in range(sampler.micro_steps(step))]
        waited = time.perf_counter() - asked
        items = _items(trainee, step, taken)
        weight = backend.world_size / items
        sums, counts = [], []
        for number, micro_batch in enumerate(taken, start=1):
            batch = backend.to_device(micro_batch.batch)
            with (
                backend.micro_step(last=number == len(taken)),
                contextlib.nullcontext() if micro_batch.counts else norms.ignoring_samples(),
            ):
                with backend.autocast():
                    loss_sum, count = _sum_and_count(
                        recipe.loss, recipe.forward(model, batch), batch
                    )
                # Gradients are averaged over ranks: world_size in the weight makes that a sum.
                backend.backward(loss_sum, weight if micro_batch.counts else 0.0)
            if micro_batch.counts:
                sums.append(loss_sum.detach())
                counts.append(count)
        grad_norm = backend.apply(optimizer, recipe.max_grad_norm)
        # ------------------------------------------------------------------------------------
        listener.took(step + 1, taken)
        meter.add(
            step=step + 1,
            epoch=sampler.epoch_of(step) + 1,
            samples=sampler.samples_before(step + 1),
            batch_samples=sampler.batch_samples(step),
            items=items,
            loss_sums=sums,
            counts=counts,
            lr=lr,
            grad_norm=grad_norm,
            data_wait_seconds=waited,
        )
        evaluates = plan.evaluates_after(step)
        if meter.is_due() or evaluates or step + 1 == last_step:
            rows = meter.read()
            listener.stepped(rows)
            check_finite(rows)
        if evaluates and sampler.evaluation_samples:
            values = evaluate(trainee)
            listener.evaluated(step + 1, values)
            meter.restart_clock()
    return values


@torch.no_grad()
def evaluate(trainee: Trainee) -> dict[str, float]:
    """Return loss and metrics over the evaluation data, each sample once (collective)."""
    recipe, backend, model = trainee.recipe, trainee.backend, trainee.model
    functions = {"loss": recipe.loss, **recipe.metrics}
    totals = torch.zeros(len(functions), 2, dtype=torch.float64, device=backend.device)
    trainee.norms.average(backend)
    model.eval()
    for _ in range(trainee.sampler.evaluation_steps()):
        micro_batch = next(trainee.batches)
        batch = backend.to_device(micro_batch.batch)
        with backend.autocast():
            outputs = recipe.forward(model, batch)
            found = [_sum_and_count(each, outputs, batch) for each in functions.values()]
        if micro_batch.counts:
            totals += torch.stack([_pair(pair, backend.device) for pair in found])
    model.train()
    sums = backend.sum(totals).tolist()
    return {
        name: total / count if count else float("nan")
        for name, (total, count) in zip(functions, sums, strict=True)
    }


def _sum_and_count(
    function: Callable[[Any, Any], Any], outputs: Any, batch: Any
) -> tuple[Any, int | Tensor]:
    """Call a loss or metric.

    Raises:
        RecipeError: It returned something else than (sum, count).
    """
    returned = function(outputs, batch)
    if isinstance(returned, tuple) and len(returned) == 2:
        total, count = returned
        if isinstance(count, (int, Tensor)) and not (isinstance(total, Tensor) and total.ndim):
            return total, count
    name = getattr(function, "__name__", "a loss or metric")
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


def _items(trainee: Trainee, step: int, taken: list[MicroBatch]) -> int | Tensor:
    """Return the items that the loss counts in the global batch of `step`."""
    if trainee.recipe.count is None:
        return trainee.sampler.batch_samples(step)
    own = sum(micro_batch.items for micro_batch in taken)
    total = torch.tensor(float(own), dtype=torch.float64, device=trainee.backend.device)
    return trainee.backend.sum(total).clamp(min=1.0)


def _pair(pair: tuple[Any, Any], device: torch.device) -> Tensor:
    return torch.stack(
        [torch.as_tensor(number, dtype=torch.float64, device=device) for number in pair]
    )
