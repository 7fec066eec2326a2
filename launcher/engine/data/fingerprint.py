"""What a value of a data set holds, as a few plain numbers that can be kept and compared.

A description holds only what JSON has. Integers, texts and bytes are compared exactly. Floating
numbers and images are compared by their mean, standard deviation and some elements, within a
tolerance, because another CPU or JPEG decoder may differ in the last bit. Of an object of an
unknown type only the name of its type is known.
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

_SHORT_TEXT = 64
_LISTED = 16
"""Elements of a sequence or of an array of integers that are written out."""

_SAMPLED = 8
"""Elements of an array of floating numbers that are compared one by one."""

_SMALL_ARRAY = 256
"""Elements below which an array is no image, and is compared closely."""

_MOST_ELEMENTS = 1 << 20
"""Elements of which mean and standard deviation are taken, evenly spread over a larger array."""

_SMALL_BYTES = 64
"""Elements up to which an array of uint8 is compared exactly."""

_KEYS = 64
_DEPTH, _WIDE = 5, 2
"""Levels of nested containers that are looked into, and those of which more is written out."""

_SHOWN_CHARACTERS = 60
_CLOSE = 1e-4
_LOOSE_MEAN, _LOOSE_ELEMENT = 0.02, 0.1
"""Tolerances in standard deviations, for arrays as large as an image."""


class DataDifference(NamedTuple):
    """The first place at which two descriptions differ."""

    place: str
    """Where, as it would be indexed: `[1]['mask']`; empty for the whole."""

    one: str
    other: str


def describe(value: Any, depth: int = 0) -> Any:
    """Return the description of `value`; it never fails."""
    try:
        return _describe(value, depth)
    except Exception:  # noqa: BLE001  # whatever the user's own types raise
        return _unknown(value)


def difference(one: Any, other: Any, place: str = "") -> DataDifference | None:
    """Return the first difference between two descriptions, or None."""
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        pairs = [(f"[{number}]", *pair) for number, pair in enumerate(zip(one, other, strict=True))]
    elif _keys(one) is not None and _keys(one) == _keys(other):
        inside, against = one["mapping"], other["mapping"]
        pairs = [(f"[{key!r}]", inside[key], against[key]) for key in sorted(inside)]
    elif _equal(one, other):
        return None
    else:
        return DataDifference(place, *_shown_apart(one, other))
    found = (difference(a, b, f"{place}{key}") for key, a, b in pairs)
    return next((each for each in found if each is not None), None)


def same(one: Any, other: Any) -> bool:
    """Return whether two values are equal, NaN to NaN; objects that cannot be compared are."""
    try:
        return _same(one, other, 0)
    except Exception:  # noqa: BLE001  # whatever the user's own types raise
        return True


def shown(description: Any) -> str:
    """Return a description in a few words."""
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
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."


def _shown_apart(one: Any, other: Any) -> tuple[str, str]:
    """Return both descriptions in a few words, from where they differ if need be."""
    texts = shown(one), shown(other)
    if texts[0] != texts[1]:
        return texts
    whole = json.dumps(one), json.dumps(other)
    pairs = enumerate(zip(*whole, strict=False))
    start = next((place for place, (a, b) in pairs if a != b), 0)
    start = max(whole[0].rfind(" ", 0, start), 0)
    return (
        f"...{whole[0][start:][:_SHOWN_CHARACTERS]}",
        f"...{whole[1][start:][:_SHOWN_CHARACTERS]}",
    )


def _describe(value: Any, depth: int) -> Any:
    if value is None or isinstance(value, (bool, int, float, str, bytes, bytearray, memoryview)):
        return _describe_plain(value)
    array = _array(value)
    if array is not None:
        return _describe_array(array, _dtype_name(value), depth)
    children = _children(value)
    if children is None or depth >= _DEPTH:
        return _unknown(value)
    if isinstance(children, dict):
        return _describe_mapping(children, depth)
    return _describe_list(children, depth)


def _describe_mapping(children: dict[Any, Any], depth: int) -> Any:
    chosen = sorted(children, key=str)[:_KEYS]
    found = {str(key): describe(children[key], depth + 1) for key in chosen}
    return (
        {"mapping": found} if len(chosen) == len(children) else [len(children), {"mapping": found}]
    )


def _describe_list(children: list[Any], depth: int) -> Any:
    most = _LISTED if depth < _WIDE else _LISTED // 4
    first = [describe(each, depth + 1) for each in children[:most]]
    if len(children) <= most:
        return first
    if all(isinstance(each, (str, int)) for each in children):
        return {"list": first, "length": len(children), "sha256": _sum(repr(children).encode())}
    return {"mapping": {"length": len(children), "first": first}}


def _describe_plain(value: Any) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value)  # of an enumeration too
    if isinstance(value, float):
        return _number(value)
    if isinstance(value, str) and len(value) <= _SHORT_TEXT:
        return str(value)
    if isinstance(value, str):
        return {"text": value[:32], "length": len(value), "sha256": _sum(value.encode())}
    return {"bytes": len(value), "sha256": _sum(bytes(value))}


def _children(value: Any) -> dict[Any, Any] | list[Any] | None:
    """Return what a container holds; None for anything else."""
    if isinstance(value, Mapping):
        return {key: value[key] for key in value}
    if isinstance(value, (list, tuple)):
        return list(value)
    if isinstance(value, AbstractSet):
        plain = all(isinstance(each, (str, int)) for each in value)
        return sorted(value, key=repr) if plain else None
    if is_dataclass(value) and not isinstance(value, type):
        return {item.name: getattr(value, item.name, None) for item in fields(value)}
    image = sys.modules.get("PIL.Image")
    if image is not None and isinstance(value, image.Image):
        return {"mode": value.mode, "pixels": np.asarray(value)}
    return None


def _array(value: Any) -> NDArray[Any] | None:
    """Return the numbers of a tensor, an array or a NumPy scalar; None for anything else."""
    if isinstance(value, Tensor):
        tensor = value.detach()
        if tensor.is_quantized:
            tensor = tensor.dequantize()
        if tensor.layout != torch.strided:
            tensor = tensor.to_dense()
        tensor = tensor.cpu().resolve_conj().resolve_neg()
        wide = tensor.is_floating_point() and tensor.dtype not in (torch.float32, torch.float64)
        found: NDArray[Any] = (tensor.double() if wide else tensor).numpy()
        return found
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
    if kind == "f" or (array.dtype == np.uint8 and array.size > _SMALL_BYTES):
        return {"array": name, **_moments(array.ravel())}
    if array.size <= _LISTED and kind in "biu":
        return {"array": name, "values": array.ravel().tolist()}
    values = array.ravel()[:_SAMPLED].tolist() if kind in "biu" else []
    return {
        "array": name,
        "values": values,
        "sha256": _sum(np.ascontiguousarray(array).tobytes()),
    }


def _moments(flat: NDArray[Any]) -> dict[str, Any]:
    size = flat.size
    flat = flat[:: max(size // _MOST_ELEMENTS, 1)]
    flat = flat.astype(np.float64)
    finite = flat[np.isfinite(flat)]
    # Spread over the whole: the border of an image is often of one colour.
    chosen = flat[np.linspace(0, flat.size - 1, min(_SAMPLED, flat.size)).astype(int)]
    return {
        "size": int(size),
        "not_finite": int(flat.size - finite.size),
        "mean": _number(float(finite.mean())) if finite.size else 0.0,
        "std": _number(float(finite.std())) if finite.size else 0.0,
        "values": [_number(float(each)) for each in chosen],
    }


def _number(value: float) -> Any:
    """Return six digits of a number; JSON has no NaN and no infinity."""
    return float(f"{value:.6g}") if math.isfinite(value) else {"float": str(value)}


def _unknown(value: Any) -> dict[str, str]:
    # Without its module, which is called __main__ where a recipe's file is run.
    return {"type": type(value).__qualname__}


def _sum(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _keys(description: Any) -> Any:
    """Return the keys of a described mapping; None for anything else."""
    found = description.get("mapping") if isinstance(description, dict) else None
    return None if found is None else found.keys()


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, dict) and isinstance(other, dict) and "mean" in one and "mean" in other:
        return _arrays_agree(one, other)
    if isinstance(one, float) and isinstance(other, float):
        return _near(one, other, 0.0)
    return type(one) is type(other) and bool(one == other)


def _arrays_agree(one: dict[str, Any], other: dict[str, Any]) -> bool:
    if any(one[key] != other[key] for key in ("array", "not_finite")):
        return False
    small = one["size"] < _SMALL_ARRAY
    scale = max(one["std"], other["std"])
    loose = _CLOSE if small else _LOOSE_MEAN
    if not (_near(one["mean"], other["mean"], loose * scale)):
        return False
    if not (_near(one["std"], other["std"], loose * scale + _CLOSE * abs(one["mean"]))):
        return False
    slack = (_CLOSE if small else _LOOSE_ELEMENT) * scale
    pairs = zip(one["values"], other["values"], strict=True)
    return all(
        _near(a, b, slack) if isinstance(a, float) and isinstance(b, float) else a == b
        for a, b in pairs
    )


def _near(one: float, other: float, slack: float) -> bool:
    return abs(one - other) <= slack + _CLOSE * max(abs(one), abs(other))


def _same(one: Any, other: Any, depth: int) -> bool:
    array, against = _array(one), _array(other)
    if array is not None and against is not None:
        return _dtype_name(one) == _dtype_name(other) and _same_arrays(array, against, depth)
    if type(one) is not type(other):
        return False
    if isinstance(one, (str, bytes, int, float)):
        return bool(one == other or (one != one and other != other))  # noqa: PLR0124  # NaN
    inside, within = _children(one), _children(other)
    if inside is None or within is None or depth > _DEPTH:
        return True  # None, or what cannot be compared
    if isinstance(inside, dict) and isinstance(within, dict):
        if inside.keys() != within.keys():
            return False
        inside, within = list(inside.values()), [within[key] for key in inside]
    return len(inside) == len(within) and all(
        _same(a, b, depth + 1) for a, b in zip(inside, within, strict=True)
    )


def _same_arrays(one: NDArray[Any], other: NDArray[Any], depth: int) -> bool:
    if one.dtype.kind == "O":
        return _same(one.tolist(), other.tolist(), depth + 1)
    return np.array_equal(one, other, equal_nan=one.dtype.kind in "fcmM")


def classes_of(dataset: Any) -> Any:
    """Return the description of a data set's classes in their order; None where it names none.

    torchvision's data sets call them `classes` or `class_to_idx`; data sets that wrap another have
    it as `dataset`.
    """
    try:
        for each in _wrapped(dataset):
            for name in ("class_to_idx", "classes"):
                found = getattr(each, name, None)
                if isinstance(found, Mapping):
                    return describe([f"{key} {value}" for key, value in found.items()])
                if isinstance(found, (list, tuple)):
                    return describe(list(found))
    except Exception:  # noqa: BLE001  # whatever the user's own attributes raise
        return None
    return None


def _wrapped(dataset: Any) -> Iterator[Any]:
    for _ in range(_DEPTH):
        if dataset is None:
            return
        yield dataset
        dataset = getattr(dataset, "dataset", None)
