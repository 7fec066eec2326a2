"""An evaluation on all ranks: loss and metrics over sets of samples, each visited once."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from launcher.engine.backends.transfers import upload
from launcher.engine.data.randomness import seed_evaluation
from launcher.engine.data.sampler import EvaluationSchedule
from launcher.engine.metrics.metric_calls import metric_call
from launcher.engine.training.context import TrainContext
from launcher.engine.training.loss_calls import name_of, sum_and_count
from launcher.planning.virtual_ranks import virtual_rank_of
from launcher.recipe.evaluation_sets import metric_name, split_of, title_of
from launcher.recipe.prediction_metric import sum_metrics


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
    by_name = {"loss": recipe.loss} | sum_metrics(recipe.metrics)
    functions = {name_of(name): function for name, function in by_name.items()}
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
        seed_evaluation(backend, micro_batch.request)
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
    for name, sums in zip(by_name, zip(*parts, strict=True), strict=True):
        total, count = (math.fsum(values) for values in zip(*sums, strict=True))
        means[name] = total / count if count else float("nan")
    return means | collected.results()
