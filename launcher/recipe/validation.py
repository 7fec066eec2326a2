"""Conversion of plain values to type hints, with errors that a user understands.

msgspec converts; this module rewrites what msgspec refuses as `expected ..., found ...`. Limits are
part of the type: `Annotated[int, Meta(ge=1)]`.
"""

from __future__ import annotations

import math
import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import msgspec
from msgspec import Meta

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
    Path: "a path",
}
_LIMITS = {"ge": "at least", "gt": "greater than", "le": "at most", "lt": "less than"}


class MismatchError(Exception):
    """A value does not fit its type. The message reads `expected ..., found ...`."""


def convert(value: Any, hint: Any, *, from_text: bool = False) -> Any:
    """Return `value` as an instance of the type `hint`.

    Args:
        value: A plain Python value.
        hint: int, float, bool, str, a Literal, a list or tuple of these, or a union with None.
        from_text: Whether a str may stand for a number, a bool or none, as on a command line.

    Raises:
        MismatchError: The value does not fit, or is a float that is not finite.
    """
    if from_text and isinstance(value, str):
        value = _from_text(value, hint)
    try:
        converted = msgspec.convert(value, hint, strict=not from_text)
    except msgspec.ValidationError:
        raise MismatchError(f"expected {describe(hint)}, found {show(value)}") from None
    if isinstance(converted, float) and not math.isfinite(converted):
        raise MismatchError(f"expected {describe(hint)}, found {show(value)}")
    return converted


def describe(hint: Any) -> str:
    """Return a type hint as a phrase, such as `a whole number of at least 1, or none`."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        for meta in arguments[1:]:
            if getattr(meta, "description", None):
                return str(meta.description)
        limits = [
            f"{words} {limit:g}"
            for meta in arguments[1:]
            for name, words in _LIMITS.items()
            if (limit := getattr(meta, name, None)) is not None
        ]
        if any(getattr(meta, "pattern", None) for meta in arguments[1:]):
            limits.append("of letters, digits, dots, dashes and underscores")
        return describe(arguments[0]) + (f" {' and '.join(limits)}" if limits else "")
    if origin is Literal:
        return " or ".join(str(choice) for choice in arguments)
    if origin in (Union, types.UnionType):
        return ", or ".join(describe(argument) for argument in arguments)
    if origin in (list, tuple):
        return f"a list of {describe(arguments[0])}" if arguments else "a list"
    return "none" if hint is types.NoneType else _NOUNS.get(hint, getattr(hint, "__name__", "?"))


def show(value: Any) -> str:
    """Return a value as a phrase that also names its type if it is unclear: `the text 'abc'`."""
    if isinstance(value, str):
        return f"the text {value!r}"
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, (int, float)):
        return str(value)
    return f"{type(value).__name__} {value!r}"


def _without_limits(hint: Any) -> Any:
    """Return the type inside an `Annotated`."""
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint


def _from_text(text: str, hint: Any) -> Any:
    """Return a command-line value for msgspec: `none`, yes/no and comma-separated lists are read.

    Other text is returned as it is; msgspec reads numbers.
    """
    members = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if types.NoneType in members and text.lower() in ("none", "null"):
        return None
    if bool in members and text.lower() in ("yes", "on", "no", "off"):
        return text.lower() in ("yes", "on")
    types_without_limits = set(map(_without_limits, members))
    if {str, int} <= types_without_limits and text.isdigit():
        return int(text)
    if any(get_origin(member) in (list, tuple) or member in (list, tuple) for member in members):
        if text.lower() in ("none", "null"):
            return []
        return [piece for piece in text.strip("[]()").replace(" ", "").split(",") if piece]
    return text
