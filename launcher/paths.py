"""Questions about paths that users and files name, which no name can make fail.

`Path.is_file` and its relatives raise OSError for a name longer than the file system allows and for
a folder that may not be searched, which differs between versions of Python. What these functions
are asked about then does not exist for this process, so the answer is False.
"""

from __future__ import annotations

import os
from pathlib import Path


def is_file(path: str | Path) -> bool:
    """Return whether a path leads to a regular file, also through symbolic links."""
    return os.path.isfile(path)  # noqa: PTH113  # Path raises


def is_dir(path: str | Path) -> bool:
    """Return whether a path leads to a folder, also through symbolic links."""
    return os.path.isdir(path)  # noqa: PTH112  # Path raises


def leads_to_dir(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry of a folder is or leads to a folder, which a link in a circle is not.

    Unlike `is_dir`, it does not ask the system about entries that are no links.
    """
    try:
        return entry.is_dir()
    except OSError:
        return False


def exists(path: str | Path) -> bool:
    """Return whether a path leads to something, also through symbolic links."""
    return os.path.exists(path)  # noqa: PTH110  # Path raises


def is_link(path: str | Path) -> bool:
    """Return whether a path is a symbolic link, to whatever it may lead."""
    return os.path.islink(path)  # noqa: PTH114  # Path raises


def native(text: str) -> str:
    """Return a path that was read from a file in UTF-8 as Python has it in the present locale."""
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        return os.fsdecode(text.encode("utf-8", "surrogatepass"))
    return text
