"""`all_predictions`: metrics such as AUROC, which are computed from all predictions together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from launcher.errors import RecipeError
from launcher.printable import kind_of
from launcher.recipe.function_checks import ARGUMENTS, check_function
from launcher.recipe.prediction_metric import PredictionMetric, is_metric_object


def outputs_and_targets(outputs: Any, batch: Any) -> tuple[Any, Any]:
    """Return the outputs of the model and the second element of a batch (inputs, targets).

    Raises:
        RecipeError: The batch is no list or tuple of two elements or more.
    """
    if isinstance(batch, (list, tuple)) and len(batch) > 1:
        return outputs, batch[1]
    raise RecipeError(
        f"A batch is {kind_of(batch)}, but a metric over all predictions would be updated with "
        "(outputs, batch[1]). Say what its update takes, as in launcher.all_predictions(build, "
        "lambda outputs, batch: (outputs, batch['labels']))."
    )


def all_predictions(
    build: Callable[[], Any], arguments: Callable[[Any, Any], Any] = outputs_and_targets
) -> PredictionMetric:
    """Return a metric of `Recipe.metrics` that is computed from all predictions of an evaluation.

        metrics={"auroc": launcher.all_predictions(build_auroc)}

    The object that `build` returns has the methods `update`, `compute` and `reset`, as every metric
    and `MetricCollection` of torchmetrics has. Over all ranks each sample is passed to `update`
    once. The states of torchmetrics are combined by their own reductions, lists in the order of the
    data. Where a state has no reduction that is exact for any split (mean, or a function), for
    other objects, and in runs with `exact=true`, the arguments of `update` are gathered instead,
    and one object gets them in the order of the data.

    `compute` is called once, after the last sample. It returns a number, or a dict of numbers,
    which are reported as NAME/KEY; entries of a dict that are no single number are left out.

    Args:
        build: Function without arguments that returns the object. It is called once on each rank;
            import the library inside it, so that planning stays instant.
        arguments: Function (outputs, batch) -> the arguments of `update`: a tuple, or a dict of
            arguments by name. By default the outputs and the second element of the batch.

    Raises:
        RecipeError: `build` is no function without arguments, or `arguments` none of two.
    """
    if is_metric_object(build) and not isinstance(build, type):
        name = type(build).__name__
        raise RecipeError(
            f"all_predictions: expected a function that builds the metric, found {kind_of(build)}. "
            f"Write lambda: {name}(...), so that each rank builds its own."
        )
    check_function("all_predictions(build)", build, ())
    check_function("all_predictions(build, arguments)", arguments, ARGUMENTS["loss"])
    return PredictionMetric(build=build, arguments=arguments)
