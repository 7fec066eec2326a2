"""The files that this process holds open for reading, and where in them it would read next."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple


class OpenFile(NamedTuple):
    """An open file; processes that are forked share its position."""

    path: str
    inode: int
    position: int


def open_files() -> dict[int, OpenFile]:
    """Return the regular files that are open for reading, by descriptor (Linux)."""
    found = {}
    for name in _descriptors():
        descriptor = int(name)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                continue
            text = Path(f"/proc/self/fdinfo/{name}").read_text(encoding="ascii")
            values = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
            flags = int(values["flags"], 8)
            if flags & os.O_ACCMODE == os.O_WRONLY or flags & os.O_APPEND:  # written, as logs are
                continue
            path = Path(f"/proc/self/fd/{name}").readlink()
            found[descriptor] = OpenFile(str(path), status.st_ino, int(values["pos"]))
        except (OSError, ValueError, KeyError):  # it was closed meanwhile
            continue
    return found


def moved_files(before: Mapping[int, OpenFile]) -> list[str]:
    """Return the paths of the files in `before` that are still open, at another position."""
    now = open_files()
    return [
        then.path
        for descriptor, then in before.items()
        if (found := now.get(descriptor)) is not None
        and found.inode == then.inode
        and found.position != then.position
    ]


def opened_since(before: Mapping[int, OpenFile]) -> dict[int, OpenFile]:
    """Return the files that are open and were not open in `before`."""
    return {
        descriptor: found
        for descriptor, found in open_files().items()
        if descriptor not in before or before[descriptor].inode != found.inode
    }


def _descriptors() -> list[str]:
    try:
        return [each.name for each in Path("/proc/self/fd").iterdir()]
    except OSError:  # no /proc
        return []
