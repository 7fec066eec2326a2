"""Reading values by type: what a user gave, as an instance of an annotation.

The types are int, float, bool, str, None, Literal, Path, enumerations, lists, tuples and mappings
of these, and unions. What an annotation leaves open is read as YAML would read it. `plain` returns
the value that run.yaml holds, from which the same annotation reads the same value again.
"""

from __future__ import annotations

import collections.abc
import contextlib
import datetime as dt
import enum
import math
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import msgspec

from launcher.errors import did_you_mean
from launcher.printable import printable_line, shortened
from launcher.recipe.text_values import (
    number,
    split_items,
    split_pair,
    truth,
    whole_number,
    without_quotes,
    yaml_value,
)

Form = Literal["python", "text", "argument", "item"]
"""How a value was given: in `python`, where text stands for text alone; where `text` may stand for
a number, as in YAML files; as an `argument` of a command line, where everything is text; or as an
`item` of a list that was given as text, which may have quotes."""

INTEGER_LIMIT = 2**63
"""Whole numbers are smaller than this in magnitude: those that torch and JSON readers can hold."""

_MAX_KEY = 100
"""Longest text of a key in a message."""

MAX_DEPTH = 20
"""Levels of lists and mappings within each other in a value without a type."""

SEQUENCES = (list, tuple, collections.abc.Sequence, collections.abc.Iterable)
MAPPINGS = (dict, collections.abc.Mapping)
_SPLIT_OR_UNTYPED = (*SEQUENCES, *MAPPINGS, Any, object)
"""Types whose readers treat the quotes around an item themselves."""


class UnfitError(Exception):
    """A value does not fit a type. The text is a reason beyond the type, or empty."""


class UnsupportedTypeError(Exception):
    """An annotation has a type that no plain value stands for. The text is the annotation."""


def read(value: Any, hint: Any, form: Form) -> Any:
    """Return `value` as an instance of `hint`.

    Raises:
        UnfitError: The value does not fit.
        UnsupportedTypeError: No plain value stands for an instance of `hint`.
    """
    while hasattr(hint, "__supertype__"):  # a NewType
        hint = hint.__supertype__
    origin = get_origin(hint) or hint
    if form == "item" and isinstance(value, str) and origin not in _SPLIT_OR_UNTYPED:
        value, form = without_quotes(value), "text"
    if origin is Annotated:
        return _read_limited(value, hint, form)
    if origin in _READERS:
        return _READERS[origin](value, hint, form)
    if isinstance(origin, type) and issubclass(origin, enum.Enum):
        return _read_member(value, origin, form)
    if isinstance(origin, type) and issubclass(origin, PurePath):
        return _read_path(value, origin, form)
    raise UnsupportedTypeError(getattr(hint, "__name__", str(hint)))


def plain(value: Any) -> Any:
    """Return a value in the form that YAML and JSON can represent and `read` reads back."""
    if isinstance(value, enum.Enum):
        return _plain_member(value)
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {plain(key): plain(item) for key, item in value.items()}
    return value


def _read_limited(value: Any, hint: Any, form: Form) -> Any:
    inner = read(value, get_args(hint)[0], form)
    limits = [item for item in get_args(hint)[1:] if isinstance(item, msgspec.Meta)]
    if limits and isinstance(inner, (int, float, str)):
        try:
            msgspec.convert(inner, hint)
        except msgspec.ValidationError:
            raise UnfitError from None
        except TypeError:  # a limit that does not apply to the type
            raise UnsupportedTypeError(str(hint)) from None
    return inner


def _read_none(value: Any, _hint: Any, form: Form) -> None:
    is_word = form != "python" and isinstance(value, str) and value.lower() in ("none", "null")
    if value is not None and not is_word:
        raise UnfitError


def _read_int(value: Any, _hint: Any, form: Form) -> int:
    if isinstance(value, str) and form != "python":
        value = whole_number(value)
    elif isinstance(value, float) and form != "python" and value.is_integer():
        value = int(value)
    if type(value) is not int:
        raise UnfitError
    _check_integer(value)
    return value


