"""The files that this process has open for reading, and their positions.

Forked DataLoader workers share the positions of files that were open at the fork, so a data set
that reads through them would read from wrong positions.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple


class OpenFile(NamedTuple):
    """An open file, whose position is shared with forked processes."""

    path: str
    """The path, as the kernel reports it."""

    inode: int
    """The inode number."""

    position: int
    """The offset in bytes at which the next read starts."""


def open_files() -> dict[int, OpenFile]:
    """Return the regular files that are open for reading, by descriptor (Linux; else empty)."""
    files = {}
    for name in _descriptors():
        descriptor = int(name)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                continue
            text = Path(f"/proc/self/fdinfo/{name}").read_text(encoding="ascii")
            values = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
            flags = int(values["flags"], 8)
            if flags & os.O_ACCMODE == os.O_WRONLY or flags & os.O_APPEND:  # such as a log file
                continue
            path = Path(f"/proc/self/fd/{name}").readlink()
            files[descriptor] = OpenFile(str(path), status.st_ino, int(values["pos"]))
        except (OSError, ValueError, KeyError):  # the file was closed in the meantime
            continue
    return files


def moved_files(before: Mapping[int, OpenFile]) -> list[str]:
    """Return the paths of files in `before` that are still open and whose position changed."""
    files = open_files()
    return [
        old.path
        for descriptor, old in before.items()
        if (new := files.get(descriptor)) is not None
        and new.inode == old.inode
        and new.position != old.position
    ]


def opened_since(before: Mapping[int, OpenFile]) -> dict[int, OpenFile]:
    """Return the open files that are not in `before`, by descriptor."""
    return {
        descriptor: file
        for descriptor, file in open_files().items()
        if descriptor not in before or before[descriptor].inode != file.inode
    }


def _descriptors() -> list[str]:
    try:
        return [entry.name for entry in Path("/proc/self/fd").iterdir()]
    except OSError:  # no /proc
        return []
