"""Calls of a recipe's metrics, whose errors name the metric and where it was called."""

from __future__ import annotations

import contextlib
import numbers
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from launcher.engine.backends.nested_tensors import describe_nested
from launcher.engine.ranks.failures import is_out_of_memory
from launcher.errors import LauncherError, RecipeError, TrainingError
from launcher.printable import class_name, printable_line, text_of, traceback_of


@contextlib.contextmanager
def metric_call(name: str, place: str) -> Iterator[None]:
    """Call a loss or metric in this context.

    Args:
        name: What is called, such as `The metric auroc`.
        place: Where, such as `the dev evaluation after step 500, on rank 1`.

    Raises:
        TrainingError: It raised an exception. Running out of memory and errors of launcher pass.
    """
    try:
        yield
    except (LauncherError, torch.distributed.DistError):
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise TrainingError(
            f"{name} raised {class_name(error)} in {place}: "
            f"{text_of(error, 2_000) or 'it has no text'}\n\n{traceback_of(error).rstrip()}"
        ) from None


def numbers_of(name: str, result: Any) -> dict[str, float]:
    """Return the numbers that a metric has computed, by name.

    Args:
        name: The name of the metric.
        result: What it computed: a number, a tensor of one element, or a mapping of these, whose
            entries get the name NAME/KEY. Other entries of a mapping are left out.

    Raises:
        RecipeError: The result is no number, or a mapping without a number.
    """
    values = dict(_numbers_in(name, result))
    if not values:
        raise RecipeError(
            f"The metric {name} computed {describe_nested(result)}, which is no number. Its "
            "compute must return a number, a tensor of one element, or a dict of these."
        )
    return values


def _numbers_in(name: str, result: Any) -> Iterator[tuple[str, float]]:
    if isinstance(result, Mapping):
        for key, value in result.items():
            yield from _numbers_in(f"{name}/{printable_line(str(key))}", value)
    elif isinstance(result, Tensor):
        if result.numel() == 1 and not result.is_complex():
            yield name, float(result)
    elif isinstance(result, numbers.Real) or getattr(result, "shape", None) == ():
        with contextlib.suppress(TypeError, ValueError):
            yield name, float(result)