def _read_float(value: Any, _hint: Any, form: Form) -> float:
    if isinstance(value, str) and form != "python":
        value = number(value)
    if type(value) not in (int, float):
        raise UnfitError
    try:
        result = float(value)
    except OverflowError:
        result = math.inf
    if not math.isfinite(result):
        raise UnfitError("it is not a finite number")
    return result


def _read_bool(value: Any, _hint: Any, form: Form) -> bool:
    if form != "python":
        value = truth(value)
    if not isinstance(value, bool):
        raise UnfitError
    return value


def _read_str(value: Any, _hint: Any, _form: Form) -> str:
    if not isinstance(value, str) or isinstance(value, enum.Enum):
        raise UnfitError
    _check_text(value)
    return str(value)


def _read_path(value: Any, hint: type[PurePath], form: Form) -> PurePath:
    if not isinstance(value, (str, PurePath)) or not str(value):
        raise UnfitError
    _check_text(str(value))
    if "\0" in str(value):
        raise UnfitError("the name of a file cannot contain a NUL character")
    path = hint(value)
    if isinstance(path, Path) and form != "python":
        try:
            return path.expanduser()
        except RuntimeError:
            raise UnfitError(f"there is no user {path.parts[0]}") from None
    return path


def _read_literal(value: Any, hint: Any, form: Form) -> Any:
    choices = get_args(hint)
    for choice in choices:
        if type(choice) is type(value) and choice == value:
            return choice
    for choice in choices if form != "python" else ():
        try:
            if read(value, type(choice), form) == choice:
                return choice
        except UnfitError:
            continue
    raise UnfitError


def _read_member(value: Any, hint: type[enum.Enum], form: Form) -> enum.Enum:
    """Return the member of an enumeration by its value or, from text, by its name."""
    if isinstance(value, hint):
        return value
    try:
        return hint(value)
    except Exception:  # noqa: BLE001  # a `_missing_` of the user may raise anything
        if form == "python" or not isinstance(value, str):
            raise UnfitError from None
    for kind in {type(member.value) for member in hint} & {bool, int, float}:
        with contextlib.suppress(Exception):
            return hint(read(value, kind, form))
    if value in hint.__members__:
        return hint.__members__[value]
    folded = [member for name, member in hint.__members__.items() if name.lower() == value.lower()]
    if len(folded) != 1:
        raise UnfitError
    return folded[0]


def _plain_member(member: enum.Enum) -> Any:
    """Return the value of a member or, if that is not plain, its name."""
    for candidate in (member.value, member.name):
        if isinstance(candidate, (bool, int, float, str)):
            try:
                if _read_member(candidate, type(member), "text") == member:
                    return candidate
            except UnfitError:
                continue
    raise UnfitError(f"neither the value nor the name of {member!r} stands for it alone")


def _read_union(value: Any, hint: Any, form: Form) -> Any:
    """Return the value by the narrowest member of a union that it fits, numbers before text."""
    is_list = isinstance(value, str) and ("," in value or value.lstrip()[:1] in ("[", "(", "{"))
    reason = ""
    for member in sorted(get_args(hint), key=lambda member: _breadth(member, is_list=is_list)):
        try:
            return read(value, member, form)
        except UnfitError as error:
            reason = reason or str(error)
    raise UnfitError(reason)


def _breadth(hint: Any, *, is_list: bool) -> int:
    """Return the place of a type in the order in which a union tries its members.

    Args:
        hint: The type.
        is_list: Whether the value is text that looks like a list or a mapping.
    """
    bare = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    origin = get_origin(bare) or bare
    order: list[Any] = [types.NoneType, int, float, bool, Literal]
    if origin in order:
        return order.index(origin)
    if origin in SEQUENCES or origin in MAPPINGS:
        return 6 if is_list else 10
    if origin in (str, Any, object):
        return 9
    return 7  # an enumeration or a path


