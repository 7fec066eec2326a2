"""Locks on files, and how far a file system carries them."""

from __future__ import annotations

import errno
import fcntl
import re
from pathlib import Path

_UNSUPPORTED = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)

_LOCAL = frozenset(
    {"bcachefs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "overlay", "tmpfs", "xfs", "zfs"}
)
_SHARED = frozenset({"ceph", "gfs2", "gpfs", "ocfs2"})
"""File systems on which everybody who sees a file sees its locks."""

_ESCAPED = re.compile(r"\\([0-7]{3})")
"""As mountinfo writes blanks in names."""

_SHARED_IF = {"nfs": "local_lock=none", "nfs4": "local_lock=none", "lustre": "flock"}
"""File systems on which that depends on a mount option."""


def try_lock(descriptor: int, kind: int) -> bool | None:
    """Return whether this process has the lock now; None where the file system has no locks."""
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
    """Return whether a lock on a file in `path` is seen by all machines that see the file."""
    found, kind, options = -1, "", ""
    try:
        lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return False
    for line in lines:
        before, _, after = line.partition(" - ")
        mounted = Path(_ESCAPED.sub(lambda code: chr(int(code[1], 8)), before.split()[4]))
        if len(mounted.parts) >= found and path.is_relative_to(mounted):
            found = len(mounted.parts)
            kind, _, options = after.split(" ", 2)
    if kind in _SHARED_IF:
        return _SHARED_IF[kind] in options.split(",")
    return kind in _LOCAL | _SHARED
