"""JSON files that are read back as typed values, and strict JSON that is written.

Nothing in a file is trusted: its kind, size, nesting, numbers and the types of its values are
checked, and whatever is wrong is one error that names the file.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, BinaryIO, TypeVar

import msgspec
from msgspec import Meta

from launcher.errors import LauncherError, RunDirError
from launcher.printable import printable_line, shortened
from launcher.regular_file import open_regular, read_regular

MAX_BYTES = 1 << 24
"""Largest JSON document that is read, unless its reader says otherwise."""

_MAX_LINE_BYTES = 1 << 26
"""Longest line of a JSON-lines file; a damaged file may have no line breaks at all."""

_MAX_DEPTH = 100
"""Deepest nesting of a document. Python's own limit depends on how deep the caller is."""

_MAX_DIGITS = 1000
"""Longest integer; Python refuses to print those with more than 4300 digits."""

_FLOAT = "$float"
"""The only key of the mapping that stands for a float that is not finite."""

T = TypeVar("T")

Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]
"""A number of steps, samples or bytes."""

Moment = Annotated[float, Meta(ge=0, le=32_503_680_000)]
"""Seconds since 1970, until the year 3000, which every clock can show."""


class DamagedJSONError(ValueError):
    """The bytes are not JSON of the expected type; the text says why and names no file."""


def read_json(
    path: Path,
    kind: type[T],
    *,
    error: type[LauncherError] = RunDirError,
    max_bytes: int = MAX_BYTES,
    remedy: str = "",
    exact: bool = False,
    is_ours: bool = True,
) -> T:
    """Return the content of a JSON file as a value of a type.

    Args:
        path: The file.
        kind: A type that msgspec converts to, such as a dataclass; it ignores unknown keys.
        error: The class of the error.
        max_bytes: Largest size of the file.
        remedy: A sentence for the end of the error that says what to do.
        exact: Whether the file was written with `exact_floats`.
        is_ours: Whether launcher writes such files, rather than a user.

    Raises:
        LauncherError: The file is missing or cannot be read, is not a regular file, or is damaged.
    """
    remedy = f" {remedy}" if remedy else ""
    try:
        return decode_json(read_regular(path, max_bytes), kind, exact=exact)
    except OSError as failure:
        reason = (failure.strerror or str(failure)).rstrip(".")
        raise error(f"Cannot read {path}: {reason}.{remedy}") from None
    except DamagedJSONError as failure:
        claim = "is damaged, or launcher did not write it" if is_ours else "cannot be used"
        raise error(f"{path} {claim}: {failure}.{remedy}") from None


def find_json(
    path: Path,
    kind: type[T],
    *,
    error: type[LauncherError] = RunDirError,
    max_bytes: int = MAX_BYTES,
    remedy: str = "",
    exact: bool = False,
) -> T | None:
    """Return the content of a JSON file as `read_json` does, or None if the file is missing.

    Raises:
        LauncherError: As `read_json` raises it for a file that exists.
    """
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError):
        pass  # `read_json` says why
    return read_json(path, kind, error=error, max_bytes=max_bytes, remedy=remedy, exact=exact)


def read_lines(path: Path, decoder: msgspec.json.Decoder[T]) -> list[T]:
    """Return the values of the lines that a decoder accepts; skip the others.

    A killed run leaves half a line, and a run at work is writing one. A file that cannot be read
    yields an empty list.
    """
    values = []
    try:
        with io.BufferedReader(open_regular(path)) as file:
            for line in lines_of(file):
                if (value := decode_line(line, decoder)) is not None:
                    values.append(value)
    except OSError:
        pass
    return values


def lines_of(file: BinaryIO) -> Iterator[bytes]:
    """Yield the lines of a file, until its end or a line that is far too long."""
    while 0 < len(line := file.readline(_MAX_LINE_BYTES)) < _MAX_LINE_BYTES:
        yield line


def decode_line(line: bytes, decoder: msgspec.json.Decoder[T]) -> T | None:
    """Return the value of one line, or None if the line is damaged or of another type."""
    try:
        return decoder.decode(line)
    except (ValueError, RecursionError, OverflowError, msgspec.MsgspecError):
        return None


def decode_json(content: bytes, kind: type[T], *, exact: bool = False) -> T:
    """Return JSON as a value of a type.

    Args:
        content: The text.
        kind: The type.
        exact: Whether floats that are not finite were written with `exact_floats`. Otherwise NaN
            and infinities, which JSON lacks and earlier versions wrote, are read as null.

    Raises:
        DamagedJSONError: It is not JSON, is nested too deep, or is not of the type.
    """
    try:
        values = _decode(content, exact=exact)
        result: T = msgspec.convert(restored_floats(values) if exact else values, kind)
    except (ValueError, OverflowError, msgspec.MsgspecError) as error:
        raise DamagedJSONError(printable_line(shortened(str(error), 200))) from None
    return result


def decode_values(content: bytes) -> dict[str, Any]:
    """Return a JSON object as plain values; NaN and infinities stay as they are.

    Raises:
        DamagedJSONError: It is not a JSON object, or is nested too deep.
    """
    values = _decode(content, exact=True)
    if not isinstance(values, dict):
        raise DamagedJSONError("it is not a JSON object")
    return values


def _decode(content: bytes, *, exact: bool) -> Any:
    try:
        values = json.loads(
            content.decode(),
            parse_constant=float if exact else _null,
            parse_int=_integer,
            parse_float=_float,
        )
    except RecursionError:
        raise DamagedJSONError(f"it is nested more than {_MAX_DEPTH} deep") from None
    except UnicodeDecodeError as error:
        raise DamagedJSONError(f"byte {error.start:,} is not UTF-8") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise DamagedJSONError(f"it is not JSON ({where}: {error.msg})") from None
    _check_depth(values)
    return values


def exact_floats(value: Any) -> Any:
    """Return a value with each NaN and infinity, which JSON lacks, as a mapping to its name."""
    if isinstance(value, Mapping):
        return {name: exact_floats(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [exact_floats(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {_FLOAT: str(value)}
    return value


def restored_floats(value: Any) -> Any:
    """Return a value as it was before `exact_floats`."""
    if isinstance(value, list):
        return [restored_floats(item) for item in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {_FLOAT} and value[_FLOAT] in ("nan", "inf", "-inf"):
        return float(value[_FLOAT])
    return {name: restored_floats(item) for name, item in value.items()}


def encode_json(values: Any, *, indent: int | None = None) -> str:
    """Return values as strict JSON. Infinities and NaN, which JSON lacks, become null."""
    return json.dumps(finite(values), indent=indent, allow_nan=False)


def finite(value: Any) -> Any:
    """Return a value in which infinities and NaN are replaced by None at every level."""
    if isinstance(value, Mapping):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _null(_: str) -> None:
    return None


def _integer(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise DamagedJSONError(f"it holds an integer of {len(digits):,} digits")
    return int(digits)


def _float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise DamagedJSONError(f"it holds the number {text[:20]}, which is too large")
    return value


def _check_depth(values: Any) -> None:
    """Refuse values that are nested too deep.

    Raises:
        DamagedJSONError: They are.
    """
    level, depth = [values], 0
    while level:
        depth += 1
        if depth > _MAX_DEPTH:
            raise DamagedJSONError(f"it is nested more than {_MAX_DEPTH} deep")
        level = [
            item
            for value in level
            if isinstance(value, (dict, list))
            for item in (value.values() if isinstance(value, dict) else value)
        ]
