"""owner.lock, the file that describes the owner of a run folder."""

from __future__ import annotations

import os
from dataclasses import dataclass

from launcher.json_file import DamagedJSONError, decode_json
from launcher.regular_file import open_descriptor
from launcher.runs.process_owner import ProcessOwner
from launcher.runs.rundir import RunDir

_MAX_BYTES = 1 << 16
"""Bytes of owner.lock that are read at most."""


@dataclass(frozen=True, kw_only=True)
class Owner(ProcessOwner):
    """A process that owns a run folder, as owner.lock describes it."""

    inode: int
    """Inode of owner.lock, so that a copied run folder does not inherit the owner."""


def read_owner(descriptor: int) -> Owner | None:
    """Return the owner that owner.lock describes, or None if it is empty, damaged or a copy."""
    try:
        owner = decode_json(os.pread(descriptor, _MAX_BYTES, 0), Owner)
    except DamagedJSONError:
        return None
    return owner if owner.inode == os.fstat(descriptor).st_ino else None


def may_have_owner(run_dir: RunDir) -> bool:
    """Return whether the process that owner.lock describes may be running.

    The lock itself is not tried, because a launcher that starts would find it taken. False is
    certain: there is no owner.lock, it describes nobody, or its process has ended.
    """
    try:
        descriptor = open_descriptor(run_dir.owner, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        owner = read_owner(descriptor)
    finally:
        os.close(descriptor)
    return owner is not None and not owner.is_dead
