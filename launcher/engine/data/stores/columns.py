"""Single values of Arrow columns, read much faster than through Arrow's own scalars."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa

Getter = Callable[[int], Any]
"""Returns the value of a row of a column."""


def getter(array: pa.Array) -> Getter:
    """Return a function that reads single values of an array.

    Numbers are numpy scalars, lists of numbers are numpy arrays, text is str and binary data is
    bytes. Other types are what Arrow's `as_py` returns. A null is None.
    """
    import pyarrow as pa

    kind = array.type
    if isinstance(kind, pa.ExtensionType):
        return getter(array.storage) if not _is_tensor(kind) else _tensors(array)
    if pa.types.is_dictionary(kind):
        return getter(array.cast(kind.value_type))
    get: Getter | None = None
    if _is_number(kind):
        get = _numbers(array).__getitem__
    elif _is_bytes(kind):
        get = _bytes(array)
    elif _is_list(kind) and _is_number(kind.value_type):
        get = _lists(array)
    if get is None:
        return lambda row: array[row].as_py()
    return _nullable(get, array) if array.null_count else get


def _nullable(get: Getter, array: pa.Array) -> Getter:
    is_null = array.is_null().to_numpy(zero_copy_only=False)
    return lambda row: None if is_null[row] else get(row)


def _is_number(kind: pa.DataType) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or kind == pa.bool_())


def _is_bytes(kind: pa.DataType) -> bool:
    import pyarrow as pa

    return kind in (pa.binary(), pa.large_binary(), pa.string(), pa.large_string())


def _is_list(kind: pa.DataType) -> bool:
    import pyarrow as pa

    types = pa.types
    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))


def _is_tensor(kind: pa.DataType) -> bool:
    import pyarrow as pa

    return isinstance(kind, pa.FixedShapeTensorType) and _is_number(kind.value_type)


def _numbers(array: pa.Array) -> np.ndarray[Any, Any]:
    """Return the numbers of an array, in which the value of a null is arbitrary."""
    import pyarrow as pa

    if array.type == pa.bool_():
        if array.null_count:
            array = array.fill_null(False)
        return np.asarray(array.to_numpy(zero_copy_only=False), bool)
    dtype = np.dtype(array.type.to_pandas_dtype())
    buffer = array.buffers()[1]
    if buffer is None:
        return np.zeros(len(array), dtype)
    offset = array.offset * dtype.itemsize
    return np.frombuffer(buffer, dtype, len(array), offset)


def _offsets(array: pa.Array) -> list[int] | np.ndarray[Any, Any]:
    import pyarrow as pa

    is_large = pa.types.is_large_list(array.type) or array.type in (
        pa.large_binary(),
        pa.large_string(),
    )
    dtype = np.dtype(np.int64 if is_large else np.int32)
    buffer = array.buffers()[1]
    if buffer is None or not len(array):
        return np.zeros(len(array) + 1, dtype)
    return np.frombuffer(buffer, dtype, len(array) + 1, array.offset * dtype.itemsize)


def _bytes(array: pa.Array) -> Getter:
    import pyarrow as pa

    offsets = _offsets(array)
    content = memoryview(array.buffers()[2] or b"")
    if array.type in (pa.string(), pa.large_string()):
        return lambda row: str(content[offsets[row] : offsets[row + 1]], "utf-8")
    return lambda row: bytes(content[offsets[row] : offsets[row + 1]])


def _lists(array: pa.Array) -> Getter:
    import pyarrow as pa

    # Arrow's memory cannot be written, and torch warns of tensors that share it.
    if pa.types.is_fixed_size_list(array.type):
        width = array.type.list_size
        fixed = getter_of_elements(array.values)
        start = array.offset
        return lambda row: fixed((start + row) * width, (start + row + 1) * width)
    offsets, read = _offsets(array), getter_of_elements(array.values)
    return lambda row: read(offsets[row], offsets[row + 1])


def getter_of_elements(values: pa.Array) -> Callable[[int, int], Any]:
    """Return a function that copies a range of an array of numbers.

    A range with nulls becomes a list, in which None stands for a null.
    """
    numbers = _numbers(values)
    if not values.null_count:
        return lambda start, stop: numbers[start:stop].copy()
    is_null = values.is_null().to_numpy(zero_copy_only=False)

    def read(start: int, stop: int) -> Any:
        if is_null[start:stop].any():
            return values[int(start) : int(stop)].to_pylist()
        return numbers[start:stop].copy()

    return read


def _tensors(array: pa.Array) -> Getter:
    shape, read = tuple(array.type.shape), _lists(array.storage)
    get: Getter = lambda row: read(row).reshape(shape)  # noqa: E731
    return _nullable(get, array) if array.null_count else get
