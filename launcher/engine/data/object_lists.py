"""Long lists of Python objects in a data set, of which each forked worker gets a copy.

A forked process shares the memory of its parent until one of them writes to it. Reading a Python
object writes to it, because it holds a count of its references, and so its page is copied. Numbers
in one array have no such counts.
"""

from __future__ import annotations

import itertools
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

_MIN_LENGTH = 10_000
"""Length from which on a container is looked at."""

_NUM_SAMPLED = 1_000
"""Elements of a container whose sizes are read."""

_MAX_DEPTH, _MAX_ATTRIBUTES = 6, 10_000
"""How deep attributes are followed, and how many in all."""

_ELEMENT_DEPTH = 4
"""How deep the elements of a container are followed."""

_PLAIN = (str, bytes, int, float, complex, bool, type(None), type)


@dataclass(frozen=True, kw_only=True)
class ObjectList:
    """A container of many Python objects."""

    name: str
    """Where it is, such as `train.samples`."""

    kind: str
    """The type of the container."""

    length: int
    """Number of its elements."""

    objects: int
    """Estimated number of objects in it, elements of elements included."""

    growth_bytes: int
    """Estimated memory of these objects, by which a forked worker grows as it reads them."""


def find_object_lists(name: str, data: Any) -> list[ObjectList]:
    """Return the long containers of Python objects that a data set holds, the largest first.

    Attributes are followed, also those of data sets that it wraps; what functions refer to is not.

    Args:
        name: The name of the data set, with which names begin.
        data: The data set.
    """
    found = []
    seen: set[int] = set()
    queue = deque([(name, data, 0)])
    while queue and len(seen) < _MAX_ATTRIBUTES:
        place, value, depth = queue.popleft()
        if isinstance(value, _PLAIN) or id(value) in seen:
            continue
        seen.add(id(value))
        length = _length_of(value)
        if length >= _MIN_LENGTH:
            found.append(_measure(place, value, length))
        elif depth < _MAX_DEPTH:
            queue.extend((inner, each, depth + 1) for inner, each in _parts(place, value))
    found = [each for each in found if each.growth_bytes]
    return sorted(found, key=lambda each: -each.growth_bytes)


def _length_of(value: Any) -> int:
    """Return the number of elements of a container of objects; 0 for all other values."""
    if isinstance(value, np.ndarray):
        return value.size if value.dtype.hasobject else 0
    if type(value) in (list, tuple, set, frozenset, deque) or isinstance(value, dict):
        return len(value)
    return 0


def _parts(place: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield what a value refers to, with names; nothing that a property would compute."""
    if isinstance(value, dict):
        yield from ((f"{place}[{key!r}]", each) for key, each in value.items())
    elif isinstance(value, (list, tuple, deque)):
        yield from ((f"{place}[{index}]", each) for index, each in enumerate(value))
    elif type(value).__module__.partition(".")[0] == "pandas":
        yield from _columns(place, value)
    elif not isinstance(value, type(sys)):
        attributes = getattr(value, "__dict__", None)
        if isinstance(attributes, dict):
            yield from ((f"{place}.{key}", each) for key, each in attributes.items())
        for slot in _slots(type(value)):
            try:
                yield f"{place}.{slot}", object.__getattribute__(value, slot)
            except AttributeError:
                continue


def _slots(kind: type) -> Iterator[str]:
    for each in kind.__mro__:
        names = each.__dict__.get("__slots__", ())
        yield from [names] if isinstance(names, str) else names


def _columns(place: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the columns of objects of a table of pandas, as arrays of NumPy."""
    try:
        if hasattr(value, "columns"):
            for position, name in enumerate(value.columns):
                yield f"{place}[{name!r}]", value.iloc[:, position].array
        elif hasattr(value, "array"):
            yield place, value.array
        elif hasattr(value, "to_numpy") and value.dtype == object:
            yield place, value.to_numpy()
        elif isinstance(getattr(value, "_ndarray", None), np.ndarray):  # an array of strings
            yield place, value._ndarray  # noqa: SLF001
    except Exception:  # noqa: BLE001  # another version of pandas
        return


def _measure(place: str, value: Any, length: int) -> ObjectList:
    """Estimate the objects of a container from some of its elements."""
    sampled = 0
    objects, num_bytes = 0, 0
    seen: set[int] = set()
    for element in _some(value, length):
        sampled += 1
        for part in element if isinstance(value, dict) else (element,):
            for each in _objects_of(part, seen, 0):
                objects += 1
                num_bytes += sys.getsizeof(each)
    scale = length / max(sampled, 1)
    kind = "array of objects" if isinstance(value, np.ndarray) else type(value).__name__
    return ObjectList(
        name=place,
        kind=kind,
        length=length,
        objects=round(objects * scale),
        growth_bytes=round(num_bytes * scale),
    )


def _some(value: Any, length: int) -> Iterable[Any]:
    """Return elements spread evenly over a container."""
    step = max(length // _NUM_SAMPLED, 1)
    if isinstance(value, np.ndarray):
        return list(value.flat[::step])
    if isinstance(value, (list, tuple)):
        return value[::step]
    elements = value.items() if isinstance(value, dict) else value
    return itertools.islice(elements, 0, None, step)


def _objects_of(value: Any, seen: set[int], depth: int) -> Iterator[Any]:
    """Yield an object and what it holds, each once; not what all of Python shares."""
    is_shared = value is None or isinstance(value, (bool, type))
    if is_shared or (isinstance(value, int) and -5 <= value <= 256) or id(value) in seen:
        return
    seen.add(id(value))
    yield value
    if depth == _ELEMENT_DEPTH:
        return
    if isinstance(value, dict):
        for pair in value.items():
            for each in pair:
                yield from _objects_of(each, seen, depth + 1)
    elif type(value) in (list, tuple, set, frozenset):
        for each in value:
            yield from _objects_of(each, seen, depth + 1)
    elif isinstance(getattr(value, "__dict__", None), dict):
        for each in vars(value).values():
            yield from _objects_of(each, seen, depth + 1)
