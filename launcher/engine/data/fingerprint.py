"""Descriptions of samples that can be saved as JSON and compared.

Integers, strings and bytes are compared exactly. Floating-point numbers and images are compared by
their mean, standard deviation and some elements, within a tolerance, because the results of
different CPUs or JPEG decoders may differ slightly. An object of an unknown type is described by
the name of its type alone.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_MAX_TEXT = 64
"""Number of characters up to which a string is described in full."""

_MAX_LISTED = 16
"""Number of elements of a sequence or an integer array that a description lists."""

_NUM_SAMPLED = 8
"""Number of elements of a floating-point array that are compared one by one."""

_MIN_IMAGE_SIZE = 256
"""Number of elements from which an array counts as an image, with looser tolerances."""

_MAX_ELEMENTS = 1 << 20
"""Number of elements, evenly spaced, from which the moments of a larger array are computed."""

_MAX_EXACT_BYTES = 64
"""Number of elements up to which a uint8 array is compared exactly."""

_MAX_KEYS = 64
"""Number of keys of a mapping that are described."""

_MAX_DEPTH, _LONG_LIST_DEPTH = 5, 2
"""Nesting depth down to which containers are described, and down to which lists are long."""

_MAX_SHOWN = 60
"""Number of characters of a description in a message."""

_TOLERANCE = 1e-4
"""Relative tolerance; for small arrays, also the tolerance in standard deviations."""

_IMAGE_MOMENT_TOLERANCE, _IMAGE_ELEMENT_TOLERANCE = 0.02, 0.1
"""Tolerances in standard deviations for arrays as large as an image."""


class DataDifference(NamedTuple):
    """The first difference between two descriptions."""

    place: str
    """The indices of the differing element, such as `[1]['mask']`; empty for the value itself."""

    one: str
    """The first element, formatted for a message."""

    other: str
    """The second element, formatted for a message."""


def describe(value: Any, depth: int = 0) -> Any:
    """Return a description of `value` that JSON can hold; never raise an exception.

    Args:
        value: Any object.
        depth: The number of containers around it. Deeper values are described with less detail.
    """
    try:
        return _describe(value, depth)
    except Exception:  # noqa: BLE001  # user-defined types may raise anything
        return _describe_type(value)


def first_difference(one: Any, other: Any, place: str = "") -> DataDifference | None:
    """Return the first difference between two descriptions, or None if they agree.

    Args:
        one: A description.
        other: Another description.
        place: The indices of both in the values that are compared, as in `DataDifference.place`.
    """
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        pairs = [(f"[{index}]", *pair) for index, pair in enumerate(zip(one, other, strict=True))]
    elif _keys(one) is not None and _keys(one) == _keys(other):
        mapping, other_mapping = one["mapping"], other["mapping"]
        pairs = [(f"[{key!r}]", mapping[key], other_mapping[key]) for key in sorted(mapping)]
    elif _descriptions_agree(one, other):
        return None
    else:
        return DataDifference(place, *_format_difference(one, other))
    differences = (first_difference(a, b, f"{place}{key}") for key, a, b in pairs)
    return next((item for item in differences if item is not None), None)


def are_equal(one: Any, other: Any) -> bool:
    """Return whether two values are equal.

    NaN equals NaN. Objects that cannot be compared count as equal.
    """
    try:
        return _same(one, other, 0)
    except Exception:  # noqa: BLE001  # user-defined types may raise anything
        return True


def format_description(description: Any) -> str:
    """Format a description for a message, shortened to about 60 characters."""
    if isinstance(description, dict):
        if "array" in description:
            values = ", ".join(map(str, description["values"][:4]))
            text = f"{description['array']} {values}"
        elif "type" in description:
            text = f"a {description['type']}"
        else:
            text = json.dumps(next(iter(description.values())), ensure_ascii=False)
    else:
        text = json.dumps(description, ensure_ascii=False)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."


def _format_difference(one: Any, other: Any) -> tuple[str, str]:
    """Format two descriptions; if they look the same, start where they differ."""
    texts = format_description(one), format_description(other)
    if texts[0] != texts[1]:
        return texts
    full_texts = json.dumps(one), json.dumps(other)
    characters = enumerate(zip(*full_texts, strict=False))
    start = next((index for index, (a, b) in characters if a != b), 0)
    start = max(full_texts[0].rfind(" ", 0, start), 0)
    return (
        f"...{full_texts[0][start:][:_MAX_SHOWN]}",
        f"...{full_texts[1][start:][:_MAX_SHOWN]}",
    )


def _describe(value: Any, depth: int) -> Any:
    if value is None or isinstance(value, (bool, int, float, str, bytes, bytearray, memoryview)):
        return _describe_plain(value)
    array = _to_array(value)
    if array is not None:
        return _describe_array(array, _dtype_name(value), depth)
    children = _children(value)
    if children is None or depth >= _MAX_DEPTH:
        return _describe_type(value)
    if isinstance(children, dict):
        return _describe_mapping(children, depth)
    return _describe_list(children, depth)


def _describe_mapping(children: dict[Any, Any], depth: int) -> Any:
    keys = sorted(children, key=str)[:_MAX_KEYS]
    mapping = {str(key): describe(children[key], depth + 1) for key in keys}
    return (
        {"mapping": mapping}
        if len(keys) == len(children)
        else [len(children), {"mapping": mapping}]
    )


def _describe_list(children: list[Any], depth: int) -> Any:
    max_listed = _MAX_LISTED if depth < _LONG_LIST_DEPTH else _MAX_LISTED // 4
    first = [describe(child, depth + 1) for child in children[:max_listed]]
    if len(children) <= max_listed:
        return first
    if all(isinstance(child, (str, int)) for child in children):
        return {"list": first, "length": len(children), "sha256": _digest(repr(children).encode())}
    return {"mapping": {"length": len(children), "first": first}}


def _describe_plain(value: Any) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value)  # int() also converts members of enumerations
    if isinstance(value, float):
        return _describe_float(value)
    if isinstance(value, str) and len(value) <= _MAX_TEXT:
        return str(value)
    if isinstance(value, str):
        return {"text": value[:32], "length": len(value), "sha256": _digest(value.encode())}
    return {"bytes": len(value), "sha256": _digest(bytes(value))}


def _children(value: Any) -> dict[Any, Any] | list[Any] | None:
    """Return the elements of a container, or None if the value is not one."""
    if isinstance(value, Mapping):
        return {key: value[key] for key in value}
    if isinstance(value, (list, tuple)):
        return list(value)
    if isinstance(value, AbstractSet):
        is_sortable = all(isinstance(item, (str, int)) for item in value)
        return sorted(value, key=repr) if is_sortable else None
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name, None) for field in fields(value)}
    image = sys.modules.get("PIL.Image")
    if image is not None and isinstance(value, image.Image):
        return {"mode": value.mode, "pixels": np.asarray(value)}
    return None


def _to_array(value: Any) -> NDArray[Any] | None:
    """Return a tensor, an array or a NumPy scalar as a NumPy array; None for other values."""
    if isinstance(value, Tensor):
        tensor = value.detach()
        if tensor.is_quantized:
            tensor = tensor.dequantize()
        if tensor.layout != torch.strided:
            tensor = tensor.to_dense()
        tensor = tensor.cpu().resolve_conj().resolve_neg()
        # NumPy has no bfloat16 and no float8.
        is_small = tensor.is_floating_point() and tensor.dtype not in (torch.float32, torch.float64)
        array: NDArray[Any] = (tensor.double() if is_small else tensor).numpy()
        return array
    return np.asarray(value) if isinstance(value, (np.ndarray, np.generic)) else None


def _dtype_name(value: Any) -> str:
    return str(value.dtype).removeprefix("torch.")


def _describe_array(array: NDArray[Any], dtype: str, depth: int) -> Any:
    name = f"{dtype} {array.shape}"
    kind = array.dtype.kind
    if kind == "O":
        return [name, describe(array.ravel().tolist(), depth + 1)]
    if kind == "c":
        array, kind = np.stack([array.real, array.imag]), "f"
    if kind == "f" or (array.dtype == np.uint8 and array.size > _MAX_EXACT_BYTES):
        return {"array": name, **_moments(array.ravel())}
    if array.size <= _MAX_LISTED and kind in "biu":
        return {"array": name, "values": array.ravel().tolist()}
    values = array.ravel()[:_NUM_SAMPLED].tolist() if kind in "biu" else []
    return {
        "array": name,
        "values": values,
        "sha256": _digest(np.ascontiguousarray(array).tobytes()),
    }


def _moments(flat: NDArray[Any]) -> dict[str, Any]:
    """Return the size, mean, standard deviation and some elements of an array of shape (N,)."""
    size = flat.size
    flat = flat[:: max(size // _MAX_ELEMENTS, 1)]
    flat = flat.astype(np.float64)
    finite = flat[np.isfinite(flat)]
    # Evenly spaced, because the border of an image often has a single colour.
    sampled = flat[np.linspace(0, flat.size - 1, min(_NUM_SAMPLED, flat.size)).astype(int)]
    return {
        "size": int(size),
        "not_finite": int(flat.size - finite.size),
        "mean": _describe_float(float(finite.mean())) if finite.size else 0.0,
        "std": _describe_float(float(finite.std())) if finite.size else 0.0,
        "values": [_describe_float(float(element)) for element in sampled],
    }


def _describe_float(value: float) -> Any:
    """Return a number with six digits, or a dict for NaN and infinities, which JSON lacks."""
    return float(f"{value:.6g}") if math.isfinite(value) else {"float": str(value)}


def _describe_type(value: Any) -> dict[str, str]:
    # The module is omitted, because it is __main__ when a recipe's file is run as a script.
    return {"type": type(value).__qualname__}


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _keys(description: Any) -> Any:
    """Return the keys of a described mapping, or None for other descriptions."""
    mapping = description.get("mapping") if isinstance(description, dict) else None
    return None if mapping is None else mapping.keys()


def _descriptions_agree(one: Any, other: Any) -> bool:
    if isinstance(one, dict) and isinstance(other, dict) and "mean" in one and "mean" in other:
        return _arrays_agree(one, other)
    if isinstance(one, float) and isinstance(other, float):
        return _are_close(one, other, 0.0)
    return type(one) is type(other) and bool(one == other)


def _arrays_agree(one: dict[str, Any], other: dict[str, Any]) -> bool:
    if any(one[key] != other[key] for key in ("array", "not_finite")):
        return False
    is_small = one["size"] < _MIN_IMAGE_SIZE
    std = max(one["std"], other["std"])
    moment_tolerance = (_TOLERANCE if is_small else _IMAGE_MOMENT_TOLERANCE) * std
    if not _are_close(one["mean"], other["mean"], moment_tolerance):
        return False
    std_tolerance = moment_tolerance + _TOLERANCE * abs(one["mean"])
    if not _are_close(one["std"], other["std"], std_tolerance):
        return False
    element_tolerance = (_TOLERANCE if is_small else _IMAGE_ELEMENT_TOLERANCE) * std
    pairs = zip(one["values"], other["values"], strict=True)
    return all(
        _are_close(a, b, element_tolerance)
        if isinstance(a, float) and isinstance(b, float)
        else a == b
        for a, b in pairs
    )


def _are_close(one: float, other: float, tolerance: float) -> bool:
    return abs(one - other) <= tolerance + _TOLERANCE * max(abs(one), abs(other))


def _same(one: Any, other: Any, depth: int) -> bool:
    array, other_array = _to_array(one), _to_array(other)
    if array is not None and other_array is not None:
        return _dtype_name(one) == _dtype_name(other) and _same_arrays(array, other_array, depth)
    if type(one) is not type(other):
        return False
    if isinstance(one, (str, bytes, int, float)):
        return bool(one == other or (one != one and other != other))  # noqa: PLR0124  # NaN
    children, other_children = _children(one), _children(other)
    if children is None or other_children is None or depth > _MAX_DEPTH:
        return True  # both are None, or cannot be compared
    if isinstance(children, dict) and isinstance(other_children, dict):
        if children.keys() != other_children.keys():
            return False
        keys = list(children)
        children, other_children = (
            [children[key] for key in keys],
            [other_children[key] for key in keys],
        )
    return len(children) == len(other_children) and all(
        _same(a, b, depth + 1) for a, b in zip(children, other_children, strict=True)
    )


def _same_arrays(one: NDArray[Any], other: NDArray[Any], depth: int) -> bool:
    if one.dtype.kind == "O":
        return _same(one.tolist(), other.tolist(), depth + 1)
    return np.array_equal(one, other, equal_nan=one.dtype.kind in "fcmM")


def describe_classes(dataset: Any) -> Any:
    """Return a description of a data set's classes in order, or None if it does not name them.

    The names come from the attribute `class_to_idx` or `classes`, as in torchvision, of the data
    set or of one that it wraps as `dataset`.
    """
    try:
        for inner_dataset in _unwrap(dataset):
            for name in ("class_to_idx", "classes"):
                classes = getattr(inner_dataset, name, None)
                if isinstance(classes, Mapping):
                    return describe([f"{key} {value}" for key, value in classes.items()])
                if isinstance(classes, (list, tuple)):
                    return describe(list(classes))
    except Exception:  # noqa: BLE001  # user-defined attributes may raise anything
        return None
    return None


def _unwrap(dataset: Any) -> Iterator[Any]:
    """Yield a data set and the data sets that it wraps, from the outside in."""
    for _ in range(_MAX_DEPTH):
        if dataset is None:
            return
        yield dataset
        dataset = getattr(dataset, "dataset", None)
