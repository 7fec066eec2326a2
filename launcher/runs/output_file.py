"""Files that a user names for a command to write, which may exist and belong to somebody else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from launcher.errors import RunDirError
from launcher.paths import exists, is_file
from launcher.printable import as_bytes
from launcher.regular_file import open_regular
from launcher.runs.files import unwritable_error, write_atomic

_HEAD_BYTES = 1 << 16
"""Bytes of an existing file by which its writer is recognised."""


def check_output(
    path: Path, is_ours: Callable[[bytes], bool], *, force: bool, option: str = "--out"
) -> None:
    """Refuse to replace a file that launcher did not write.

    Args:
        path: The file, which need not exist. An empty file may be replaced.
        is_ours: Returns whether launcher wrote a file, given its first bytes.
        force: Whether any file may be replaced.
        option: The option that names the file, for the error.

    Raises:
        RunDirError: The file exists, and launcher did not write it.
    """
    if force or not is_file(path):
        return
    try:
        with open_regular(path) as file:
            head = file.read(_HEAD_BYTES)
    except OSError as error:
        raise unwritable_error(path, error) from None
    if head and not is_ours(head):
        raise RunDirError(
            f"{path} exists, and this command did not write it. Give another {option}, or add "
            "--force to replace it."
        )


def write_output(path: Path, text: str) -> None:
    """Write a file that a user named: completely or not at all, and through a link to its target.

    What exists and is not a regular file, such as /dev/stdout, is written to directly.

    Raises:
        RunDirError: The file cannot be written.
    """
    if exists(path) and not is_file(path):
        try:
            path.write_bytes(as_bytes(text))
        except OSError as error:
            raise unwritable_error(path, error) from None
        return
    write_atomic(path.resolve(), text, remedy=f"Give the path of another file instead of {path}.")
