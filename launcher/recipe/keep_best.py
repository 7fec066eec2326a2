"""`keep_best`: the metric by which the best checkpoint is chosen, and checks of its name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from launcher.errors import RecipeError, did_you_mean
from launcher.recipe.evaluation_sets import metric_name
from launcher.recipe.prediction_metric import is_metric, is_metric_of_a_set


class BestMetric(NamedTuple):
    """The metric of evaluations that decides, and in which direction."""

    name: str
    """The name of the metric, such as `dev/accuracy`."""

    mode: str
    """max if larger values are better, min if smaller ones are."""

    def is_better(self, value: float, other: float) -> bool:
        """Return whether a value is better than another one; NaN never is."""
        return value > other if self.mode == "max" else value < other


def best_metric(keep_best: str) -> BestMetric:
    """Return the setting `keep_best`, such as `dev/accuracy:max`, as its two parts."""
    name, _, mode = keep_best.rpartition(":")
    return BestMetric(name, mode)


def check_keep_best(
    keep_best: str | None,
    metrics: Mapping[str, Any],
    *,
    best_checkpoints: int,
    stop_after: int | None,
) -> None:
    """Refuse a metric that no evaluation set can have, and settings that need keep_best.

    Raises:
        RecipeError: The metric is neither the loss nor one of the recipe; or `best_checkpoints` or
            `stop_after` is set without `keep_best`.
    """
    if keep_best is None:
        for name, value, default in (
            ("best_checkpoints", best_checkpoints, 1),
            ("stop_after", stop_after, None),
        ):
            if value != default:
                raise RecipeError(
                    f"{name}={value} needs keep_best, which says by what metric evaluations are "
                    "compared, such as keep_best=accuracy:max."
                )
        return
    name = best_metric(keep_best).name
    if is_metric_of_a_set(name, metrics):
        return
    set_name, _, metric = name.partition("/")
    raise unknown_metric_error(
        keep_best, [metric_name(set_name if metric else "", each) for each in ("loss", *metrics)]
    )


def check_set_metric(
    goal: str, sets: Iterable[str], metrics: Mapping[str, Any], *, where: str = "keep_best"
) -> None:
    """Refuse a metric that no evaluation set of the data has.

    Args:
        goal: The metric and its direction, such as `dev/accuracy:max`.
        sets: The names of the sets; an empty name for a single set.
        metrics: The metrics of the recipe.
        where: The setting that has the goal.

    Raises:
        RecipeError: There is no evaluation set, or none has that metric.
    """
    name, sets = best_metric(goal).name, list(sets)
    if not sets:
        raise RecipeError(
            f"{where}={goal} compares evaluations, but the recipe's data has no evaluation "
            f"set. Give Data(evaluation=...), or leave {where} out."
        )
    for each in sets:
        prefix = metric_name(each, "")
        if name.startswith(prefix) and is_metric(name.removeprefix(prefix), metrics):
            return
    known = [metric_name(each, metric) for each in sets for metric in ("loss", *metrics)]
    raise unknown_metric_error(goal, known, where=where)


def unknown_metric_error(goal: str, known: list[str], *, where: str = "keep_best") -> RecipeError:
    """Return the error for a metric that no evaluation gives, with those that there are."""
    name = best_metric(goal).name
    return RecipeError(
        f"{where}={goal}: no evaluation gives a metric called {name}."
        f"{did_you_mean(name, known)} The metrics are {', '.join(known)}."
    )
