"""The evaluation sets of a recipe: their names, their data, and when each is evaluated."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal

from launcher.errors import RecipeError
from launcher.recipe.field_docs import with_field_docs
from launcher.recipe.validation import MismatchError, PositiveInt, convert, show

Interval = PositiveInt | Literal["epoch", "end"]
"""When a set is evaluated: every so many optimizer steps, after each epoch, or at the end alone."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@with_field_docs
@dataclass(frozen=True)
class Evaluation:
    """An evaluation set with a schedule or a collate function of its own.

    Every set is also evaluated after the last step.
    """

    data: Any
    """The data set, map-style; an evaluation visits each sample once."""

    _: KW_ONLY

    every: Interval | None = None
    """Optimizer steps between evaluations of this set; epoch evaluates it after each epoch, end
    after the last step alone. None follows the recipe's evaluate_every."""

    collate: Callable[[list[Any]], Any] | None = None
    """Function from a list of samples to a batch; None is that of the recipe's data."""

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "every", convert(self.every, Interval | None))
        except MismatchError as error:
            raise RecipeError(f"Evaluation(every=...): {error}.") from None


def evaluation_sets_of(evaluation: Any) -> dict[str, Evaluation]:
    """Return the evaluation sets by name, in their order; a single set has an empty name.

    Args:
        evaluation: The value of `Data(evaluation=...)`. A mapping whose keys are texts holds one
            set for each key.

    Raises:
        RecipeError: A name is not made of letters, digits, dots, dashes and underscores, or there
            is no set.
    """
    if evaluation is None:
        return {}
    if not isinstance(evaluation, Mapping) or not all(isinstance(key, str) for key in evaluation):
        return {"": _as_evaluation(evaluation)}
    if not evaluation:
        raise RecipeError(
            "Data(evaluation={}): expected evaluation sets by name, found none. Leave evaluation "
            "out to train without evaluations."
        )
    for name in evaluation:
        if not _NAME.fullmatch(name) or name == "train":
            reason = (
                "This name stands for numbers of the training. Give the set another one."
                if name == "train"
                else "Its metrics are reported as NAME/loss, for example."
            )
            raise RecipeError(
                "Data(evaluation={...}): expected names of letters, digits, dots, dashes and "
                f"underscores for the evaluation sets, found {show(name)}. {reason}"
            )
    return {name: _as_evaluation(data) for name, data in evaluation.items()}


def split_of(name: str) -> str:
    """Return what micro-batches of an evaluation set are requested by: `evaluation/dev`."""
    return f"evaluation/{name}" if name else "evaluation"


def title_of(split: str) -> str:
    """Return the name of a data set in messages: `train`, `evaluation` or `dev evaluation`."""
    kind, _, name = split.partition("/")
    return f"{name} {kind}" if name else kind


def metric_name(set_name: str, metric: str) -> str:
    """Return the name under which a metric of an evaluation set is reported: `dev/accuracy`."""
    return f"{set_name}/{metric}" if set_name else metric


def _as_evaluation(data: Any) -> Evaluation:
    return data if isinstance(data, Evaluation) else Evaluation(data)
