"""A recipe's metrics over the training data, computed on the outputs that each step has anyway."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from launcher.engine.training.loss_calls import name_of, sum_and_count
from launcher.recipe.objective import measured_objective
from launcher.recipe.prediction_metric import PredictionMetric
from launcher.recipe.recipe import Recipe
from launcher.recipe.training_log import is_received, log


def with_train_metrics(recipe: Recipe) -> Recipe:
    """Return the recipe with a loss that, in training, also logs its `train_metrics`.

    Of several objectives it is the loss of the one that has the outputs for them.
    """
    if not recipe.train_metrics:
        return recipe
    metrics = {
        name: metric
        for name, metric in recipe.metrics.items()
        if name in recipe.train_metrics and not isinstance(metric, PredictionMetric)
    }
    measured = measured_objective(recipe.objectives, recipe.forward)
    if measured is None:
        return replace(recipe, loss=_LossWithMetrics(recipe.loss, metrics))
    objectives = [
        replace(each, loss=_LossWithMetrics(each.loss, metrics)) if each is measured else each
        for each in recipe.objectives
    ]
    return replace(recipe, objectives=tuple(objectives))


class _LossWithMetrics:
    """A loss that logs metrics of the same outputs, where what is logged counts.

    Args:
        loss: The recipe's loss.
        metrics: Functions (outputs, batch) -> (sum, count), by the names under which to log them.
    """

    def __init__(
        self, loss: Callable[[Any, Any], Any], metrics: Mapping[str, Callable[[Any, Any], Any]]
    ) -> None:
        self._loss, self._metrics = loss, metrics

    def __call__(self, outputs: Any, batch: Any) -> Any:
        """Return what the loss returns."""
        returned = self._loss(outputs, batch)
        if is_received():
            with torch.no_grad():
                for name, metric in self._metrics.items():
                    log(name, *sum_and_count(metric, outputs, batch, name=name_of(name)))
        return returned
