"""A metric that needs all predictions of an evaluation, and not a sum and a count."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class PredictionMetric:
    """A metric that is an object with the methods `update`, `compute` and `reset`."""

    build: Callable[[], Any]
    """Function that returns a new object of that kind."""

    arguments: Callable[[Any, Any], Any]
    """Function (outputs, batch) -> the arguments of `update`, as a tuple or, by name, a dict."""


def is_metric_object(value: Any) -> bool:
    """Return whether a value, or an instance of a class, is updated and then computed."""
    return all(callable(getattr(value, name, None)) for name in ("update", "compute", "reset"))


def is_metric(name: str, metrics: Mapping[str, Any]) -> bool:
    """Return whether an evaluation set can have a metric called `name`, without the set's name.

    The keys of a metric that has several values are unknown.
    """
    parts = name.split("/")
    starts = ("/".join(parts[:number]) for number in range(1, len(parts)))
    return (
        name == "loss"
        or name in metrics
        or any(isinstance(metrics.get(start), PredictionMetric) for start in starts)
    )


def is_metric_of_a_set(name: str, metrics: Mapping[str, Any]) -> bool:
    """Return whether an evaluation can have a metric called `name`, perhaps after a set's name."""
    return is_metric(name, metrics) or is_metric(name.partition("/")[2], metrics)


def sum_metrics(metrics: Mapping[str, Any]) -> dict[str, Callable[[Any, Any], Any]]:
    """Return the metrics of a recipe that are functions (outputs, batch) -> (sum, count)."""
    return {name: each for name, each in metrics.items() if not isinstance(each, PredictionMetric)}


def prediction_metrics(metrics: Mapping[str, Any]) -> dict[str, PredictionMetric]:
    """Return the metrics of a recipe that need all predictions."""
    return {name: each for name, each in metrics.items() if isinstance(each, PredictionMetric)}
