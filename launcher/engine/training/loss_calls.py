"""Calls of a recipe's loss and metrics, which return a sum and a count, with checks of both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from launcher.engine.backends.nested_tensors import describe_argument
from launcher.errors import RecipeError
from launcher.printable import kind_of
from launcher.recipe.function_checks import SUM_AND_COUNT, called_with, note_call

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
