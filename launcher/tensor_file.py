"""Safetensors files: what one says it holds, and new ones from its tensors, copied as bytes.

A file begins with the length of its header in 8 bytes, and with the header, which is JSON. The
bytes of the tensors follow without gaps.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, BinaryIO

import msgspec
from msgspec import Meta

from launcher.errors import RunDirError
from launcher.json_file import Count, DamagedJSONError, decode_json
from launcher.regular_file import open_regular

_MAX_HEADER_BYTES = 100_000_000
"""Longest header, as in safetensors itself."""

_LENGTH_BYTES = 8
"""Bytes that hold the length of the header."""

_CHUNK_BYTES = 1 << 23
"""Bytes that are copied at once."""

_ALIGNMENT = 8
"""The bytes of the tensors begin at a multiple of this, padded with blanks."""


@dataclass(frozen=True)
class _Entry:
    dtype: Annotated[str, Meta(max_length=100)]
    shape: tuple[Count, ...]
    data_offsets: tuple[Count, Count]


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A tensor in a safetensors file."""

    dtype: str
    """Type of its elements in the words of the format, such as F32 and BF16."""

    shape: tuple[int, ...]
    """Its sizes."""

    start: int
    """Where its bytes begin in the file."""

    num_bytes: int
    """Number of its bytes."""


@dataclass(frozen=True, kw_only=True)
class TensorFile:
    """The header of a safetensors file."""

    path: Path
    """The file."""

    tensors: Mapping[str, StoredTensor]
    """Its tensors by name, in their order in the file."""

    metadata: Mapping[str, str]
    """Further texts by name."""


def read_tensor_file(path: Path) -> TensorFile:
    """Return what the header of a safetensors file says.

    Raises:
        RunDirError: The file cannot be read, or is damaged or cut off.
    """
    try:
        with open_regular(path) as file:
            size = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            header = file.read(size) if size <= _MAX_HEADER_BYTES else b""
            num_bytes = file.seek(0, os.SEEK_END)
    except OSError as error:
        raise RunDirError(f"{path} cannot be read: {error.strerror or error}.") from None
    try:
        values = decode_json(header, dict[str, object])
        metadata = msgspec.convert(values.pop("__metadata__", {}), dict[str, str])
        entries = msgspec.convert(values, dict[str, _Entry])
    except (DamagedJSONError, msgspec.ValidationError):
        raise RunDirError(f"{path} is damaged, or is not a safetensors file.") from None
    position = 0
    tensors = {}
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        start, stop = entry.data_offsets
        if start != position or stop < start:
            raise RunDirError(f"{path} is damaged: the bytes of {name} are out of place.")
        tensors[name] = StoredTensor(
            dtype=entry.dtype,
            shape=entry.shape,
            start=_LENGTH_BYTES + size + start,
            num_bytes=stop - start,
        )
        position = stop
    if _LENGTH_BYTES + size + position != num_bytes:
        raise RunDirError(
            f"{path} is cut off or damaged: it has {num_bytes:,} bytes, and its header describes "
            f"{_LENGTH_BYTES + size + position:,}."
        )
    return TensorFile(path=path, tensors=tensors, metadata=metadata)


def encode_header(
    tensors: Iterable[tuple[str, str, Sequence[int], int]], metadata: Mapping[str, str]
) -> bytes:
    """Return the beginning of a safetensors file, up to the bytes of the first tensor.

    Args:
        tensors: Name, dtype in the words of the format, shape and number of bytes of each tensor,
            in the order in which their bytes follow.
        metadata: Further texts by name.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    position = 0
    for name, dtype, shape, num_bytes in tensors:
        offsets = position, position + num_bytes
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}
        position += num_bytes
    text = msgspec.json.encode(header)  # as compact as that of safetensors itself
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def copy_tensors(
    source: TensorFile, target: Path, names: Mapping[str, str], metadata: Mapping[str, str]
) -> None:
    """Write a new safetensors file with some of the tensors of another one.

    Little more than a few megabytes of memory are needed, whatever the size of the tensors.

    Args:
        source: The file that has the tensors.
        target: The file to write.
        names: Names of tensors in `source`, and their names in `target`.
        metadata: Further texts for the header of `target`.

    Raises:
        OSError: One of the files cannot be read or written.
    """
    # In the order of the source, so that tensors stay aligned to the size of their elements.
    copied = [(name, tensor) for name, tensor in source.tensors.items() if name in names]
    header = encode_header(
        [(names[name], tensor.dtype, tensor.shape, tensor.num_bytes) for name, tensor in copied],
        metadata,
    )
    with source.path.open("rb") as reader, target.open("xb") as writer:
        writer.write(header)
        for _, tensor in copied:
            _copy_bytes(reader, writer, tensor)
        writer.flush()
        os.fsync(writer.fileno())


def _copy_bytes(reader: BinaryIO, writer: BinaryIO, tensor: StoredTensor) -> None:
    reader.seek(tensor.start)
    remaining = tensor.num_bytes
    while remaining:
        chunk = reader.read(min(remaining, _CHUNK_BYTES))
        if not chunk:
            raise OSError("the file with the weights became shorter while it was read")
        writer.write(chunk)
        remaining -= len(chunk)
