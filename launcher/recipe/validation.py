"""Conversion of values to type hints, with errors that a user understands.

`launcher.recipe.typed_values` reads the values; this module describes what it refuses as `expected
..., found ...`. Limits are part of the type: `Annotated[int, Meta(ge=1)]`.
"""

from __future__ import annotations

import enum
import inspect
import types
from pathlib import PurePath
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from msgspec import Meta

from launcher.printable import kind_of, printable_line, shortened
from launcher.recipe.typed_values import MAPPINGS, Form, UnfitError, read

PositiveInt = Annotated[int, Meta(ge=1)]
NonNegativeInt = Annotated[int, Meta(ge=0)]
PositiveFloat = Annotated[float, Meta(gt=0)]
NonNegativeFloat = Annotated[float, Meta(ge=0)]
Fraction = Annotated[float, Meta(ge=0, le=1)]

_NOUNS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    list: "a list",
    tuple: "a list",
    dict: "a mapping",
    types.NoneType: "none",
    Any: "a number, text, true, false, none, or a list or mapping of these",
}
_LIMITS = {"ge": "at least", "gt": "greater than", "le": "at most", "lt": "less than"}
_MAX_SHOWN = 200
"""Longest text of a value in a message; a longer one loses its middle."""


class MismatchError(Exception):
    """A value does not fit its type. The message reads `expected ..., found ...`."""


def convert(value: Any, hint: Any, form: Form = "python") -> Any:
    """Return `value` as an instance of the type `hint`.

    Raises:
        MismatchError: The value does not fit, or is a number that is not finite or too large.
        UnsupportedTypeError: No plain value stands for an instance of `hint`.
    """
    try:
        return read(value, hint, form)
    except UnfitError as error:
        reason = f" ({error})" if str(error) else ""
        raise MismatchError(f"expected {describe(hint)}, found {show(value)}{reason}") from None


def describe(hint: Any) -> str:
    """Return a type hint as a phrase, such as `a whole number of at least 1, or none`."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _describe_limited(hint)
    if origin is not None:
        return _describe_parts(origin, arguments)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return " or ".join(hint.__members__)
    if isinstance(hint, type) and issubclass(hint, PurePath):
        return "a path"
    return _NOUNS.get(hint, getattr(hint, "__name__", "?"))


def _describe_parts(origin: Any, arguments: tuple[Any, ...]) -> str:
    """Return a type that is made of others as a phrase."""
    if origin is Literal:
        return " or ".join(map(str, arguments))
    phrases = [describe(argument) for argument in arguments if argument is not Ellipsis]
    if origin in (Union, types.UnionType):
        return ", or ".join(phrases)
    if origin in MAPPINGS:
        return f"a mapping of {phrases[0]} to {phrases[1]}"
    if origin is tuple and arguments[-1] is not Ellipsis:
        return f"a list of {len(phrases)}: {', '.join(phrases)}"
    return f"a list{', each item' if phrases[0].startswith('a ') else ' of'} {phrases[0]}"


def _describe_limited(hint: Any) -> str:
    """Return an `Annotated` type as a phrase."""
    bare, *metadata = get_args(hint)
    for meta in metadata:
        if getattr(meta, "description", None):
            return str(meta.description)
    limits = [
        f"{words} {int(limit):,}" if limit == int(limit) else f"{words} {limit:g}"
        for meta in metadata
        for name, words in _LIMITS.items()
        if (limit := getattr(meta, name, None)) is not None
    ]
    if any(getattr(meta, "pattern", None) for meta in metadata):
        limits.append("of letters, digits, dots, dashes and underscores")
    link = " of " if limits and limits[0].startswith("at ") else " "
    return describe(bare) + (f"{link}{' and '.join(limits)}" if limits else "")


def show(value: Any) -> str:
    """Return a value as a phrase that also names its type if it is unclear: `the text 'abc'`."""
    if isinstance(value, str):
        return f"the text {brief(repr(value))}"
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, (int, float)):
        return brief(value)
    if inspect.isclass(value):
        return f"the class {brief(value.__name__)}"
    if inspect.isfunction(value):
        return f"the function {brief(value.__name__)}"
    return f"{kind_of(value)} {brief(value)}"


def brief(value: Any) -> str:
    """Return the text of a value on one line; long text loses its middle."""
    try:
        text = str(value)
    except Exception as error:  # noqa: BLE001  # a number of many digits, or a class of the user
        return f"(a value whose text is not available: {type(error).__name__})"
    return printable_line(shortened(text, _MAX_SHOWN))
