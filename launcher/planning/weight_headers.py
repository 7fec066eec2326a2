"""The tensors that a safetensors file, or a folder in Hugging Face's format, says it holds.

A file begins with a header of JSON, so that names and shapes are known without reading a tensor. A
folder holds `model.safetensors`, or several files and `model.safetensors.index.json`, which says in
which of them each tensor is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NoReturn

from msgspec import Meta

from launcher import paths
from launcher.errors import RecipeError
from launcher.json_file import DamagedJSONError, decode_json
from launcher.regular_file import open_regular, read_regular

FILE, INDEX = "model.safetensors", "model.safetensors.index.json"

_MAX_HEADER = 100_000_000
"""Size of the largest header; safetensors has the same limit."""


@dataclass(frozen=True, kw_only=True)
class StoredWeight:
    """A tensor in a file."""

    file: Path
    shape: tuple[int, ...]


@dataclass(frozen=True)
class _Entry:
    dtype: str
    shape: tuple[Annotated[int, Meta(ge=0)], ...]
    data_offsets: tuple[Annotated[int, Meta(ge=0)], Annotated[int, Meta(ge=0)]]


@dataclass(frozen=True)
class _Index:
    weight_map: dict[str, str]


def read_weight_headers(text: str) -> Mapping[str, StoredWeight]:
    """Return the tensors that `weights=text` names, by name.

    Raises:
        RecipeError: A file is missing, cannot be read, or is no safetensors file; or a file of a
            folder does not hold what the index says.
    """
    path = Path(text)
    if not paths.is_dir(path):
        return _read_header(text, path)
    if not paths.is_file(path / INDEX):
        return _read_header(text, path / FILE)
    try:
        index = decode_json(read_regular(path / INDEX, _MAX_HEADER), _Index)
    except (OSError, DamagedJSONError) as error:
        _refuse(text, f"{path / INDEX} cannot be read: {error}")
    names: dict[str, list[str]] = {}
    for name, file in index.weight_map.items():
        if Path(file).name != file:
            _refuse(text, f"{path / INDEX} names {file!r}, which is no file of this folder")
        names.setdefault(file, []).append(name)
    stored: dict[str, StoredWeight] = {}
    for file, of_file in sorted(names.items()):
        header = _read_header(text, path / file)
        if absent := [name for name in of_file if name not in header]:
            _refuse(
                text, f"{path / INDEX} says that {file} has {absent[0]}, and the file has it not"
            )
        stored |= {name: header[name] for name in of_file}
    return stored


def _read_header(text: str, path: Path) -> dict[str, StoredWeight]:
    try:
        with open_regular(path) as file:
            start = file.read(8)
            size = int.from_bytes(start, "little")
            if len(start) < 8 or size > _MAX_HEADER:
                _refuse(text, f"{path} is not a safetensors file")
            header = file.read(size)
            file_size = file.seek(0, 2)
    except OSError as error:
        _refuse(text, f"{path} cannot be read: {error.strerror or error}")
    try:
        entries = decode_json(header, dict[str, object])
        entries.pop("__metadata__", None)
        tensors = _converted(entries)
    except DamagedJSONError:
        _refuse(text, f"{path} is not a safetensors file")
    end = max((entry.data_offsets[1] for entry in tensors.values()), default=0)
    if 8 + size + end != file_size:
        _refuse(text, f"{path} is cut off: it has {file_size:,} bytes, not {8 + size + end:,}")
    return {name: StoredWeight(file=path, shape=entry.shape) for name, entry in tensors.items()}


def _converted(entries: dict[str, object]) -> dict[str, _Entry]:
    import msgspec

    try:
        return msgspec.convert(entries, dict[str, _Entry])
    except msgspec.ValidationError as error:
        raise DamagedJSONError(str(error)) from None


def _refuse(text: str, problem: str) -> NoReturn:
    raise RecipeError(
        f"weights={text}: {problem}. Give a safetensors file, or a folder with {FILE} or {INDEX}."
    )
