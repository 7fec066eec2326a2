"""The tensors inside a batch or outputs: lists, tuples, mappings, dataclasses and other objects.

torch's own tree functions take a `UserDict`, as transformers' BatchEncoding is, and a dataclass for
a single value without tensors.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import UserDict, deque
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from launcher.printable import class_name, kind_of, printable_line, shortened

_MAX_DEPTH = 4
"""Number of objects of unknown classes, one inside the other, in which tensors are looked for."""

_MAX_PATH_LENGTH = 16
"""Number of containers and objects, one inside the other, that `walk_tensors` enters."""

_PLAIN = (str, bytes, bool, int, float, type(None))
"""Classes of values that hold no tensors."""

_SHOWN_PARTS = 6
"""Number of parts of a batch that a description lists."""

_MAX_CHARACTERS = 600
"""Longest description of an argument."""


def map_tensors(
    function: Callable[[Tensor], Any],
    value: Any,
    convert: Callable[[Any], Any] = lambda leaf: leaf,
) -> Any:
    """Return a copy of `value` in which each tensor is replaced by `function(tensor)`.

    Lists, tuples, named tuples, mappings and dataclass instances are copied; their classes and
    their other contents stay.

    Args:
        function: Receives each tensor.
        value: A tensor, or containers of tensors.
        convert: Receives each other object that is no container, and returns its replacement.
    """
    if isinstance(value, Tensor):
        return function(value)

    def convert_part(part: Any) -> Any:
        return map_tensors(function, part, convert)

    if type(value) is dict:
        return {key: convert_part(part) for key, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(convert_part, value))
    parts = _parts(value)
    if parts is None:
        return value if isinstance(value, _PLAIN) else convert(value)
    converted = {key: convert_part(part) for key, part in parts.items()}
    is_changed = any(converted[key] is not part for key, part in parts.items())
    return _replace_parts(value, converted) if is_changed else value


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors in a value, in the order in which `map_tensors` reaches them."""
    tensors: list[Tensor] = []

    def record(tensor: Tensor) -> Tensor:
        tensors.append(tensor)
        return tensor

    map_tensors(record, value)
    return tensors


def holds_tensors(value: Any) -> bool:
    """Return whether an object of any class has tensors in its attributes."""
    return _holds_tensors(value, _MAX_DEPTH)


class FoundTensor(NamedTuple):
    """A tensor inside a value."""

    tensor: Tensor
    path: str
    """The expression that reaches it, such as `batch['boxes'][0].corners`."""

    owner: Any
    """The innermost object that holds it."""


def walk_tensors(value: Any, path: str) -> Iterator[FoundTensor]:
    """Yield the tensors in a value, also those that `map_tensors` does not reach.

    These are in sets, in attributes of objects of any class, and in attributes of containers that
    are not fields. Objects with their own method `to` are left out, because that method decides
    what it moves, and so are functions, classes and other callable objects.

    Args:
        value: Any value; it may contain itself.
        path: The expression for the value.
    """
    yield from _walk(value, path, None, _MAX_PATH_LENGTH, {})


def describe_argument(value: Any) -> str:
    """Return an argument of a recipe's function as text, such as `dict {'ids': int64 (8, 16)}`.

    This function raises nothing, whatever the value is like.
    """
    try:
        text = describe_nested(value)
        if isinstance(value, Tensor) or type(value) in (dict, list, tuple):
            text = f"{type(value).__name__} {text}"
        return printable_line(shortened(text, _MAX_CHARACTERS))
    except Exception as error:  # noqa: BLE001  # the value may be of any class
        return f"{kind_of(value)} that cannot be described ({class_name(error)})"


