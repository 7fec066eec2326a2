"""The functions that a recipe is made of: what each is called with, and errors about others."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from launcher.errors import LauncherError, RecipeError, did_you_mean
from launcher.printable import add_note, printable_line
from launcher.recipe.averaging import Averaging
from launcher.recipe.optimizer import OptimizerSpec
from launcher.recipe.prediction_metric import PredictionMetric, is_metric_object
from launcher.recipe.training_log import check_logged_name
from launcher.recipe.validation import brief, show

ARGUMENTS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "model": (),
        "data": (),
        "loss": ("outputs", "batch"),
        "forward": ("model", "batch"),
        "predict": ("model", "batch"),
        "predict_data": ("path",),
    }
)
"""The functions of a recipe, and what each is called with."""

OPTIONAL = ("predict", "predict_data")
"""Those that may be None."""

SUM_AND_COUNT = (
    "(sum, count): the sum over the items of the batch as a scalar, as with reduction='sum', and "
    "the number of these items, such as len(targets)"
)
"""What a loss or a metric returns."""

_RETURNS: Mapping[str, str] = MappingProxyType(
    {
        "The recipe's model function": "a new torch.nn.Module",
        "The recipe's data function": "launcher.Data(train=..., evaluation=...)",
        "The recipe's forward": "the outputs that loss and metrics take, and by default calls the "
        "model with batch[0]",
        "The recipe's optimizer function": "a torch.optim.Optimizer of the model's parameters",
        "The recipe's count function": "the number of items that the loss counts in the batch",
        "The collate function": "a batch, as forward, loss, metrics and count take it",
    }
)
"""What functions of a recipe return, by the names that errors give them."""


def call_text(name: str, **arguments: str) -> str:
    """Return what a function of a recipe was called with, and what it is to return.

    Args:
        name: The name of the function in errors; a metric has a name of its own.
        arguments: Descriptions of the arguments, by the names that the documentation gives them.
    """
    called = called_with(name, **arguments)
    return f"{called} It returns {_RETURNS.get(name, SUM_AND_COUNT)}."


def called_with(name: str, **arguments: str) -> str:
    """Return what a function of a recipe was called with, as a sentence."""
    given = ", ".join(f"{argument}: {text}" for argument, text in arguments.items())
    return f"{name} was called {f'with ({given})' if given else 'without arguments'}."


def note_call(error: BaseException, name: str, **arguments: str) -> None:
    """Add to an exception which function of a recipe raised it, and what that was called with.

    Errors of launcher explain themselves, and are left as they are.
    """
    if not isinstance(error, LauncherError):
        add_note(error, call_text(name, **arguments))


def check_function(place: str, value: Any, arguments: tuple[str, ...]) -> None:
    """Refuse a value that cannot be called with these arguments.

    Raises:
        RecipeError: It is no function, or its parameters are others.
    """
    if not callable(value):
        raise RecipeError(
            f"{place}: expected a function, found {show(value)}. Give the function itself, not its "
            "result."
        )
    try:
        signature = inspect.signature(value)
    except (ValueError, TypeError):  # functions in C may not tell
        return
    try:
        signature.bind(*arguments)
    except TypeError as error:
        name = printable_line(getattr(value, "__name__", type(value).__name__))
        given = f"({', '.join(arguments)})" if arguments else "no arguments"
        raise RecipeError(
            f"{place}: launcher calls it with {given}, which {name}{brief(signature)} does not "
            f"take: {error}."
        ) from None


def check_optimizer(optimizer: Any, place: str = "Recipe(optimizer=...)") -> None:
    """Refuse an optimizer that is neither sgd(...) or adamw(...) nor a function of two arguments.

    Args:
        optimizer: The optimizer.
        place: Where it was given, for the message.

    Raises:
        RecipeError: It is something else, such as a class of torch.optim.
    """
    if isinstance(optimizer, OptimizerSpec):
        return
    if isinstance(optimizer, type):
        name = printable_line(optimizer.__name__)
        raise RecipeError(
            f"{place}: expected sgd(...), adamw(...) or a function (model, lr) -> "
            f"optimizer, found the class {name}. Write a function that calls it, such as lambda "
            f"model, lr: {name}(model.parameters(), lr=lr)."
        )
    if not callable(optimizer):
        raise RecipeError(
            f"{place}: expected sgd(...), adamw(...) or a function (model, lr) -> "
            f"optimizer, found {show(optimizer)}."
        )
    check_function(place, optimizer, ("model", "lr"))


def check_averaging(averaging: Any, optimizer: Any) -> None:
    """Refuse an averaging that is neither ema(...) nor tail(...), or that averages twice.

    Raises:
        RecipeError: It is something else, or the optimizer averages the weights itself.
    """
    if averaging is None:
        return
    if not isinstance(averaging, Averaging):
        raise RecipeError(
            f"Recipe(averaging=...): expected ema(...), tail(...) or None, found {show(averaging)}."
        )
    if isinstance(optimizer, OptimizerSpec) and optimizer.name == "schedule_free":
        raise RecipeError(
            f"averaging={averaging} and optimizer={optimizer} exclude each other: schedule_free "
            "averages the weights itself. Remove averaging, or use another optimizer such as "
            "adamw()."
        )


PARALLEL_STYLES: Mapping[str, str] = MappingProxyType(
    {
        "colwise": "a Linear whose outputs are split over the ranks",
        "colwise_rep": "a Linear whose split outputs are gathered",
        "colwise_gather_output": "another name for colwise_rep",
        "rowwise": "a Linear that takes split inputs, and whose outputs are summed over the ranks",
        "rowwise_rep": "a Linear that splits its whole inputs itself",
        "rowwise_split_input": "another name for rowwise_rep",
        "embedding_rowwise": "an Embedding whose rows are split",
        "embedding_colwise": "an Embedding whose columns are split, and whose outputs are gathered",
        "replicated_with_grad_allreduce": "a module that each rank calls with its own part of the "
        "heads, such as a norm of queries, and that every rank has whole",
        "replicate": "a module that every rank has whole, as without a style",
    }
)
"""The styles of a tensor-parallel plan, and what each is for. The names are those of plans in
transformers."""


def check_parallel_plan(plan: Any) -> None:
    """Refuse a tensor-parallel plan that is no mapping of names to known styles.

    Raises:
        RecipeError: It is something else, or has an unknown style.
    """
    if plan is None:
        return
    known = ", ".join(PARALLEL_STYLES)
    if not isinstance(plan, Mapping) or not plan:
        raise RecipeError(
            "Recipe(tensor_parallel_plan=...): expected a dict of styles by the names of modules, "
            f"such as {{'blocks.*.hidden': 'colwise'}}, found {show(plan)}."
        )
    for name, style in plan.items():
        if not isinstance(name, str) or style not in PARALLEL_STYLES:
            raise RecipeError(
                f"Recipe(tensor_parallel_plan=...): expected a style for {show(name)}, one of "
                f"{known}, found {show(style)}."
            )


def check_metrics(metrics: Any) -> None:
    """Refuse metrics that are not functions, or results of `all_predictions`, by name.

    Raises:
        RecipeError: They are no mapping, a name is not printable text, or a value is neither.
    """
    if not isinstance(metrics, Mapping):
        raise RecipeError(
            "Recipe(metrics=...): expected a dict of functions by name, such as "
            f"{{'accuracy': accuracy}}, found {show(metrics)}."
        )
    for name, metric in metrics.items():
        if not (isinstance(name, str) and name.strip() and name.isprintable()):
            raise RecipeError(
                f"Recipe(metrics=...): expected the name of a metric as text on one line, found "
                f"{show(name)}."
            )
        if name == "loss":
            raise RecipeError(
                "Recipe(metrics={'loss': ...}): every evaluation reports the recipe's loss under "
                "this name. Give the metric another one."
            )
        if isinstance(metric, PredictionMetric):
            continue
        if is_metric_object(metric):
            kind = metric.__name__ if isinstance(metric, type) else type(metric).__name__
            raise RecipeError(
                f"Recipe(metrics={{{name!r}: ...}}): expected a function (outputs, batch) -> (sum, "
                f"count), found a metric {kind} with a state. Write launcher.all_predictions("
                f"lambda: {kind}(...)), so that each rank builds its own."
            )
        check_function(f"Recipe(metrics={{{name!r}: ...}})", metric, ARGUMENTS["loss"])


def check_train_metrics(names: tuple[str, ...], metrics: Mapping[str, Any]) -> None:
    """Refuse names of no metric, and names that a run cannot log.

    Raises:
        RecipeError: There is one.
    """
    place = "Recipe(train_metrics=...)"
    for name in names:
        if name not in metrics:
            known = ", ".join(metrics) or "none"
            raise RecipeError(
                f"{place}: there is no metric {brief(repr(name))}; metrics has {known}."
                f"{did_you_mean(name, metrics)}"
            )
        if isinstance(metrics[name], PredictionMetric):
            raise RecipeError(
                f"{place}: the metric {brief(repr(name))} is over all predictions, which only an "
                "evaluation has. Name metrics that return (sum, count)."
            )
        check_logged_name(place, name)
