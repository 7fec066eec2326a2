"""Files of a run folder: written completely or not at all, removed, or set aside."""

from __future__ import annotations

import contextlib
import errno
import io
import itertools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launcher.errors import RunDirError
from launcher.json_file import encode_json
from launcher.printable import as_bytes, as_unicode
from launcher.regular_file import open_regular

_MAX_STEM = 200
"""Bytes of a name that are part of the name of its temporary file, of at most 255 bytes."""


_REMEDIES = {
    errno.ENOSPC: "Free some space, and repeat the command.",
    errno.EDQUOT: "Free some space, and repeat the command.",
    errno.EROFS: "Give the path of a file that you can write to.",
    errno.EACCES: "Give the path of a file that you can write to.",
    errno.ENAMETOOLONG: "Give a shorter name.",
}
"""What to do about a file that cannot be written, by the reason."""


def write_atomic(path: Path, content: str | bytes, *, remedy: str = "") -> None:
    """Write a file so that it holds all of its content or is unchanged, even after a power failure.

    Whatever else than a folder has the name is replaced, be it a symbolic link or a FIFO, so that
    nothing is written outside the folder of `path`.

    Args:
        path: The file.
        content: Its content; `as_bytes` encodes text.
        remedy: A sentence for the end of the error that says what to do.

    Raises:
        RunDirError: The disk is full, or the folder is missing or cannot be written.
    """
    temporary = path.with_name(f".{_stem(path)}.{os.getpid()}.tmp")
    try:
        temporary.unlink(missing_ok=True)  # of a killed process with the same id
        with temporary.open("xb") as file:
            file.write(as_bytes(content) if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise unwritable_error(path, error, remedy) from None
    finally:
        with contextlib.suppress(OSError):  # the error above says more
            temporary.unlink(missing_ok=True)


def _stem(path: Path) -> str:
    """Return the beginning of a name, to which something can be added."""
    return os.fsdecode(os.fsencode(path.name)[:_MAX_STEM])


def unwritable_error(path: Path, error: OSError, remedy: str = "") -> RunDirError:
    """Return the error for a file that cannot be written, with the reason and what to do."""
    remedy = remedy or _REMEDIES.get(error.errno or 0, "")
    text = f"Cannot write {path}: {error.strerror or error}."
    return RunDirError(f"{text} {remedy}" if remedy else text)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write `values` as indented JSON, completely or not at all; NaN and infinity become null.

    Raises:
        RunDirError: The file cannot be written.
    """
    write_atomic(path, encode_json(values, indent=2) + "\n")


def write_yaml(path: Path, values: Mapping[str, Any]) -> None:
    """Write `values` as YAML in their order, completely or not at all; see `as_unicode` for text.

    Raises:
        RunDirError: The file cannot be written.
    """
    import yaml

    class Dumper(yaml.SafeDumper):
        """Writes text that can be read again."""

    Dumper.add_representer(
        str, lambda dumper, text: yaml.SafeDumper.represent_str(dumper, as_unicode(text))
    )
    write_atomic(path, yaml.dump(dict(values), Dumper=Dumper, sort_keys=False, width=100))


def remove_file(path: Path) -> None:
    """Remove a file of a run folder if it exists; set aside a folder that has its name.

    Raises:
        RunDirError: It cannot be removed.
    """
    try:
        path.unlink(missing_ok=True)
    except IsADirectoryError:
        set_file_aside(path)
    except OSError as error:
        raise RunDirError(f"Cannot remove {path}: {error.strerror or error}.") from None


def set_file_aside(path: Path) -> None:
    """Append `.set-aside` to a name in a run folder that launcher needs for a file of its own.

    Raises:
        RunDirError: It cannot be renamed.
    """
    for number in itertools.count(1):
        target = path.with_name(f"{path.name}.set-aside" + (f"-{number}" if number > 1 else ""))
        if not os.path.lexists(target):
            break
    try:
        path.rename(target)
    except OSError as error:
        raise RunDirError(f"Cannot rename {path}: {error.strerror or error}.") from None


def count_lines(path: Path) -> int:
    """Return the number of lines in a file, or 0 if it cannot be read."""
    try:
        with io.BufferedReader(open_regular(path)) as file:
            return sum(1 for _ in file)
    except OSError:
        return 0