def _read_sequence(value: Any, hint: Any, form: Form) -> Any:
    if isinstance(value, str) and form != "python":
        is_none = value.lower() in ("none", "null")
        value, form = [] if is_none else _of_text(split_items, value), "item"
    if not isinstance(value, (list, tuple)):
        raise UnfitError
    origin, arguments = get_origin(hint) or hint, get_args(hint)
    hints: Sequence[Any] = [arguments[0] if arguments else Any] * len(value)
    if origin is tuple and arguments and arguments[-1] is not Ellipsis:
        hints = arguments
        if len(hints) != len(value):
            raise UnfitError(f"the number of values is {len(value)}")
    items = [read(item, item_hint, form) for item, item_hint in zip(value, hints, strict=True)]
    return tuple(items) if origin is tuple else items


def _read_mapping(value: Any, hint: Any, form: Form) -> dict[Any, Any]:
    if isinstance(value, str) and form != "python":
        value = [_of_text(split_pair, item) for item in _of_text(split_items, value)]
        form = "item"
    elif isinstance(value, Mapping):
        value = list(value.items())
    else:
        raise UnfitError
    key_hint, value_hint = get_args(hint) or (Any, Any)
    keys = [_read_key(key, key_hint, form) for key, _ in value]
    if len(set(keys)) < len(keys):
        raise UnfitError("a key is given twice")
    items = [read(item, value_hint, form) for _, item in value]
    return dict(zip(keys, items, strict=True))


def _read_key(key: Any, hint: Any, form: Form) -> Any:
    """Return a key of a mapping; a refusal names the keys that there are, if they are fixed."""
    try:
        return read(_as_key(key), hint, form)
    except UnfitError as error:
        if get_origin(hint) is not Literal or str(error):
            raise
        known = [str(choice) for choice in get_args(hint)]
        shown = printable_line(shortened(repr(key), _MAX_KEY))
        near = did_you_mean(str(key)[:_MAX_KEY], known)
        among = f".{near}" if near else f" among {', '.join(known)}"
        raise UnfitError(f"there is no {shown}{among}") from None


def _as_key(key: Any) -> Any:
    if isinstance(key, (list, tuple, dict, set)):
        raise UnfitError("a key is a list or a mapping")
    return key


T = TypeVar("T")


def _of_text(reader: Callable[[str], T], text: str) -> T:
    try:
        return reader(text)
    except ValueError as error:
        raise UnfitError(str(error)) from None


def _read_untyped(value: Any, _hint: Any, form: Form) -> Any:
    if isinstance(value, str) and form in ("argument", "item"):
        value = _of_text(lambda text: yaml_value(text, MAX_DEPTH), value)
    return _checked(value, MAX_DEPTH)


def _checked(value: Any, depth: int) -> Any:
    """Return a value without a type if it is plain, with dates as text and tuples as lists."""
    if depth < 0:
        raise UnfitError(f"lists are nested more than {MAX_DEPTH} deep")
    if isinstance(value, (list, tuple)):
        return [_checked(item, depth - 1) for item in value]
    if isinstance(value, dict):
        return {_checked(_as_key(key), 0): _checked(item, depth - 1) for key, item in value.items()}
    if isinstance(value, (dt.date, dt.time)):
        return value.isoformat()
    if isinstance(value, PurePath):
        return str(_read_path(value, PurePath, "python"))
    if value is not None and type(value) not in _SCALARS:
        raise UnfitError
    return value if value is None or value is True or value is False else _scalar(value)


def _scalar(value: Any) -> Any:
    return _READERS[type(value)](value, None, "python")


def _check_integer(value: int) -> None:
    if abs(value) >= INTEGER_LIMIT:
        raise UnfitError("whole numbers are limited to 2**63")


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UnfitError("it is not valid UTF-8") from None


_SCALARS = (bool, int, float, str)

_READERS: dict[Any, Callable[[Any, Any, Form], Any]] = {
    None: _read_none,
    types.NoneType: _read_none,
    int: _read_int,
    float: _read_float,
    bool: _read_bool,
    str: _read_str,
    Literal: _read_literal,
    Union: _read_union,
    types.UnionType: _read_union,
    Any: _read_untyped,
    object: _read_untyped,
    **dict.fromkeys(SEQUENCES, _read_sequence),
    **dict.fromkeys(MAPPINGS, _read_mapping),
}
"""The function that reads a value, by the type or by the origin of its annotation."""
