"""The parameters of a recipe function: their types, and values for them."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Mapping
from typing import Any, Union, get_args, get_origin, get_type_hints

from launcher.errors import RecipeError, UsageError
from launcher.printable import text_of
from launcher.recipe.averaging import AVERAGES, Averaging
from launcher.recipe.callspec import Spec, parse
from launcher.recipe.optimizer import OPTIMIZERS, OptimizerSpec
from launcher.recipe.schedules import SCHEDULES, Schedule
from launcher.recipe.typed_values import Form, UnfitError, UnsupportedTypeError, plain
from launcher.recipe.validation import MismatchError, convert

_SPECS: dict[type[Spec], tuple[str, Mapping[str, Callable[..., Any]]]] = {
    Schedule: ("schedule", SCHEDULES),
    OptimizerSpec: ("optimizer", OPTIMIZERS),
    Averaging: ("averaging", AVERAGES),
}
"""The kind and the makers of each type of spec."""

_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def named_parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Return the parameters of a function that can be given by name, in declared order."""
    parameters = inspect.signature(function).parameters
    return {name: item for name, item in parameters.items() if item.kind in _NAMED}


def type_of(function: Callable[..., Any], parameter: inspect.Parameter) -> Any:
    """Return the type of a parameter: its annotation or, without one, the type of its default.

    A parameter with neither has the type Any.

    Raises:
        RecipeError: The annotation is text that cannot be evaluated.
    """
    if parameter.annotation is parameter.empty:
        return _type_of_default(parameter.default)
    target = inspect.unwrap(function)
    while isinstance(target, functools.partial):
        target = inspect.unwrap(target.func)
    holder = types.SimpleNamespace(__annotations__={parameter.name: parameter.annotation})
    try:
        hints = get_type_hints(holder, getattr(target, "__globals__", {}), include_extras=True)
    except Exception as error:  # noqa: BLE001  # an annotation is code
        raise RecipeError(
            f"The annotation {parameter.annotation!r} of the parameter {parameter.name} cannot be "
            f"evaluated: {type(error).__name__}: {text_of(error)}. Import its names at the top "
            "level of the recipe's file, not under TYPE_CHECKING."
        ) from None
    return hints[parameter.name]


def read_parameter(
    function: Callable[..., Any], parameter: inspect.Parameter, value: Any, form: Form
) -> Any:
    """Return a value for a parameter, as an instance of its type.

    Args:
        function: The function that has the parameter.
        parameter: The parameter.
        value: The value to read.
        form: How it was given.

    Raises:
        MismatchError: The value does not fit the type, or has no form that run.yaml can hold.
        RecipeError: The annotation cannot be evaluated, or no plain value stands for its type.
    """
    hint = type_of(function, parameter)
    try:
        spec_types = [kind for kind in _members(hint) if isinstance(kind, type) and kind in _SPECS]
        if spec_types and not (types.NoneType in _members(hint) and value in (None, "none")):
            kind, makers = _SPECS[spec_types[0]]
            return parse(value, makers, kind=kind)
        if spec_types:
            return None
        result = convert(value, hint, form)
        plain_value(result)
    except UsageError as error:
        raise MismatchError(str(error).rstrip(".")) from None
    except UnfitError as error:
        raise MismatchError(str(error)) from None
    except UnsupportedTypeError as error:
        raise RecipeError(
            f"The parameter {parameter.name} has the type {error}, which no text stands for, so it "
            "cannot be given here. Types that can: int, float, bool, str, Path, Literal, an Enum, "
            "and lists, tuples and dicts of these."
        ) from None
    return result


def plain_value(value: Any) -> Any:
    """Return the value of a parameter or setting in the form that run.yaml holds."""
    return str(value) if isinstance(value, Spec) else plain(value)


def _members(hint: Any) -> tuple[Any, ...]:
    is_union = get_origin(hint) in (Union, types.UnionType)
    return get_args(hint) if is_union else (hint,)


def _type_of_default(default: Any) -> Any:
    """Return the type that a default stands for; Any if the default is missing or None."""
    if default is None or default is inspect.Parameter.empty:
        return Any
    if isinstance(default, (list, tuple)):
        items = {_type_of_default(item) for item in default}
        item = items.pop() if len(items) == 1 else Any
        return list[item] if isinstance(default, list) else tuple[item, ...]  # type: ignore[valid-type]
    if isinstance(default, dict):
        return dict[Any, Any]
    return type(default)