def describe_nested(value: Any) -> str:
    """Return the structure of a batch as text, such as `{'ids': int64 (8, 16), 'mask': ...}`."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {_shape_text(value)}"
    if isinstance(value, np.ndarray):
        return f"ndarray {value.dtype} {value.shape}"
    parts = _parts(value)
    if parts is None:
        return type(value).__name__
    shown = list(parts.items())[:_SHOWN_PARTS]
    more = [f"{len(parts) - len(shown)} more"] if len(parts) > len(shown) else []
    if isinstance(value, Mapping):
        text = ", ".join([f"{key!r}: {describe_nested(part)}" for key, part in shown] + more)
        return f"{{{text}}}" if isinstance(value, dict) else f"{type(value).__name__}({text})"
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        text = ", ".join([describe_nested(part) for _, part in shown] + more)
        return f"[{text}]" if isinstance(value, list) else f"({text})"
    text = ", ".join([f"{key}={describe_nested(part)}" for key, part in shown] + more)
    return f"{type(value).__name__}({text})"


def _shape_text(tensor: Tensor) -> str:
    """Return the shape of a tensor; of a ragged one, with a star for what differs."""
    if not tensor.is_nested:
        return str(tuple(tensor.shape))
    sizes = []
    for dimension in range(tensor.dim()):
        try:
            size = tensor.size(dimension)
            sizes.append(str(size) if type(size) is int else "*")
        except RuntimeError:  # torch refuses the size of a ragged dimension
            sizes.append("*")
    return f"({', '.join(sizes)})"


def _parts(value: Any) -> Mapping[Any, Any] | None:
    """Return the parts of a container by key, index or field; None if it is not a container.

    Classes with their own method `to`, other than subclasses of dict and UserDict, know best how to
    move their tensors.
    """
    if isinstance(value, (*_PLAIN, type)) or _moves_itself(value):
        return None
    if isinstance(value, Mapping):
        return {key: value[key] for key in value}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return dict(zip(value._fields, value, strict=True))
    if isinstance(value, (list, tuple, deque)):
        return dict(enumerate(value))
    if dataclasses.is_dataclass(value):
        names = (field.name for field in dataclasses.fields(value))
        return {name: getattr(value, name) for name in names if hasattr(value, name)}
    return None


def _moves_itself(value: Any) -> bool:
    """Return whether the method `to` of an object moves its tensors."""
    return callable(getattr(value, "to", None)) and not isinstance(value, (dict, UserDict))


def _replace_parts(value: Any, parts: dict[Any, Any]) -> Any:
    """Return a copy of a container with other parts."""
    if isinstance(value, tuple):
        is_named = hasattr(value, "_fields")
        return type(value)(*parts.values()) if is_named else type(value)(parts.values())
    if isinstance(value, Mapping) and not isinstance(value, MutableMapping):
        try:
            return type(value)(parts)  # type: ignore[call-arg]
        except TypeError:
            return parts
    clone: Any = copy.copy(value)
    for key, part in parts.items():
        if dataclasses.is_dataclass(value) and not isinstance(value, Mapping):
            object.__setattr__(clone, key, part)  # also in frozen dataclasses
        else:
            clone[key] = part
    return clone


def _walk(
    value: Any, path: str, owner: Any, depth: int, seen: dict[int, Any]
) -> Iterator[FoundTensor]:
    if isinstance(value, Tensor):
        yield FoundTensor(value, path, owner)
        return
    if isinstance(value, (*_PLAIN, type)) or not depth or id(value) in seen:
        return
    if _moves_itself(value) or callable(value):
        return
    seen[id(value)] = value  # which keeps the id in use
    for suffix, part in _named_contents(value):
        yield from _walk(part, path + suffix, value, depth - 1, seen)


def _named_contents(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the parts and the attributes of a value, with what leads to them in an expression."""
    parts = _parts(value)
    if parts is not None:
        has_fields = not isinstance(value, (Mapping, list, deque)) and (
            dataclasses.is_dataclass(value) or hasattr(value, "_fields")
        )
        for key, part in parts.items():
            yield f".{key}" if has_fields else f"[{key!r}]", part
    elif isinstance(value, (set, frozenset)):
        for part in value:
            yield " (an element)", part
    for name, attribute in _attributes(value):
        yield f".{name}", attribute


def _attributes(value: Any) -> Iterator[tuple[str, Any]]:
    yield from list(getattr(value, "__dict__", {}).items())
    for kind in type(value).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                yield name, getattr(value, name)


def _holds_tensors(value: Any, depth: int) -> bool:
    if isinstance(value, Tensor):
        return True
    if depth == 0 or isinstance(value, type) or callable(value):
        return False
    return any(_holds_tensors(part, depth - 1) for part in _contents(value))


def _contents(value: Any) -> Iterator[Any]:
    """Yield the parts of a container, or the attributes of another object."""
    parts = _parts(value)
    if parts is not None:
        yield from parts.values()
        return
    yield from (attribute for _, attribute in _attributes(value))
