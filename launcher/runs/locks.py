"""Locks on files, and on which file systems all machines see them."""

from __future__ import annotations

import errno
import fcntl
import os
import re
from pathlib import Path

_UNSUPPORTED = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)

_LOCAL = frozenset(
    {"bcachefs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "overlay", "tmpfs", "xfs", "zfs"}
)
_SHARED = frozenset({"ceph", "gfs2", "gpfs", "ocfs2"})
"""Network and cluster file systems on which every machine that sees a file sees its locks."""

_ESCAPED = re.compile(r"\\([0-7]{3})")
"""How mountinfo writes blanks and backslashes in names."""

_SHARED_IF = {"nfs": "local_lock=none", "nfs4": "local_lock=none", "lustre": "flock"}
"""File systems on which machines share locks only with a mount option."""


def try_lock(descriptor: int, kind: int) -> bool | None:
    """Try to lock an open file; return whether this process holds the lock now.

    None means that the file system does not support locks.

    Args:
        descriptor: The open file.
        kind: `fcntl.LOCK_SH` or `fcntl.LOCK_EX`.

    Raises:
        OSError: The file cannot be locked for any other reason.
    """
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            return None
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        raise
    return True


def locks_are_shared(path: Path) -> bool:
    """Return whether every machine that sees a file in `path` also sees its locks.

    False if the file system of `path` is unknown.
    """
    num_parts, kind, options = -1, "", ""
    try:
        mounts = Path("/proc/self/mountinfo").read_bytes()
    except OSError:
        return False
    for line in os.fsdecode(mounts).split("\n")[:-1]:
        before, _, after = line.partition(" - ")
        mount_point = Path(_ESCAPED.sub(lambda code: chr(int(code[1], 8)), before.split()[4]))
        if len(mount_point.parts) >= num_parts and path.is_relative_to(mount_point):
            num_parts = len(mount_point.parts)
            kind, _, options = after.split(" ", 2)
    if kind in _SHARED_IF:
        return _SHARED_IF[kind] in options.split(",")
    return kind in _LOCAL | _SHARED
