"""A metric of an evaluation and whether more or less of it is better, such as `accuracy:max`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from launcher.errors import UsageError, did_you_mean
from launcher.recipe.prediction_metric import is_metric_of_a_set
from launcher.recipe.validation import brief


@dataclass(frozen=True, kw_only=True)
class MetricGoal:
    """A metric of an evaluation, and the direction in which it improves."""

    name: str
    """Name of the metric, such as `accuracy`, or `dev/accuracy` with several evaluation sets."""

    mode: Literal["min", "max"]
    """Whether smaller (min) or larger (max) values are better."""

    def __str__(self) -> str:
        """Return the text that `read_goal` reads back."""
        return f"{self.name}:{self.mode}"

    def key(self, value: float | None) -> float:
        """Return a number that sorts better values first; a missing value and NaN come last."""
        if value is None or math.isnan(value):
            return math.inf
        return value if self.mode == "min" else -value


def read_goal(text: str, *, where: str) -> MetricGoal:
    """Return the goal that text such as `accuracy:max` describes.

    Args:
        text: The text.
        where: What the text was given for, such as `--metric`, which errors name.

    Raises:
        UsageError: The text has another form.
    """
    name, colon, mode = text.rpartition(":")
    if not (name and colon) or mode not in ("min", "max"):
        raise UsageError(
            f"{where} {brief(text)}: expected NAME:min or NAME:max, such as loss:min or "
            "accuracy:max."
        )
    return MetricGoal(name=name, mode=cast('Literal["min", "max"]', mode))


def check_goal(goal: MetricGoal, metrics: Mapping[str, Any], *, where: str) -> None:
    """Refuse a metric that no evaluation of a recipe gives.

    The name of an evaluation set before a slash is not checked, because the sets are known only
    when the data is read.

    Args:
        goal: The goal.
        metrics: The metrics of the recipe, without the loss.
        where: What the goal was given for, which the error names.

    Raises:
        UsageError: The recipe has no such metric.
    """
    known = ["loss", *metrics]
    if not is_metric_of_a_set(goal.name, metrics):
        raise UsageError(
            f"{where} {goal}: the recipe's evaluations give {', '.join(known)}, and not "
            f"{brief(goal.name)}.{did_you_mean(goal.name, known)}"
        )
