"""Descriptions of data sets as a whole, so that a run refuses to resume on changed data.

They depend on names, sizes and samples of contents, and not on folders or times, so copies of the
data on several nodes agree. Each costs a few milliseconds whatever the size of the data set.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from launcher.engine.data.fingerprint import describe

_MAX_DEPTH = 5
"""Number of data sets, one inside the other, that are described."""

_MAX_FILES = 64
"""Number of files, evenly spaced, whose sizes and contents are looked at."""

_NUM_BLOCKS, _BLOCK_BYTES = 4, 4096
"""Number and size of the pieces of a file, evenly spaced, that are read."""

_NUM_ELEMENTS, _NUM_SEGMENTS = 1 << 16, 16
"""Number of elements of a tensor, evenly spaced, that are looked at, and of their groups."""

_NUM_ROWS = 16
"""Number of rows of a table, evenly spaced, that are looked at."""

_MAX_TEXT = 200
"""Longest fingerprint of a data set's own that is kept as it is."""


def describe_index(dataset: Any) -> Any:
    """Return a description of a data set that changes with its files or its contents, or None.

    It is the result of the data set's own `fingerprint()`, or that of a kind that is known: a
    TensorDataset, an ImageFolder, a Hugging Face data set, memory-mapped arrays, and what wraps
    them. `fingerprint.first_difference` compares two descriptions.
    """
    try:
        return _describe(dataset, 0)
    except Exception:  # noqa: BLE001  # the attributes of a recipe's data set may raise anything
        return None


def describe_files(paths: Sequence[Path | str]) -> Any:
    """Return a description of files: their names and sizes, and pieces of some of them.

    Raises:
        OSError: A file cannot be read.
    """
    chosen = [Path(paths[index]) for index in _spaced(len(paths), _MAX_FILES)]
    files = {path.name: _describe_file(path) for path in chosen}
    names = _digest(os.path.basename(path).encode() for path in paths)  # noqa: PTH119  # also str
    return _mapping(number=len(paths), names=names, files={"mapping": files})


def _describe(dataset: Any, depth: int) -> Any:
    own = getattr(dataset, "fingerprint", None)
    if callable(own):
        text = str(own())
        return text if len(text) <= _MAX_TEXT else _digest([text.encode()])
    for describe_kind in (_tensors, _images, _hugging_face, _mapped_arrays):
        found = describe_kind(dataset)
        if found is not None:
            return found
    if depth == _MAX_DEPTH:
        return None
    if isinstance(dataset, ConcatDataset):
        parts = [_describe(part, depth + 1) for part in dataset.datasets[:_MAX_FILES]]
        return parts if any(part is not None for part in parts) else None
    inner = getattr(dataset, "dataset", None)
    described = None if inner is None else _describe(inner, depth + 1)
    if isinstance(dataset, Subset):
        indices = np.asarray([dataset.indices[at] for at in _spaced(len(dataset), _NUM_ELEMENTS)])
        return _mapping(indices=_digest([indices.astype(np.int64).tobytes()]), data=described)
    return described


def _tensors(dataset: Any) -> Any:
    if type(dataset) is not TensorDataset:
        return None
    return [_describe_tensor(tensor) for tensor in dataset.tensors]


def _describe_tensor(tensor: torch.Tensor) -> Any:
    flat = tensor.detach().reshape(-1)
    step = max(flat.numel() // _NUM_ELEMENTS, 1)
    segments = flat[::step].cpu().tensor_split(_NUM_SEGMENTS)
    shape = f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
    return [shape, [describe(segment) for segment in segments]]


def _images(dataset: Any) -> Any:
    """Describe a data set with `samples`, a list of (file, class), as that of an ImageFolder."""
    samples = getattr(dataset, "samples", None)
    if not isinstance(samples, list) or not samples or not isinstance(samples[0], tuple):
        return None
    if not isinstance(samples[0][0], (str, os.PathLike)):
        return None
    root = os.fspath(getattr(dataset, "root", ""))
    names = (
        f"{os.path.relpath(file, root) if root else os.path.basename(file)} {label}"  # noqa: PTH119
        for file, label in samples
    )
    files = describe_files([file for file, _ in samples])
    return _mapping(samples=_digest(name.encode() for name in names), files=files)


def _hugging_face(dataset: Any) -> Any:
    """Describe a Hugging Face data set by its columns and some rows of its table.

    Its own fingerprint depends on times of files, and may be random after a `map`.
    """
    table: Any = getattr(dataset, "data", None)
    indices: Any = getattr(dataset, "_indices", None)
    if not (hasattr(dataset, "_fingerprint") and hasattr(table, "num_rows")):
        return None
    rows = [describe(table.slice(at, 1).to_pylist()) for at in _spaced(table.num_rows, _NUM_ROWS)]
    order = None
    if indices is not None:
        chosen = _spaced(indices.num_rows, 64)
        order = [indices.column(0)[at].as_py() for at in chosen]
    return _mapping(number=table.num_rows, columns=str(dataset.features), rows=rows, order=order)


def _mapped_arrays(dataset: Any) -> Any:
    """Describe the files of memory-mapped arrays in a data set's attributes."""
    found: dict[str, Any] = {}
    for name, value in getattr(dataset, "__dict__", {}).items():
        values = value if isinstance(value, (list, tuple)) else [value]
        files = [each.filename for each in values[:_MAX_FILES] if isinstance(each, np.memmap)]
        paths = [Path(file) for file in files if isinstance(file, (str, os.PathLike))]
        if paths:
            found[name] = describe_files(paths)
    return {"mapping": found} if found else None


def _describe_file(path: Path) -> Any:
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        last = max(size - _BLOCK_BYTES, 0)
        pieces = []
        for block in range(_NUM_BLOCKS):
            file.seek(last * block // max(_NUM_BLOCKS - 1, 1))
            pieces.append(file.read(_BLOCK_BYTES))
    return _mapping(bytes=size, content=_digest(pieces))


def _mapping(**values: Any) -> dict[str, Any]:
    return {"mapping": values}


def _spaced(number: int, limit: int) -> list[int]:
    """Return at most `limit` evenly spaced numbers of range(number), with the first and last."""
    if number <= limit:
        return list(range(number))
    return [at * (number - 1) // (limit - 1) for at in range(limit)]


def _digest(pieces: Iterable[bytes]) -> str:
    sha = hashlib.sha256()
    for piece in pieces:
        sha.update(len(piece).to_bytes(8, "little"))
        sha.update(piece)
    return sha.hexdigest()[:16]
