"""The tensors that a safetensors file, or a folder in Hugging Face's format, says it holds.

A file begins with a header of JSON, so that names and shapes are known without reading a tensor. A
folder holds `model.safetensors`, or several files and `model.safetensors.index.json`, which says in
which of them each tensor is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from launcher import paths
from launcher.errors import RecipeError, RunDirError
from launcher.json_file import DamagedJSONError, decode_json
from launcher.regular_file import read_regular
from launcher.tensor_file import read_tensor_file

FILE, INDEX = "model.safetensors", "model.safetensors.index.json"

_MAX_INDEX_BYTES = 100_000_000


@dataclass(frozen=True, kw_only=True)
class StoredWeight:
    """A tensor in a file."""

    file: Path
    shape: tuple[int, ...]


@dataclass(frozen=True)
class _Index:
    weight_map: dict[str, str]


def read_weight_headers(text: str) -> Mapping[str, StoredWeight]:
    """Return the tensors that `weights=text` names, by name.

    Raises:
        RecipeError: A file is missing, cannot be read, or is not a safetensors file; or a file of
            a folder does not hold what the index says.
    """
    path = Path(text)
    if not paths.is_dir(path):
        return _read_header(text, path)
    if not paths.is_file(path / INDEX):
        return _read_header(text, path / FILE)
    try:
        index = decode_json(read_regular(path / INDEX, _MAX_INDEX_BYTES), _Index)
    except (OSError, DamagedJSONError) as error:
        _refuse(text, f"{path / INDEX} cannot be read: {error}")
    names: dict[str, list[str]] = {}
    for name, file in index.weight_map.items():
        if Path(file).name != file:
            _refuse(text, f"{path / INDEX} names {file!r}, which is not in this folder")
        names.setdefault(file, []).append(name)
    stored: dict[str, StoredWeight] = {}
    for file, of_file in sorted(names.items()):
        header = _read_header(text, path / file)
        if absent := [name for name in of_file if name not in header]:
            _refuse(text, f"{path / INDEX} says that {file} has {absent[0]}, and it does not")
        stored |= {name: header[name] for name in of_file}
    return stored


def _read_header(text: str, path: Path) -> dict[str, StoredWeight]:
    try:
        tensors = read_tensor_file(path).tensors
    except RunDirError as error:
        _refuse(text, str(error).removesuffix("."))
    return {name: StoredWeight(file=path, shape=tensor.shape) for name, tensor in tensors.items()}


def _refuse(text: str, problem: str) -> NoReturn:
    raise RecipeError(
        f"weights={text}: {problem}. Give a safetensors file, or a folder with {FILE} or {INDEX}."
    )
