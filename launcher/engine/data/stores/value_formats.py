"""Values as MosaicML Streaming and LitData store them, decoded from bytes."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import numpy as np
from numpy.typing import NDArray

from launcher.errors import RecipeError

Decode = Callable[[bytes], Any]

_ARRAY_TYPES = {
    8: "uint8",
    9: "int8",
    16: "uint16",
    17: "int16",
    18: "float16",
    32: "uint32",
    33: "int32",
    34: "float32",
    64: "uint64",
    65: "int64",
    66: "float64",
}
"""How MosaicML Streaming numbers the types of arrays."""

_LIT_ARRAYS = (
    *("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "float32", "float64", "complex64", "complex128", "bool"),
)
"""How LitData numbers the types of arrays."""

_LIT_TENSORS = (
    *("float32", "float32", "float64", "float64", "complex64", "complex64", "complex128"),
    *("complex128", "float16", "float16", "bfloat16", "uint8", "int8", "int16", "int16"),
    *("int32", "int32", "int64", "int64", "bool", "uint16"),
)
"""How LitData numbers the types of tensors."""


def mosaic_decoder(encoding: str, *, allow_pickle: bool) -> Decode:
    """Return a function that decodes values of an encoding of MosaicML Streaming.

    Raises:
        RecipeError: The encoding is unknown, or runs code and that is not allowed.
    """
    name, _, details = encoding.partition(":")
    if name in _NUMBERS:
        return _number(name)
    if name == "ndarray":
        dtype, _, shape = details.partition(":")
        return _array(dtype, tuple(map(int, shape.split(","))) if shape else None)
    simple: dict[str, Decode] = {
        "bytes": bytes,
        "str": _text,
        "int": lambda content: int.from_bytes(content, "little", signed=True),
        "str_int": lambda content: int(_text(content)),
        "str_float": lambda content: float(_text(content)),
        "str_decimal": lambda content: Decimal(_text(content)),
        "json": json.loads,
        "pil": _raw_image,
        "jpeg": _image,
        "png": _image,
    }
    return _known(simple, "MosaicML Streaming", name, allow_pickle=allow_pickle)


def lit_decoder(data_format: str, *, allow_pickle: bool) -> Decode:
    """Return a function that decodes values of a format of LitData.

    Raises:
        RecipeError: The format is unknown, or runs code and that is not allowed.
    """
    name, _, details = data_format.partition(":")
    if name == "no_header_numpy":
        dtype = np.dtype(_LIT_ARRAYS[int(details)])
        return lambda content: np.frombuffer(content, dtype).copy()
    if name == "no_header_tensor":
        return _flat_tensor(int(details))
    simple: dict[str, Decode] = {
        "bytes": bytes,
        "file": bytes,
        "str": _text,
        "text": _text,
        "bool": lambda content: content == b"\x01",
        "int": lambda content: int.from_bytes(content, "little", signed=True),
        "float": lambda content: float(np.frombuffer(content, "<f8")[0]),
        "numpy": _lit_array,
        "tensor": _lit_tensor,
        "pil": _raw_image,
        "jpeg": _image,
        "image": _image,
    }
    return _known(simple, "LitData", name, allow_pickle=allow_pickle)


def _known(simple: dict[str, Decode], library: str, name: str, *, allow_pickle: bool) -> Decode:
    if name in ("pkl", "pickle"):
        if not allow_pickle:
            raise RecipeError(
                "The samples contain pickled values, which run code when they are read. Set "
                "allow_pickle=True if you trust the files."
            )
        return pickle.loads
    if name not in simple:
        raise RecipeError(
            f"The samples contain values in the format {name!r} of {library}, which the launcher "
            f"does not read. It reads {', '.join(sorted(simple))} and arrays. Write the values as "
            "one of these, or as bytes that decode= decodes."
        )
    return simple[name]


_NUMBERS = {
    *("uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"),
    *("float16", "float32", "float64"),
}


def _number(name: str) -> Decode:
    dtype = np.dtype(name)
    return lambda content: np.frombuffer(content, dtype)[0]


def _text(content: bytes) -> str:
    return content.decode("utf-8")


def _array(fixed_type: str, fixed_shape: tuple[int, ...] | None) -> Decode:
    def read(content: bytes) -> NDArray[Any]:
        position, name, shape = 0, fixed_type, fixed_shape
        if not name:
            name, position = _ARRAY_TYPES[content[0]], 1
        if shape is None:
            num_axes, width = content[position] >> 2, 1 << content[position] % 4
            position += 1
            sizes = np.frombuffer(content, f"<u{width}", num_axes, position)
            shape, position = tuple(sizes.tolist()), position + num_axes * width
        return np.frombuffer(content, name, offset=position).reshape(shape).copy()

    return read


def _lit_array(content: bytes) -> NDArray[Any]:
    code, num_axes = np.frombuffer(content, "<u4", 2).tolist()
    shape = np.frombuffer(content, "<u4", num_axes, 8).tolist()
    dtype = np.dtype(_LIT_ARRAYS[code])
    return np.frombuffer(content, dtype, offset=8 + 4 * num_axes).reshape(shape).copy()


def _lit_tensor(content: bytes) -> Any:
    code, num_axes = np.frombuffer(content, ">u4", 2).tolist()
    shape = np.frombuffer(content, ">u4", num_axes, 8).tolist()
    return _flat_tensor(code)(content[8 + 4 * num_axes :]).reshape(shape)


def _flat_tensor(code: int) -> Decode:
    import torch

    dtype: torch.dtype = getattr(torch, _LIT_TENSORS[code])

    def read(content: bytes) -> torch.Tensor:
        # A bytearray, because torch warns of memory that cannot be written.
        return (
            torch.frombuffer(bytearray(content), dtype=dtype)
            if content
            else torch.empty(0, dtype=dtype)
        )

    return read


def _raw_image(content: bytes) -> Any:
    from PIL import Image

    width, height, num_letters = np.frombuffer(content, "<u4", 3).tolist()
    mode = _text(content[12 : 12 + num_letters])
    return Image.frombytes(mode, (width, height), content[12 + num_letters :])


def _image(content: bytes) -> Any:
    from PIL import Image

    image = Image.open(io.BytesIO(content))
    image.load()
    return image
